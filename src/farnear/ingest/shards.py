"""Writes pairs as WebDataset shards, and splits them into a training and an evaluation side first.

A pair is one query with its page. In a shard it is two members that share a key: `KEY.json` with the query and the
document that the page comes from, and the page's image, its bytes untouched. Equal pairs give equal shards, byte for
byte: nothing in a tar depends on the clock or on who runs it.

An importer knows its pairs long before it has their images (a CSV names them, a PDF's text gives the queries), and
images do not fit in memory. So an importer makes a list of `Record`s, `split` deals them out, and the images stream
into the shards, first those for training, then those for evaluation: `import_pairs` is that flow.

A figure on evaluation pages is worth little when the model has trained on the same document or the same question.
Pairs that share a document or a query are therefore tied together, and so are those tied to the same third one:
`split` deals out whole groups of tied pairs. Which group goes where depends on a hash of the group's name and the seed
alone, so that adding documents moves few others to the other side.

Shards appear in the output folder all at once, when the last one is written: a folder never holds half an import.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from farnear.errors import UserError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
TRAIN, EVAL = "train", "eval"


@dataclass(frozen=True)
class Record:
    """A pair without its image.

    Attributes:
        key: names the pair within its shard; no dot and no slash, at which a tar's reader would cut it.
        query: the text to search for.
        document: what the page is part of; pairs of one document stay on one side of a split.
    """

    key: str
    query: str
    document: str


@dataclass(frozen=True)
class Pair:
    """A pair with its image: the bytes of an image file, and that file's extension without the dot."""

    key: str
    query: str
    image: bytes
    extension: str
    document: str


@dataclass(frozen=True)
class ImportReport:
    """What an import has written, and what it has left out: a name and a reason for each."""

    train_shards: tuple[Path, ...]
    eval_shards: tuple[Path, ...]
    train_pairs: int
    eval_pairs: int
    skipped: tuple[str, ...]


def import_pairs(
    records: Sequence[Record],
    load: Callable[[Sequence[Record]], Iterator[Pair]],
    out: Path,
    *,
    eval_fraction: float,
    seed: int,
    pairs_per_shard: int,
    skipped: Sequence[str] = (),
) -> ImportReport:
    """Split records, then write `train-*.tar` and, when there is an evaluation side, `eval-*.tar`.

    Args:
        records: every pair to write.
        load: turns some records, in the order given, into pairs; called once for each side.
        out: the folder for the shards; made when it does not exist.
        eval_fraction: share of the pairs to keep for evaluation; 0 for none.
        skipped: what the importer has left out, handed on to the report.

    Raises:
        UserError: from `split` and `write_prefixes`.
    """
    refuse_existing_shards(out, (TRAIN, EVAL))
    train_rows, eval_rows = split(records, eval_fraction, seed)
    rows_of_prefix = {TRAIN: train_rows, EVAL: eval_rows} if eval_rows else {TRAIN: train_rows}
    pairs_of_prefix = {prefix: load([records[row] for row in rows]) for prefix, rows in rows_of_prefix.items()}
    shards = write_prefixes(pairs_of_prefix, out, pairs_per_shard=pairs_per_shard)
    return ImportReport(
        tuple(shards[TRAIN]), tuple(shards.get(EVAL, ())), len(train_rows), len(eval_rows), tuple(skipped)
    )


def write_shards(pairs: Iterable[Pair], out: Path, *, prefix: str, pairs_per_shard: int = 1000) -> list[Path]:
    """Write pairs to `out/PREFIX-000000.tar` and so on, and return these paths; see `write_prefixes`."""
    return write_prefixes({prefix: pairs}, out, pairs_per_shard=pairs_per_shard)[prefix]


