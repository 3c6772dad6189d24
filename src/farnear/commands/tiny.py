"""`farnear tiny`: a model to try things out with, where there is no GPU and no network."""

import argparse
from pathlib import Path

from farnear.command_line import Parser
from farnear.errors import UserError


def add_tiny(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "tiny",
        help="a tiny model of random weights, to try things out on a CPU",
        description="Write a Qwen3-VL of toy size with random weights, which trains on a CPU within minutes: for a "
        "first look at your own data, run files and machines. It knows nothing before it is trained.",
        epilog="example:\n  farnear tiny runs/tiny",
    )
    parser.add_argument("out", metavar="FOLDER", type=Path, help="a folder that is not there yet")
    parser.set_defaults(command=_tiny)


def _tiny(arguments: argparse.Namespace) -> int:
    if arguments.out.exists():
        raise UserError(f"{arguments.out} is there already, and is not replaced; name another folder")
    from farnear.environment import prepare_environment

    prepare_environment()
    from farnear.noise import quiet

    quiet()
    from farnear.model.tiny import save_tiny_model

    print(f"a tiny model of random weights is in {save_tiny_model(arguments.out)}")
    return 0
