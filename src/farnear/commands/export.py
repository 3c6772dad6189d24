"""`farnear export`: any checkpoint as a model that others load."""

import argparse
from pathlib import Path

from farnear.command_line import Parser


def add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="a checkpoint as a folder that sentence-transformers loads",
        description="Make a folder as a run's export/ is one of any of its checkpoints, on the CPU: the model in the "
        "base's own form, and its card with the evaluations known at that step. Every file of the checkpoint is hashed "
        "first. The base model has to be where the run file says.",
        epilog="examples:\n"
        "  farnear export runs/mine best --best\n"
        "  farnear export runs/mine/checkpoints/step-00001200 exports/at-1200\n"
        "  farnear export runs/mine exports/mine card.license=apache-2.0",
    )
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's newest checkpoint, or any one")
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that is not there yet")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="of section card, in place of the run file's"
    )
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint by its evaluations")
    parser.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from farnear.environment import prepare_environment, quiet_libraries

    prepare_environment()
    quiet_libraries()
    from farnear.training.exporting import export_checkpoint

    checkpoint = export_checkpoint(arguments.path, arguments.out, best=arguments.best, overrides=arguments.overrides)
    print(f"{arguments.out} holds the model of {checkpoint}")
    return 0