def write_prefixes(
    pairs_of_prefix: Mapping[str, Iterable[Pair]], out: Path, *, pairs_per_shard: int
) -> dict[str, list[Path]]:
    """Write several sets of shards into one folder, all or nothing.

    Args:
        pairs_of_prefix: the pairs for `PREFIX-*.tar`, read lazily: no more than one pair is held in memory.
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
                f"{out} already holds {len(existing)} shards named {prefix}-*.tar ({existing[0].name} first), and old "
                "and new pairs would mix; name another folder or delete them"
            )


def split(records: Sequence[Record], eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Deal records out to training and evaluation so that no document and no query is on both sides.

    Queries are the same when they differ in case and white space only.

    Args:
        records: N of them.
        eval_fraction: the share of records wanted for evaluation, 0 <= eval_fraction < 1.
        seed: another seed, another split.

    Returns:
        Row numbers of the training side and of the evaluation side, both rising, N in all. The evaluation side is
        empty for a fraction of 0 and else has between half and twice as many rows as wanted, most often as many.

    Raises:
        UserError: the fraction is out of range, or the groups of tied records are too large to split near it.
    """
    if not 0 <= eval_fraction < 1:
        raise UserError(f"an evaluation fraction of {eval_fraction} leaves nothing to train on; give 0 <= fraction < 1")
    if eval_fraction == 0:
        return list(range(len(records))), []
    groups = _tied_groups(records)
    if len(groups) < 2:
        raise UserError(
            f"cannot split {len(records)} pairs: all of them hang together through shared documents or queries, so any "
            "split would put one on both sides; add other documents or import the evaluation pairs by themselves"
        )
    wanted = max(1, round(eval_fraction * len(records)))
    ordered_names = sorted(groups, key=lambda name: hashlib.blake2b(f"{seed}\0{name}".encode()).digest())
    eval_rows: list[int] = []
    for name in ordered_names:
        with_group = len(eval_rows) + len(groups[name])
        if with_group < len(records) and abs(with_group - wanted) < abs(len(eval_rows) - wanted):
            eval_rows += groups[name]
    if 2 * len(eval_rows) < wanted:
        sizes = sorted(len(rows) for rows in groups.values())
        fitting = [size / len(records) for size in sizes if wanted < size <= len(records) / 2]
        raise UserError(
            f"cannot keep about {wanted} of {len(records)} pairs for evaluation: the largest groups of pairs tied by "
            f"shared documents or queries hold {', '.join(map(str, sizes[:-6:-1]))} pairs and must stay whole; "
            + (f"ask for a fraction of {fitting[0]:.2g}" if fitting else "import the evaluation pairs by themselves")
            + ", or add documents"
        )
    in_eval = set(eval_rows)
    return [row for row in range(len(records)) if row not in in_eval], sorted(eval_rows)


def key_for(number: int, name: str) -> str:
    """A key that `number` makes unique and `name` recognisable: `000012-Annual-report` for 12 and "Annual report"."""
    return f"{number:06d}-{re.sub('[^A-Za-z0-9_-]+', '-', name)[:70]}"


def normalised(query: str) -> str:
    """What makes two queries the same one: the text without regard to case and white space."""
    return " ".join(query.split()).casefold()


def _tied_groups(records: Sequence[Record]) -> dict[str, list[int]]:
    """Rows of each connected component of documents and queries, by the component's smallest document id."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for record in records:
        parent[root(("query", normalised(record.query)))] = root(("document", record.document))
    rows_of_root: dict[tuple[str, str], list[int]] = {}
    for row, record in enumerate(records):
        rows_of_root.setdefault(root(("document", record.document)), []).append(row)
    return {min(records[row].document for row in rows): rows for rows in rows_of_root.values()}


def _groups(pairs: Iterable[Pair], size: int) -> Iterator[Iterator[Pair]]:
    """Cut a stream into streams of `size`; each must be read to its end before the next."""
    iterator = iter(pairs)
    for first in iterator:
        yield chain((first,), islice(iterator, size - 1))


def _write_shard(pairs: Iterable[Pair], path: Path) -> Path:
    from webdataset import TarWriter  # imports torch, which the processes that only draw or render pages never need

    keys: set[str] = set()
    with path.open("wb") as stream, TarWriter(stream, user="", group="", encoder=False, mtime=0) as tar:
        for pair in pairs:
            if not pair.key or "." in pair.key or "/" in pair.key or pair.key in keys:
                raise UserError(
                    f"the key {pair.key!r} is empty, holds a dot or a slash, or comes twice in {path.name}, so its "
                    "pair could not be told from others; give each pair a key of its own"
                )
            if not pair.query.strip():
                raise UserError(f"pair {pair.key} has an empty query and cannot be trained on; leave it out")
            if pair.extension not in IMAGE_EXTENSIONS:
                raise UserError(
                    f"pair {pair.key} has the image extension {pair.extension!r}, which no reader of shards knows; use "
                    f"one of {', '.join(IMAGE_EXTENSIONS)}"
                )
            keys.add(pair.key)
            text = json.dumps({"query": pair.query, "document": pair.document}, ensure_ascii=False)
            tar.write({"__key__": pair.key, "json": text.encode(), pair.extension: pair.image})
    return path
