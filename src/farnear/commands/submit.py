"""`farnear submit`: train what a run file describes as a SLURM job that looks after itself."""

import argparse

from farnear.command_line import Parser, add_run_arguments, positive


def add_submit(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "submit",
        help="train what a run file describes as a SLURM job",
        description="Check and plan a run, write the job's script into the run folder and hand it to sbatch. The job "
        "saves before its time limit and when it is preempted, goes back into the queue by itself and continues. What "
        "it asks the cluster for stands in the run file's section slurm.",
        epilog="examples:\n"
        "  farnear submit run.yaml --nodes 4 --dry-run\n"
        "  farnear submit run.yaml --nodes 4 slurm.partition=gpu slurm.gpus_per_node=8",
    )
    add_run_arguments(parser, resumes=False)
    parser.add_argument("--nodes", type=positive, default=1, help="nodes of the job (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the script, and neither write nor submit it")
    parser.add_argument("--no-plan", action="store_true", help="submit whatever `farnear plan` foresees")
    parser.set_defaults(command=_submit)


def _submit(arguments: argparse.Namespace) -> int:
    from farnear.launching.slurm import submit

    return submit(
        arguments.run_file,
        arguments.overrides,
        nodes=arguments.nodes,
        dry_run=arguments.dry_run,
        planned=not arguments.no_plan,
    )
