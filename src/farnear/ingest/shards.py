"""Writes pairs as WebDataset shards.

A pair is one query with its page, and perhaps with hard negatives: pages that look right and are not. In a shard it is
members that share a key: `KEY.json` with the query (a list where several queries ask for one page) and the document
that the page comes from, the page `KEY.png`, its bytes untouched, and `KEY.neg0.jpg`, `KEY.neg1.png` and so on. A page
may be a text too, `KEY.txt`.

Where many pairs share pages, most of all as hard negatives, each page can be stored once: in a corpus shard as
`DOC.png`, beside it `DOC.about.json` if something is known about the page; a pair is then `KEY.json` alone, which names
its pages with "pos_id" and "neg_ids".

Equal samples give equal shards, byte for byte: nothing in a tar depends on the clock or on who runs it.

An importer knows its pairs long before it has their images (a CSV names them, a PDF's text gives the queries), and
images do not fit in memory. So an importer makes a list of `Record`s, `split` deals them out, and the images stream
into the shards, first those for training, then those for evaluation: `import_pairs` is that flow.

Shards appear in the output folder all at once, when the last one is written: a folder never holds half an import.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from farnear.errors import UserError
from farnear.ingest.images import IMAGE_EXTENSIONS, TEXT_EXTENSION, PageFile
from farnear.ingest.split import Queries, Record, queries_of, split
from farnear.wording import counted

TRAIN, EVAL = "train", "eval"
PAGE_EXTENSIONS = (*IMAGE_EXTENSIONS, TEXT_EXTENSION)
ABOUT = "about.json"  # of a page in a corpus; the reader of shards passes it by


@dataclass(frozen=True)
class Pair:
    """A pair with its page: the bytes of a file, that file's extension without the dot, and hard negatives."""

    key: str
    query: Queries
    page: bytes
    extension: str
    document: str
    negatives: tuple[PageFile, ...] = ()

    def members(self) -> dict[str, bytes]:
        pages = {self.extension: self.page}
        pages |= {f"neg{number}.{page.extension}": page.data for number, page in enumerate(self.negatives)}
        return {"json": _json({"query": _checked_queries(self), "document": self.document}), **pages}


@dataclass(frozen=True)
class Reference:
    """A pair that names its page and its hard negatives, which lie in a corpus shard."""

    key: str
    query: Queries
    page: str
    document: str
    negatives: tuple[str, ...] = ()

    def members(self) -> dict[str, bytes]:
        text = {"query": _checked_queries(self), "pos_id": self.page, "neg_ids": list(self.negatives)}
        return {"json": _json({**text, "document": self.document})}


@dataclass(frozen=True)
class CorpusPage:
    """A page that no query asks for by itself, and what is known about it."""

    key: str
    page: bytes
    extension: str
    about: Mapping[str, object] | None = None

    def members(self) -> dict[str, bytes]:
        return {self.extension: self.page, **({} if self.about is None else {ABOUT: _json(self.about)})}


Sample = Pair | Reference | CorpusPage


@dataclass(frozen=True)
class ImportReport:
    """What an import has written, what it has left out (a name and a reason for each), and what else is worth saying.

    Attributes:
        train_pairs, eval_pairs: queries with their page, so a sample with several queries counts for several.
        train_corpus, eval_corpus: shards of the pages that pairs name, or that nobody names.
        corpus_pages: how many there are in both.
    """

    train_shards: tuple[Path, ...]
    eval_shards: tuple[Path, ...]
    train_pairs: int
    eval_pairs: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()
    train_corpus: tuple[Path, ...] = ()
    eval_corpus: tuple[Path, ...] = ()
    corpus_pages: int = 0


