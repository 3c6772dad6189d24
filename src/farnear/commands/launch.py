"""`farnear launch`: train what a run file describes, on this machine or on several."""

import argparse
from pathlib import Path

from farnear.command_line import Parser, add_run_arguments, port, positive


def add_launch(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "launch",
        help="train what a run file describes, on this machine",
        description="Check a run file, print the accelerate command that trains it, and run that command with as many "
        "processes as the machine has GPUs (or CPU cores, if it has none). On several machines run it on each, as "
        "launch/node.sh does; `farnear submit` does it through SLURM. A file with stages is run stage by stage: the "
        "same command goes on where it stopped, and passes over what is done.",
        epilog="examples:\n"
        "  farnear launch run.yaml training.learning_rate=1e-5\n"
        "  farnear launch run.yaml --num_processes 4 --resume auto\n"
        "  farnear launch flywheel.yaml\n"
        "  farnear launch run.yaml --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1",
    )
    add_run_arguments(parser)
    parser.add_argument("--config_file", type=Path, help="an accelerate config, instead of the strategy's own")
    parser.add_argument(
        "--num_processes", type=positive, help="ranks on all machines; wins over the run file's num_processes"
    )
    parser.add_argument("--num_machines", type=positive, default=1, help="machines that train together")
    parser.add_argument("--machine_rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--main_process_ip", metavar="ADDRESS", default="", help="address of machine 0")
    parser.add_argument(
        "--main_process_port", metavar="PORT", type=port, help="a port that is free there (default: 29500)"
    )
    parser.add_argument("--log_dir", type=Path, help="a folder in which each rank gets a log, rank-00000.log, ...")
    parser.set_defaults(command=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    from farnear.flywheel_file import is_flywheel
    from farnear.launching.local import launch
    from farnear.launching.nodes import DEFAULT_PORT, Nodes

    if is_flywheel(arguments.run_file):
        return _launch_stages(arguments)
    nodes = Nodes(
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        main_process_ip=arguments.main_process_ip,
        main_process_port=arguments.main_process_port or DEFAULT_PORT,
    )
    return launch(
        arguments.run_file,
        arguments.overrides,
        resume=arguments.resume,
        config_file=arguments.config_file,
        num_processes=arguments.num_processes,
        nodes=nodes,
        log_dir=arguments.log_dir,
    )


def _launch_stages(arguments: argparse.Namespace) -> int:
    from farnear.errors import UserError
    from farnear.launching.flywheel import launch_flywheel

    if arguments.num_machines > 1:
        raise UserError(
            f"{arguments.run_file} has stages, which run on one machine; on several launch the run file of each stage "
            "(NAME.yaml in output_dir) when those before it are done"
        )
    if arguments.config_file is not None:
        raise UserError(
            f"{arguments.run_file} has stages, each with the accelerate config of its strategy; drop --config_file"
        )
    return launch_flywheel(
        arguments.run_file,
        arguments.overrides,
        num_processes=arguments.num_processes,
        log_dir=arguments.log_dir,
    )
