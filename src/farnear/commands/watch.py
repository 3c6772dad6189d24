"""`farnear watch`: a run as it goes on, from another shell or another machine."""

import argparse
from pathlib import Path

from farnear.command_line import Parser


def add_watch(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "watch",
        help="show a run as it goes on",
        description="Show step, time left, loss, speed, memory, evaluations, checkpoints and where each rank is, by "
        "the files in the run folder, which may be on another machine's disk. Ends when the run does, with its exit "
        "code: 0 finished, 75 stopped and to be continued, else what status.json says. Ctrl-C leaves the run alone.",
        epilog="examples:\n"
        "  farnear watch runs/mine\n"
        "  farnear watch run.yaml output_dir=runs/second --interval 10\n"
        "  farnear watch runs/mine --once",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or the run file of a run")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="a value in place of the run file's"
    )
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=2.0, help="between two looks (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="look once; 0 where the run goes on")
    parser.set_defaults(command=_watch)


def _watch(arguments: argparse.Namespace) -> int:
    from farnear.launching.slurm import waiting_job
    from farnear.report.watching import run_folder_of, watch

    folder = run_folder_of(arguments.run, arguments.overrides)
    return watch(folder, arguments.interval, once=arguments.once, waiting=lambda: waiting_job(folder))


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"'{word}' is not a number of seconds from 0.1 to 3600")
    return seconds