def import_pairs(
    records: Sequence[Record],
    load: Callable[[Sequence[Record]], Iterator[Sample]],
    out: Path,
    *,
    eval_fraction: float,
    seed: int,
    pairs_per_shard: int,
    skipped: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> ImportReport:
    """Split records, then write `train-*.tar` and, when there is an evaluation side, `eval-*.tar`.

    Args:
        records: every pair to write.
        load: turns some records, in the order given, into pairs; called once for each side.
        out: the folder for the shards; made when it does not exist.
        eval_fraction: share of the pairs to keep for evaluation; 0 for none.
        skipped, notes: what the importer has left out and found, handed on to the report.

    Raises:
        UserError: from `split` and `write_prefixes`.
    """
    refuse_existing_shards(out, (TRAIN, EVAL))
    train_rows, eval_rows = split(records, eval_fraction, seed)
    rows_of_prefix = {TRAIN: train_rows, EVAL: eval_rows} if eval_rows else {TRAIN: train_rows}
    pairs_of_prefix = {prefix: load([records[row] for row in rows]) for prefix, rows in rows_of_prefix.items()}
    shards = write_prefixes(pairs_of_prefix, out, pairs_per_shard=pairs_per_shard)
    return ImportReport(
        tuple(shards[TRAIN]),
        tuple(shards.get(EVAL, ())),
        sum(len(queries_of(records[row].query)) for row in train_rows),
        sum(len(queries_of(records[row].query)) for row in eval_rows),
        tuple(skipped),
        tuple(notes),
    )


def write_shards(pairs: Iterable[Sample], out: Path, *, prefix: str, pairs_per_shard: int = 1000) -> list[Path]:
    """Write samples to `out/PREFIX-000000.tar` and so on, and return these paths; see `write_prefixes`."""
    return write_prefixes({prefix: pairs}, out, pairs_per_shard=pairs_per_shard)[prefix]


def write_prefixes(
    pairs_of_prefix: Mapping[str, Iterable[Sample]], out: Path, *, pairs_per_shard: int
) -> dict[str, list[Path]]:
    """Write several sets of shards into one folder, all or nothing.

    Args:
        pairs_of_prefix: the samples for `PREFIX-*.tar`, read lazily, one prefix after the other: no more than one
            sample is held in memory.
        out: the folder; made when it does not exist.
        pairs_per_shard: the last shard of a prefix may hold fewer.

    Returns:
        The shards of each prefix, in order.

    Raises:
        UserError: `out` already holds shards of a prefix or is no folder, or a pair cannot be stored.
    """
    if pairs_per_shard < 1:
        raise UserError(f"pairs_per_shard is {pairs_per_shard}, but a shard holds at least one pair; give 1 or more")
    refuse_existing_shards(out, pairs_of_prefix)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".importing-") as staging:
        written = {
            prefix: [
                _write_shard(pairs_of_shard, Path(staging) / f"{prefix}-{number:06d}.tar")
                for number, pairs_of_shard in enumerate(_groups(pairs, pairs_per_shard))
            ]
            for prefix, pairs in pairs_of_prefix.items()
        }
        for shard in chain.from_iterable(written.values()):
            os.replace(shard, out / shard.name)
    return {prefix: [out / shard.name for shard in shards] for prefix, shards in written.items()}


def refuse_existing_shards(out: Path, prefixes: Iterable[str]) -> None:
    """Raise UserError when `out` cannot take shards of these prefixes: it is a file, or holds some already."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, but shards are written into a folder; name another one")
    for prefix in prefixes:
        existing = sorted(out.glob(f"{prefix}-*.tar"))
        if existing:
            raise UserError(
                f"{out} already holds {counted(len(existing), 'shard')} named {prefix}-*.tar ({existing[0].name} "
                "first), and old and new pairs would mix; name another folder or delete them"
            )


def key_for(number: int, name: str) -> str:
    """A key that `number` makes unique and `name` recognisable: `000012-Annual-report` for 12 and "Annual report"."""
    return f"{number:06d}-{re.sub('[^A-Za-z0-9_-]+', '-', name)[:70]}"


def _groups(pairs: Iterable[Sample], size: int) -> Iterator[Iterator[Sample]]:
    """Cut a stream into streams of `size`; each must be read to its end before the next."""
    iterator = iter(pairs)
    for first in iterator:
        yield chain((first,), islice(iterator, size - 1))


def _write_shard(samples: Iterable[Sample], path: Path) -> Path:
    from webdataset import TarWriter  # imports torch, which the processes that only draw or render pages never need

    keys: set[str] = set()
    with path.open("wb") as stream, TarWriter(stream, user="", group="", encoder=False, mtime=0) as tar:
        for sample in samples:
            if not sample.key or "." in sample.key or "/" in sample.key or sample.key in keys:
                raise UserError(
                    f"the key {sample.key!r} is empty, holds a dot or a slash, or comes twice in {path.name}, so its "
                    "pair could not be told from others; give each pair a key of its own"
                )
            keys.add(sample.key)
            members = sample.members()
            for name, data in members.items():
                extension = name.rpartition(".")[2]
                if extension not in (*PAGE_EXTENSIONS, "json"):
                    raise UserError(
                        f"pair {sample.key} has a page with the extension {extension!r}, which no reader of shards "
                        f"knows; use one of {', '.join(PAGE_EXTENSIONS)}"
                    )
                if not data:
                    raise UserError(f"pair {sample.key} has the empty member {name} and cannot be read; leave it out")
            tar.write({"__key__": sample.key, **members})
    return path


def _checked_queries(pair: Pair | Reference) -> str | list[str]:
    """What goes under "query" of a pair's JSON."""
    queries = queries_of(pair.query)
    if not queries or not all(query.strip() for query in queries):
        raise UserError(f"pair {pair.key} has an empty query and cannot be trained on; leave it out")
    return queries[0] if len(queries) == 1 else list(queries)


def _json(text: Mapping[str, object]) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()
