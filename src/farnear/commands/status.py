"""`farnear status`: how a run stands or has ended."""

import argparse
import sys

from farnear.command_line import Parser, add_run_arguments
from farnear.errors import UserError


def add_status(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "status",
        help="how a run stands or has ended",
        description="Print the state of a run (running, finished, stopped, failed), its newest checkpoint and the "
        "reason, from status.json in its run folder.",
        epilog="examples:\n  farnear status run.yaml output_dir=runs/second\n  farnear status runs/second",
    )
    add_run_arguments(parser, resumes=False)
    parser.set_defaults(command=_status)


def _status(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from farnear.config import load_config
    from farnear.run_folder import RunFolder
    from farnear.status import read_status
    from farnear.wording import printable

    named = arguments.run_file
    if named.is_dir() and arguments.overrides:
        raise UserError(f"{named} is a run folder, and its run file is what it is; drop {arguments.overrides[0]}")
    folder = RunFolder(named if named.is_dir() else Path(load_config(named, arguments.overrides).output_dir))
    status = read_status(folder)
    if status is None:
        print(f"nothing has run in {folder.path}", file=sys.stderr)
        return 0
    words = [str(status.get("state", "unknown")), str(status.get("checkpoint") or "-"), str(status.get("reason") or "")]
    print(printable(" ".join(" ".join(words).split())))
    return 0
