"""`farnear mine`: hard negatives for the training pairs of a run file."""

import argparse
import os
from pathlib import Path

from farnear.command_line import Parser, parse, positive
from farnear.environment import prepare_environment
from farnear.errors import UserError, as_user_error
from farnear.noise import quiet
from farnear.outcome import announce, tell
from farnear.processes import end_with_parent


def add_mine(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "mine",
        help="find hard negatives for training pairs",
        description="Embed the training queries and pages with all ranks, search each query's nearest pages exactly, "
        "and write those that pass section `mining` of the run file and do not answer the query: negatives.jsonl, to "
        "be named in data.negatives, with a report and a page of examples. Killed and started again it goes on.",
        epilog="examples:\n"
        "  farnear mine run.yaml --model runs/first/export\n"
        "  farnear mine run.yaml mining.num_negatives=8 mining.relative_margin=0.05 --out mined\n\n"
        "docs/mining.md says more.",
    )
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="a value in place of the run file's"
    )
    parser.add_argument("--model", metavar="FOLDER", help="an embedder, in place of the run file's model.name_or_path")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to (default: mined in the run folder)")
    parser.add_argument("--num_processes", type=positive, help="ranks; wins over the run file's num_processes")
    parser.set_defaults(command=_mine)


def _mine(arguments: argparse.Namespace) -> int:
    from farnear.launching.mining import mine

    return mine(
        arguments.run_file,
        arguments.overrides,
        model=arguments.model,
        out=arguments.out,
        num_processes=arguments.num_processes,
    )


def rank_command(words: list[str]) -> int:
    """What launch/mine.py does on each rank. Returns the exit code."""
    from farnear.config import load_config
    from farnear.signals import Signals

    parser = Parser(prog="launch/mine.py", description="One rank of farnear mine.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("inputs")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    try:
        arguments = parse(parser, words)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(os.getppid())
        config = load_config(arguments.run_file, arguments.overrides)
        with Signals() as signals:
            announce()
            prepare_environment()
            quiet()
            from farnear.training.mine_ranks import mine_on_ranks, mining_config

            mine_on_ranks(mining_config(config), arguments.folder, arguments.inputs, signals)
        return 0
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
    tell(mistake)
    return mistake.exit_code
