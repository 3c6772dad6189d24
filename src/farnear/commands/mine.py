"""`farnear mine`: hard negatives for the training pairs of a run file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from farnear.command_line import Parser, positive
from farnear.commands.rank import work_on_rank

if TYPE_CHECKING:
    from farnear.signals import Signals


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
    parser = Parser(prog="launch/mine.py", description="One rank of farnear mine.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("inputs")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    return work_on_rank(parser, words, _mine_on_rank)


def _mine_on_rank(arguments: argparse.Namespace, signals: "Signals") -> None:
    from farnear.config import load_config
    from farnear.training.mine_ranks import mine_on_ranks, mining_config

    config = load_config(arguments.run_file, arguments.overrides)
    mine_on_ranks(mining_config(config), arguments.folder, arguments.inputs, signals)
