"""The `farnear` command, and the command line of launch/train.py.

A command exits 0 only when it has done what it says, and 2 on a user's mistake, which it tells in one line. What a
command needs is imported when it runs: `farnear --help` must not wait for torch.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import farnear
from farnear.command_line import Parser, parse, positive, resume, size
from farnear.errors import UserError, as_user_error

if TYPE_CHECKING:
    from farnear.ingest.shards import ImportReport

Command = Callable[[argparse.Namespace], int]


def main(words: Sequence[str] | None = None) -> int:
    """The `farnear` command. Returns its exit code."""
    from farnear.launching.outcome import error_line

    try:
        arguments = parse(_farnear_parser(), sys.argv[1:] if words is None else words)
        command: Command = arguments.command
        return command(arguments)
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
    print(error_line(mistake), file=sys.stderr)
    return mistake.exit_code


def train_command(words: Sequence[str]) -> int:
    """What launch/train.py does on each rank. Returns the exit code."""
    from farnear.config import load_config
    from farnear.launching.outcome import tell
    from farnear.processes import end_with_parent

    parser = Parser(prog="launch/train.py", description="Train one model on the ranks that the launcher started.")
    _add_run_arguments(parser)
    try:
        arguments = parse(parser, words)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, not by a shell that may be left
            end_with_parent(os.getppid())
        config = load_config(arguments.run_file, arguments.overrides)
        _prepare_environment()
        farnear.train(config, arguments.resume)
        return 0
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
    tell(mistake)
    return mistake.exit_code


def _prepare_environment() -> None:
    """Settings that libraries read when they are imported."""
    # Threads of OpenMP that spin while they wait keep data workers from the cores: up to 30 times slower when busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    # Ranks and data workers fill the cores already; a tokenizer's own threads would only compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # One rank speaks, and bars that redraw themselves are for a terminal.
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _farnear_parser() -> Parser:
    parser = Parser(
        prog="farnear",
        description="Fine-tune visual document retrieval models: a text query finds the page that answers it.",
        epilog="example:\n  farnear demo\n\n`farnear COMMAND --help` explains a command and gives an example.",
    )
    parser.add_argument("--version", action="version", version=f"farnear {farnear.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_shards(commands)
    _add_launch(commands)
    _add_report(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="train a tiny model on drawn pages, in minutes, on any machine",
        description="Draw pages with charts, train a tiny model to find them with several processes, and show nDCG "
        "before and after on pages that it has not seen.",
        epilog="example:\n  farnear demo --strategy zero2 --ranks 2",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run folder (default: %(default)s)")
    parser.add_argument("--strategy", default="ddp", help="single, ddp, zero1, zero2 or zero3 (default: %(default)s)")
    parser.add_argument("--ranks", type=positive, help="processes (default: 2, or 1 under single)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other pages (default: %(default)s)")
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from farnear.demo import run_demo

    _prepare_environment()
    return run_demo(arguments)


def _add_launch(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "launch",
        help="train what a run file describes, on this machine",
        description="Check a run file, print the accelerate command that trains it, and run that command with as many "
        "processes as the machine has GPUs (or CPU cores, if it has none).",
        epilog="examples:\n"
        "  farnear launch run.yaml training.learning_rate=1e-5\n"
        "  farnear launch run.yaml --num_processes 4 --resume auto",
    )
    _add_run_arguments(parser)
    parser.add_argument("--config_file", type=Path, help="an accelerate config, instead of the strategy's own")
    parser.add_argument("--num_processes", type=positive, help="ranks; wins over the run file's num_processes")
    parser.set_defaults(command=_launch)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="a value in place of the run file's"
    )
    parser.add_argument(
        "--resume",
        metavar="auto",
        nargs="?",
        type=resume,
        help="continue from the newest checkpoint; `--resume auto` starts if there is none",
    )


def _launch(arguments: argparse.Namespace) -> int:
    from farnear.launching.local import launch

    return launch(
        arguments.run_file,
        arguments.overrides,
        resume=arguments.resume,
        config_file=arguments.config_file,
        num_processes=arguments.num_processes,
    )


def _add_shards(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "shards",
        help="make shards of (query, page) pairs",
        description="Write pairs of a query and a page image as WebDataset tars, split into training and evaluation.",
        epilog="example:\n  farnear shards from-csv pairs.csv shards --eval-fraction 0.1",
    )
    sources = parser.add_subparsers(metavar="SOURCE", required=True)

    pdf = sources.add_parser(
        "from-pdf",
        help="the pages of PDFs, each with a line of its text as its query",
        description="Render the pages of every PDF in a folder and take a telling line of each page's text as its "
        "query. No document and no query is on both sides of the split; a document is a PDF, or a page where there is "
        "one PDF only.",
        epilog="example:\n  farnear shards from-pdf manuals shards --eval-fraction 0.1",
    )
    pdf.add_argument("source", metavar="FOLDER", type=Path, help="searched for PDFs with all below it; or one PDF")
    pdf.add_argument("--max-side", type=positive, default=1024, help="pixels of the longer side (default: %(default)s)")
    pdf.add_argument("--min-words", type=positive, default=4, help="words of a query (default: %(default)s)")
    pdf.add_argument("--png", action="store_true", help="store PNG instead of JPEG: larger, without loss")
    pdf.set_defaults(command=_shards_from_pdf)

    csv = sources.add_parser(
        "from-csv",
        help="the rows of a CSV file: a query and the path of its page image",
        description="Pack the pairs that a CSV file names, images untouched. Its columns are query, image (relative "
        "to the file) and perhaps document. No document and no query is on both sides of the split.",
        epilog="example:\n  farnear shards from-csv pairs.csv shards --eval-fraction 0.1",
    )
    csv.add_argument("source", metavar="FILE", type=Path, help="a CSV file whose first line names its columns")
    csv.set_defaults(command=_shards_from_csv)

    for source in (pdf, csv):
        source.add_argument("out", metavar="OUT", type=Path, help="the folder for the shards")
        source.add_argument(
            "--eval-fraction", type=float, default=0.1, help="share of the pairs for evaluation (default: %(default)s)"
        )

    synth = sources.add_parser(
        "synth",
        help="drawn pages with charts, for a first try",
        description="Draw pages with one chart each. Training and evaluation pages share no combination of attributes.",
        epilog="example:\n  farnear shards synth shards --pairs 2000 --eval-pairs 200",
    )
    synth.add_argument("out", metavar="OUT", type=Path, help="the folder for the shards")
    synth.add_argument("--pairs", type=positive, default=2000, help="training pairs (default: %(default)s)")
    synth.add_argument("--eval-pairs", type=int, default=200, help="evaluation pairs (default: %(default)s)")
    synth.add_argument("--size", type=size, default=(128, 160), help="of a page, in pixels (default: 128x160)")
    synth.set_defaults(command=_shards_synth)

    for source in (pdf, csv, synth):
        source.add_argument("--seed", type=int, default=0, help="another one splits otherwise (default: %(default)s)")
        source.add_argument("--pairs-per-shard", type=positive, default=1000, help="(default: %(default)s)")


def _shards_from_pdf(arguments: argparse.Namespace) -> int:
    from farnear.ingest.pdf import import_pdf

    report = import_pdf(
        arguments.source,
        arguments.out,
        eval_fraction=arguments.eval_fraction,
        seed=arguments.seed,
        pairs_per_shard=arguments.pairs_per_shard,
        max_side=arguments.max_side,
        png=arguments.png,
        min_words=arguments.min_words,
    )
    return _tell_import(report, arguments.out)


def _shards_from_csv(arguments: argparse.Namespace) -> int:
    from farnear.ingest.csv_file import import_csv

    report = import_csv(
        arguments.source,
        arguments.out,
        eval_fraction=arguments.eval_fraction,
        seed=arguments.seed,
        pairs_per_shard=arguments.pairs_per_shard,
    )
    return _tell_import(report, arguments.out)


def _shards_synth(arguments: argparse.Namespace) -> int:
    from farnear.ingest.shards import ImportReport
    from farnear.ingest.synthetic import synthesise

    train, evaluation = synthesise(
        arguments.out,
        train_pairs=arguments.pairs,
        eval_pairs=arguments.eval_pairs,
        seed=arguments.seed,
        size=arguments.size,
        pairs_per_shard=arguments.pairs_per_shard,
    )
    report = ImportReport(tuple(train), tuple(evaluation), arguments.pairs, arguments.eval_pairs, ())
    return _tell_import(report, arguments.out)


def _tell_import(report: "ImportReport", out: Path) -> int:
    """Print what was written, what was left out, and the lines that a run file needs."""
    import yaml

    shards = {"train": report.train_shards, "eval": report.eval_shards}
    pairs = {"train": report.train_pairs, "eval": report.eval_pairs}
    for side in shards:
        plural = "" if len(shards[side]) == 1 else "s"
        print(f"{side}: {pairs[side]} pairs in {len(shards[side])} shard{plural}")
    for reason in report.skipped:
        print(f"left out: {reason}")
    print("\nfor the run file:\n")
    data = {side: [str(out / f"{side}-*.tar")] for side, paths in shards.items() if paths}
    print(yaml.safe_dump({"data": data}, sort_keys=False), end="")
    return 0


def _add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = commands.add_parser(
        "report",
        help="a run as one HTML page",
        description="Write report.html into a run folder, finished or not, and print its path.",
        epilog="example:\n  farnear report runs/demo",
    )
    parser.add_argument("run_folder", metavar="RUN_FOLDER", type=Path, help="the output_dir of a run")
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from farnear.report.page import write_report

    print(write_report(arguments.run_folder))
    return 0
