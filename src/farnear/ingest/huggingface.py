"""Imports the rows of a dataset that the `datasets` library can open: from the hub, or from files.

Rows are read from Arrow tables as they are stored, one after the other and past the library's own decoding, which would
turn an image file into pixels that can only be compressed a second time. What is in a cell goes through
`farnear.ingest.images.page_from`; that fetches and checks images of several rows at once.

Two layouts can be written. Without `corpus` every pair carries its page and its hard negatives. With it each page is
stored once, under a hash of its content, and pairs name their pages: where negatives were mined from the same
collection, one page is the negative of many pairs and the positive of another, and shards are several times smaller.
Training and evaluation have a corpus each: the pages of an evaluation's corpus are what its queries are searched in.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from farnear.errors import UserError
from farnear.ingest.dataset_columns import Columns
from farnear.ingest.dataset_rows import RowReader, Table
from farnear.ingest.images import hash_of
from farnear.ingest.shards import (
    EVAL,
    CorpusPage,
    ImportReport,
    Pair,
    Reference,
    Sample,
    refuse_existing_shards,
    write_prefixes,
)
from farnear.wording import counted

BUILDER_OF_SUFFIX = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}


def open_table(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> Table:
    """Open one split of a dataset.

    Args:
        source: a folder that `save_to_disk` wrote, a parquet, JSON, CSV or Arrow file, a folder of such files or of
            images, or else a name on the hub.
        config, split, revision: as `datasets.load_dataset` has them; a split may be left out where there is one.
        limit: take the first rows only.

    Raises:
        UserError: it cannot be opened, or it has several splits and none is named.
    """
    import datasets

    path = Path(source).expanduser()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            if path.suffix.lower() not in BUILDER_OF_SUFFIX:
                known = ", ".join(BUILDER_OF_SUFFIX)
                raise UserError(f"{path} is no table of a known kind ({known}); convert it, or name its folder")
            options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            loaded = datasets.load_dataset(BUILDER_OF_SUFFIX[path.suffix.lower()], data_files=[str(path)], **options)
        elif path.exists() or not source.startswith((".", "/", "~")):
            loaded = datasets.load_dataset(str(path) if path.exists() else source, config, revision=revision)
        else:
            raise UserError(f"{path} does not exist, so there is nothing to import; check the path")
    except UserError:
        raise
    except Exception as error:  # builders, file systems and the hub raise almost anything
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{source} cannot be opened as a dataset ({said}); check its name, --config and --revision, and whether "
            "this machine reaches the hub"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split is None and len(loaded) > 1:
            raise UserError(f"{source} has the splits {', '.join(loaded)}; name the one to import with --split")
        if split is not None and split not in loaded:
            raise UserError(f"{source} has no split {split!r}, only {', '.join(loaded)}; name one of these")
        split = split or next(iter(loaded))
        rows = loaded[split]
    elif split is not None and str(loaded.split) != split:
        raise UserError(f"{source} holds a single table, so there is no split {split!r}; leave --split out")
    else:
        rows = loaded
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    folder = path if path.is_dir() else path.parent if path.is_file() else Path()
    return Table(rows, f"{source} split {split}" if split else source, folder)


def import_table(
    table: Table,
    columns: Columns,
    out: Path,
    *,
    name: str = "train",
    eval_fraction: float = 0.0,
    seed: int = 0,
    pairs_per_shard: int = 1000,
    corpus: bool = False,
    texts: bool = False,
    skip_bad: bool = False,
) -> ImportReport:
    """Write the rows of a table as shards, each row a pair.

    Args:
        table: from `open_table`.
        columns: from `farnear.ingest.dataset_columns.choose_columns`.
        out: the folder for `NAME-*.tar`, and `eval-*.tar` with `eval_fraction`.
        name: what the shards are called.
        eval_fraction: share of the pairs to keep for evaluation; 0 for none. Without a document column each page is a
            document of its own, known by its address or by its bytes.
        corpus: store each page once, in `corpus-NAME-*.tar`; memory then holds the names of all pages and the queries.
        texts: cells of the page and negative columns are not places of images, but texts that are searched for.
        skip_bad: leave out rows without a query or a page, and negatives that cannot be read, and count them.

    Raises:
        UserError: a row is bad and not to be left out, nothing remains, or see `farnear.ingest.shards`.
    """
    if eval_fraction and name == EVAL:
        raise UserError("--name eval and --eval-fraction would both write eval-*.tar; leave one of them out")
    prefixes = (name, EVAL) if eval_fraction else (name,)
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or name.startswith("corpus"):
        raise UserError(
            f"{name!r} is no name for shards of pairs: it must be made of letters, digits, _ and -, and not start with "
            "'corpus'; say train, eval or the like"
        )
    refuse_existing_shards(out, (*prefixes, *(map(_corpus_prefix, prefixes) if corpus else ())))
    reader = RowReader(table, columns, name, texts=texts, skip_bad=skip_bad)
    rows_of_prefix: dict[str, Sequence[int] | None] = {name: None}
    if eval_fraction:
        rows_of_prefix = dict(zip(prefixes, reader.split(eval_fraction, seed), strict=True))
    samples: dict[str, Iterable[Sample]] = {}
    corpora: dict[str, _Corpus] = {}
    for prefix, rows in rows_of_prefix.items():
        if corpus:
            corpora[prefix] = _Corpus()
            samples[_corpus_prefix(prefix)] = corpora[prefix].pages(reader, prefix, rows)
            # Read after the corpus has been written: until then there are none.
            samples[prefix] = _not_empty(prefix, corpora[prefix].references, reader)
        else:
            samples[prefix] = _not_empty(prefix, _pairs(reader, prefix, rows), reader)
    shards = write_prefixes(samples, out, pairs_per_shard=pairs_per_shard)
    converted = [
        f"{counted(count, 'page')} from {kind} converted to PNG" for kind, count in sorted(reader.converted.items())
    ]
    is_eval = name == EVAL
    return ImportReport(
        () if is_eval else tuple(shards[name]),
        tuple(shards.get(EVAL, ())),
        0 if is_eval else reader.pairs[name],
        reader.pairs[EVAL],
        tuple(reader.left_out()),
        tuple(converted),
        () if is_eval else tuple(shards.get(_corpus_prefix(name), ())),
        tuple(shards.get(_corpus_prefix(EVAL), ())),
        sum(len(stored.written) for stored in corpora.values()),
    )


def _corpus_prefix(prefix: str) -> str:
    return f"corpus-{prefix}"


def _pairs(reader: RowReader, prefix: str, rows: Sequence[int] | None) -> Iterator[Pair]:
    for row in reader.prepared(prefix, rows):
        yield Pair(row.key, row.query, row.page.data, row.page.extension, row.document, row.negatives)


class _Corpus:
    """Stores each page once, and remembers the pairs that name it until all pages are stored."""

    def __init__(self) -> None:
        self.written: set[str] = set()
        self.references: list[Reference] = []

    def pages(self, reader: RowReader, prefix: str, rows: Sequence[int] | None) -> Iterator[CorpusPage]:
        for row in reader.prepared(prefix, rows):
            keys = []
            for page in (row.page, *row.negatives):
                key = hash_of(page.data)
                keys.append(key)
                if key not in self.written:
                    self.written.add(key)
                    yield CorpusPage(key, page.data, page.extension)
            self.references.append(Reference(row.key, row.query, keys[0], row.document, tuple(keys[1:])))


def _not_empty(prefix: str, pairs: Iterable[Sample], reader: RowReader) -> Iterator[Sample]:
    """The same pairs; where there is none, a UserError before anything is published."""
    yield from pairs
    if not reader.pairs[prefix]:
        reasons = "; ".join(reader.left_out()) or "it has no rows"
        raise UserError(
            f"{reader.table.name} has no usable row for {prefix} shards ({reasons}); check the columns and the rows"
        )
