"""The `farnear` command, and the command line of launch/train.py.

A command exits 0 only when it has done what it says, and 2 on a user's mistake, which it tells in one line. What a
command needs is imported when it runs: `farnear --help` must not wait for torch.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import farnear
from farnear.command_line import Parser, add_run_arguments, parse, positive
from farnear.commands.doctor import add_doctor
from farnear.commands.encode import add_encode
from farnear.commands.evaluate import add_evaluate
from farnear.commands.export import add_export
from farnear.commands.launch import add_launch
from farnear.commands.mine import add_mine
from farnear.commands.plan import add_plan
from farnear.commands.prefetch import add_prefetch
from farnear.commands.push import add_push
from farnear.commands.shards import add_shards
from farnear.commands.status import add_status
from farnear.commands.submit import add_submit
from farnear.commands.tiny import add_tiny
from farnear.commands.watch import add_watch
from farnear.environment import prepare_environment
from farnear.errors import UserError, as_user_error
from farnear.noise import quiet

Command = Callable[[argparse.Namespace], int]


def main(words: Sequence[str] | None = None) -> int:
    """The `farnear` command. Returns its exit code."""
    from farnear.outcome import error_line

    # Streams that a shell has closed.
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        arguments = parse(farnear_parser(), sys.argv[1:] if words is None else words)
        command: Command = arguments.command
        code = command(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("farnear: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # `farnear ... | head` has read enough. What Python still holds for the pipe would fail once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
    with suppress(OSError):  # where both go into one pipe, the mistake comes last
        sys.stdout.flush()
    print(error_line(mistake), file=sys.stderr)
    return mistake.exit_code


def train_command(words: Sequence[str]) -> int:
    """What launch/train.py does on each rank. Returns the exit code."""
    from farnear.config import load_config
    from farnear.outcome import tell
    from farnear.processes import end_with_parent

    parser = Parser(prog="launch/train.py", description="Train one model on the ranks that the launcher started.")
    add_run_arguments(parser)
    try:
        arguments = parse(parser, words)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, not by a shell that may be left
            end_with_parent(os.getppid())
        config = load_config(arguments.run_file, arguments.overrides)
        prepare_environment()
        quiet()
        farnear.train(config, arguments.resume)
        return 0
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
    tell(mistake)
    return mistake.exit_code


def farnear_parser() -> Parser:
    parser = Parser(
        prog="farnear",
        description="Fine-tune visual document retrieval models: a text query finds the page that answers it.",
        epilog="example:\n  farnear demo\n\n`farnear COMMAND --help` explains a command and gives an example.",
    )
    parser.add_argument("--version", action="version", version=f"farnear {farnear.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    add_shards(commands)
    add_tiny(commands)
    add_prefetch(commands)
    add_plan(commands)
    add_doctor(commands)
    add_launch(commands)
    add_mine(commands)
    add_evaluate(commands)
    add_encode(commands)
    add_submit(commands)
    add_status(commands)
    add_watch(commands)
    add_export(commands)
    add_push(commands)
    _add_report(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="train a tiny model on drawn pages, in minutes, on any machine",
        description="Draw pages with charts, train a tiny model to find them with several processes, and show nDCG "
        "before and after on pages that it has not seen.",
        epilog="examples:\n  farnear demo --strategy zero2 --ranks 2\n  farnear demo --reranker",
    )
    parser.add_argument(
        "--reranker",
        action="store_true",
        help="train a reranker too, on harder pages, and a better embedder from its judgement; the last line is JSON",
    )
    parser.add_argument(
        "--out", type=Path, help="the run folder (default: runs/demo, with --reranker runs/demo-reranker)"
    )
    parser.add_argument(
        "--strategy", default="ddp", help="single, ddp, zero1, zero2, zero3 or fsdp2 (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=positive, help="processes (default: 2, or 1 under single)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other pages (default: %(default)s)")
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    prepare_environment()
    quiet()
    if arguments.reranker:
        from farnear.demo_reranker import run_reranker_demo

        return run_reranker_demo(arguments)
    from farnear.demo import run_demo

    return run_demo(arguments)


def _add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "report",
        help="a run as one HTML page",
        description="Write report.html into a run folder, finished or not, and print its path.",
        epilog="example:\n  farnear report runs/demo",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or the run file of a run")
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from farnear.config import load_config
    from farnear.report.page import write_report

    run: Path = arguments.run
    print(write_report(Path(load_config(run).output_dir) if run.is_file() else run))
    return 0
