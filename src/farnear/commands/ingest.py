"""`farnear shards from-hf`, `from-pdf`, `from-csv` and `synth`: shards of what a user has.

Like all commands they exit 0 only when they have done what they say; see `farnear.cli`.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from farnear.command_line import Parser, positive, size
from farnear.errors import UserError
from farnear.wording import counted

if TYPE_CHECKING:
    from farnear.ingest.shards import ImportReport


def add_ingest(sources: "argparse._SubParsersAction[Parser]") -> None:
    """Add the commands that make shards."""
    _add_from_hf(sources)
    _add_from_pdf(sources)
    _add_from_csv(sources)
    _add_synth(sources)


def add_out(parser: Parser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for the shards")
    parser.add_argument("--seed", type=int, default=0, help="another one splits otherwise (default: %(default)s)")
    parser.add_argument("--pairs-per-shard", type=positive, default=1000, help="(default: %(default)s)")


def add_eval_fraction(parser: Parser, default: float) -> None:
    parser.add_argument(
        "--eval-fraction",
        type=float,
        default=default,
        help="share of the pairs for evaluation (default: %(default)s)",
    )


def _add_from_hf(sources: "argparse._SubParsersAction[Parser]") -> None:
    parser = sources.add_parser(
        "from-hf",
        help="the rows of a dataset of the hub or of files: parquet, JSON, CSV, Arrow, images",
        description="Pack the rows of any dataset that the datasets library opens, image files untouched. Columns with "
        "usual names are found (query, image, negative_0, ...) and printed. A page may be an image file's bytes, its "
        "path, its address, or an array.",
        epilog="examples:\n"
        "  farnear shards from-hf tomaarsen/llamaindex-vdr-en-train-preprocessed shards \\\n"
        "    --config train --split train\n"
        "  farnear shards from-hf tomaarsen/llamaindex-vdr-en-train-preprocessed shards \\\n"
        "    --config eval --split train --name eval\n"
        "  farnear shards from-hf pairs.parquet shards --query-column question --page-column scan",
    )
    parser.add_argument("source", metavar="NAME_OR_PATH", help="a dataset on the hub, a file, or a folder")
    add_out(parser)
    parser.add_argument("--config", help="of the dataset, where it has several")
    parser.add_argument("--split", help="of the dataset, where it has several")
    parser.add_argument("--revision", help="a commit, branch or tag on the hub")
    parser.add_argument("--query-column", metavar="COLUMN", help="texts, or lists of texts for one page")
    parser.add_argument("--page-column", metavar="COLUMN", help="the page that answers the query")
    parser.add_argument(
        "--negative-columns",
        metavar="COLUMN",
        nargs="*",
        help="hard negatives: one page a column, or one column with lists of pages; without a name: none",
    )
    parser.add_argument("--document-column", metavar="COLUMN", help="what a page is part of; is not split")
    parser.add_argument("--limit", type=positive, help="take this many rows only")
    parser.add_argument("--name", default="train", help="of the shards: NAME-000000.tar (default: %(default)s)")
    add_eval_fraction(parser, 0.0)
    parser.add_argument("--corpus", action="store_true", help="store each page once, and pairs that name pages")
    parser.add_argument("--texts", action="store_true", help="pages and negatives are texts, not images")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows without a query or a readable page")
    parser.set_defaults(command=_from_hf)


def _from_hf(arguments: argparse.Namespace) -> int:
    from farnear.ingest.dataset_columns import choose_columns
    from farnear.ingest.huggingface import import_table, open_table

    table = open_table(
        arguments.source,
        config=arguments.config,
        split=arguments.split,
        revision=arguments.revision,
        limit=arguments.limit,
    )
    columns = choose_columns(
        table.rows.features,
        query=arguments.query_column,
        page=arguments.page_column,
        negatives=arguments.negative_columns,
        document=arguments.document_column,
    )
    print(f"{table.name}: {len(table.rows)} rows\n{columns}", flush=True)
    report = import_table(
        table,
        columns,
        arguments.out,
        name=arguments.name,
        eval_fraction=arguments.eval_fraction,
        seed=arguments.seed,
        pairs_per_shard=arguments.pairs_per_shard,
        corpus=arguments.corpus,
        texts=arguments.texts,
        skip_bad=arguments.skip_bad,
    )
    return tell_import(report)


def _add_from_pdf(sources: "argparse._SubParsersAction[Parser]") -> None:
    parser = sources.add_parser(
        "from-pdf",
        help="the pages of PDFs, each with a line of its text as its query",
        description="Render the pages of every PDF in a folder and ask for each by a telling line of its text, by the "
        "outline's entries that point at it, or by the rows of a CSV. No document and no query is on both sides of the "
        "split; a document is a PDF, or a page where there is one PDF only.",
        epilog="examples:\n"
        "  farnear shards from-pdf manuals shards --eval-fraction 0.1\n"
        "  farnear shards from-pdf manuals shards --queries queries.csv\n"
        "  farnear shards from-pdf manuals data --no-queries",
    )
    parser.add_argument("source", metavar="FOLDER", type=Path, help="searched for PDFs with all below it; or one PDF")
    add_out(parser)
    add_eval_fraction(parser, 0.1)
    parser.add_argument(
        "--max-side", type=positive, default=1024, help="pixels of the longer side (default: %(default)s)"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--queries",
        metavar="text|outline|FILE.csv",
        default="text",
        help="where queries come from; a CSV has the columns file, page (from 1) and query (default: %(default)s)",
    )
    kinds.add_argument(
        "--no-queries", action="store_true", help="all pages alone, as corpus-*.tar with their text, nothing split"
    )
    parser.add_argument("--min-words", type=positive, default=4, help="words of a query (default: %(default)s)")
    parser.add_argument("--png", action="store_true", help="store PNG instead of JPEG: larger, without loss")
    parser.set_defaults(command=_from_pdf)


def _from_pdf(arguments: argparse.Namespace) -> int:
    from farnear.ingest.pdf import OUTLINE, TEXT, import_pages, import_pdf

    if arguments.no_queries:
        report = import_pages(
            arguments.source,
            arguments.out,
            pages_per_shard=arguments.pairs_per_shard,
            max_side=arguments.max_side,
            png=arguments.png,
        )
        return tell_import(report)
    queries: str = arguments.queries
    if queries not in (TEXT, OUTLINE) and not queries.lower().endswith(".csv"):
        raise UserError(f"--queries {queries} names no source of queries; say text, outline or the name of a .csv file")
    report = import_pdf(
        arguments.source,
        arguments.out,
        queries=queries if queries in (TEXT, OUTLINE) else Path(queries),
        eval_fraction=arguments.eval_fraction,
        seed=arguments.seed,
        pairs_per_shard=arguments.pairs_per_shard,
        max_side=arguments.max_side,
        png=arguments.png,
        min_words=arguments.min_words,
    )
    return tell_import(report)


def _add_from_csv(sources: "argparse._SubParsersAction[Parser]") -> None:
    parser = sources.add_parser(
        "from-csv",
        help="the rows of a CSV file: a query and the path of its page image",
        description="Pack the pairs that a CSV file names, images untouched. Its columns are query, image (relative "
        "to the file) and perhaps document and hard negatives: negative_0, negative_1, ... No document and no query is "
        "on both sides of the split.",
        epilog="example:\n  farnear shards from-csv pairs.csv shards --eval-fraction 0.1",
    )
    parser.add_argument("source", metavar="FILE", type=Path, help="a CSV file whose first line names its columns")
    add_out(parser)
    add_eval_fraction(parser, 0.1)
    parser.set_defaults(command=_from_csv)


def _from_csv(arguments: argparse.Namespace) -> int:
    from farnear.ingest.csv_file import import_csv

    report = import_csv(
        arguments.source,
        arguments.out,
        eval_fraction=arguments.eval_fraction,
        seed=arguments.seed,
        pairs_per_shard=arguments.pairs_per_shard,
    )
    return tell_import(report)


def _add_synth(sources: "argparse._SubParsersAction[Parser]") -> None:
    parser = sources.add_parser(
        "synth",
        help="drawn pages with charts, for a first try",
        description="Draw pages with one chart each. Training and evaluation pages share no combination of attributes.",
        epilog="example:\n  farnear shards synth shards --pairs 2000 --eval-pairs 200",
    )
    add_out(parser)
    parser.add_argument("--pairs", type=positive, default=2000, help="training pairs (default: %(default)s)")
    parser.add_argument("--eval-pairs", type=int, default=200, help="evaluation pairs (default: %(default)s)")
    parser.add_argument("--size", type=size, default=(128, 160), help="of a page, in pixels (default: 128x160)")
    parser.add_argument("--siblings", action="store_true", help="draw families of pages that differ in one attribute")
    parser.set_defaults(command=_synth)


def _synth(arguments: argparse.Namespace) -> int:
    from farnear.ingest.shards import ImportReport
    from farnear.ingest.synthetic import synthesise

    train, evaluation = synthesise(
        arguments.out,
        train_pairs=arguments.pairs,
        eval_pairs=arguments.eval_pairs,
        seed=arguments.seed,
        size=arguments.size,
        pairs_per_shard=arguments.pairs_per_shard,
        siblings=arguments.siblings,
    )
    return tell_import(ImportReport(tuple(train), tuple(evaluation), arguments.pairs, arguments.eval_pairs, ()))


def tell_import(report: "ImportReport") -> int:
    """Print what was written, what was left out, and the lines that a run file needs."""
    import yaml

    shards = {
        "train": report.train_shards,
        "train_corpus": report.train_corpus,
        "eval": report.eval_shards,
        "eval_corpus": report.eval_corpus,
    }
    amounts = {"train": report.train_pairs, "eval": report.eval_pairs}
    for side, pairs in amounts.items():
        if shards[side]:
            print(f"{side}: {counted(pairs, 'pair')} in {counted(len(shards[side]), 'shard')}")
    if report.corpus_pages:
        of_corpus = len(report.train_corpus) + len(report.eval_corpus)
        print(f"corpus: {counted(report.corpus_pages, 'page')} in {counted(of_corpus, 'shard')}")
    for note in report.notes:
        print(note)
    for reason in report.skipped:
        print(f"left out: {reason}")
    patterns = {key: [_pattern(paths[0])] for key, paths in shards.items() if paths}
    print("\nfor the run file:\n")
    print(yaml.safe_dump({"data": patterns}, sort_keys=False), end="")
    return 0


def _pattern(shard: Path) -> str:
    """The glob for a shard and its like: `out/train-*.tar` for `out/train-000000.tar`."""
    return re.sub(r"-\d{6}\.tar$", "-*.tar", str(shard))
