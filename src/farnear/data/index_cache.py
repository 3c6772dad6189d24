"""Scan once: scans and indexes are kept in a cache folder, and only shards that changed are read again.

    CACHE/scans/DIGEST.arrow          one shard's scan; the digest is of its path or URL, size, and mtime or etag
    CACHE/indexes/DIGEST/index.arrow  the scans of all shards joined; the digest is of theirs and of what is left out
    CACHE/indexes/DIGEST/...          what follows from an index is kept beside it: plans
    CACHE/shards/                     shards behind URLs

Shards are scanned by several processes; each stores what it found itself, so that an interrupted indexing goes on where
it stopped. An index is built under a lock by whoever comes first. Files are published by renaming, and every file can
be deleted at any time: it is made again.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path

from farnear.data.columns import DamagedFileError, open_columns, write_columns
from farnear.data.faults import WHOLE_SHARD, Fault
from farnear.data.index import Index, open_index, write_index
from farnear.data.join import MAX_IMAGE_PIXELS, Source, join_scans
from farnear.data.remote import shown
from farnear.data.scan import scan_shard
from farnear.data.scan_rows import ShardScan
from farnear.data.shard_jobs import run_jobs
from farnear.data.shard_store import ShardFacts, ShardStore
from farnear.errors import UserError
from farnear.files import locked
from farnear.wording import counted

SCAN_FORMAT = "farnear scan 5"
INDEX_FILE = "index.arrow"

ScanKey = tuple[str, bool]
"""A shard, and whether it is used as a corpus shard."""


@dataclass(frozen=True)
class SourceShards:
    """The shards of one source, and the corpus shards whose pages its pairs name."""

    name: str
    shards: tuple[str, ...]
    corpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardSet:
    """What an index is made of.

    Attributes:
        corpus: Shards of documents that the pairs of every source may name.
        exclude: (shard, key) of pairs to leave out.
        max_image_pixels: Larger images are left out.
    """

    sources: tuple[SourceShards, ...] = ()
    corpus: tuple[str, ...] = ()
    exclude: tuple[tuple[str, str], ...] = ()
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def shards(self) -> list[ScanKey]:
        """Every shard once in each of its uses: one of pairs can be a corpus shard too, for its pages."""
        corpus = [*self.corpus, *(shard for source in self.sources for shard in source.corpus)]
        pairs = [(shard, False) for source in self.sources for shard in source.shards]
        return list(dict.fromkeys([*pairs, *((shard, True) for shard in corpus)]))


def cache_folder(configured: str | None) -> Path:
    """``data.cache_dir``, else what FARNEAR_CACHE names, else ``~/.cache/farnear``."""
    folder = configured or os.environ.get("FARNEAR_CACHE") or "~/.cache/farnear"
    if "\0" in folder:
        raise UserError(f"the cache folder {folder!r} holds a zero byte, which no path can; correct it")
    return Path(os.path.expanduser(folder)).absolute()


def cached_index(shard_set: ShardSet, cache: Path, store: ShardStore, *, processes: int | None = None) -> Index:
    """The index of ``shard_set``, scanned and joined as far as it is not there yet.

    Raises:
        UserError: A shard cannot be read or holds nothing that can be used, or a key is used twice.
    """
    facts = shard_facts(shard_set, store)
    path = _index_path(shard_set, cache, facts)
    if index := _opened(path):
        return index
    with _writable(cache):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / "index.lock"):
            if index := _opened(path):
                return index
            scans = scan_shards(shard_set, facts, cache, store, processes=processes)
            refuse_useless(scans)
            write_index(joined(shard_set, scans, facts), path)
    return open_index(path)


def index_at_hand(shard_set: ShardSet, cache: Path, facts: dict[str, ShardFacts]) -> Index | None:
    """The index of ``shard_set`` if it is in the cache already."""
    return _opened(_index_path(shard_set, cache, facts))


def _index_path(shard_set: ShardSet, cache: Path, facts: dict[str, ShardFacts]) -> Path:
    digest = _digest([asdict(shard_set), [asdict(fact) for fact in facts.values()], SCAN_FORMAT])
    return cache / "indexes" / digest / INDEX_FILE


def joined(shard_set: ShardSet, scans: dict[ScanKey, ShardScan], facts: dict[str, ShardFacts]) -> Index:
    """The index of shards that have been scanned."""
    sources = []
    for source in shard_set.sources:
        pairs = tuple(scans[shard, False] for shard in source.shards)
        sources.append(Source(source.name, pairs, tuple(scans[shard, True] for shard in source.corpus)))
    return join_scans(
        sources,
        [scans[shard, True] for shard in shard_set.corpus],
        etags={shard: fact.etag for shard, fact in facts.items()},
        exclude=shard_set.exclude,
        max_image_pixels=shard_set.max_image_pixels,
    )


def shard_facts(shard_set: ShardSet, store: ShardStore) -> dict[str, ShardFacts]:
    """What tells each shard from the same one at another time."""
    return {shard: store.facts(shard) for shard, _ in shard_set.shards()}


def refuse_useless(scans: dict[ScanKey, ShardScan]) -> None:
    """Raise ``UserError`` for a shard that gives nothing at all: that is a wrong file and not a damaged one."""
    for (shard, is_corpus), scan in scans.items():
        if any(fault.kind in WHOLE_SHARD for fault in scan.faults):
            raise UserError(f"shard {scan.faults[0].detail}; write it again or take it out of the list")
        if len(scan.columns["corpus_key" if is_corpus else "pair_key"]):
            continue
        if scan.faults:
            fault = scan.faults[0]
            raise UserError(
                f"shard {shown(shard)} holds nothing that can be used: at byte {fault.offset} {fault.detail}"
                + (f" (and {counted(len(scan.faults) - 1, 'fault')} more)" if len(scan.faults) > 1 else "")
                + (
                    ""
                    if is_corpus
                    else "; a shard of pages without queries is a corpus shard (data.train_corpus, --corpus)"
                )
            )
        wanted = "KEY.png or another document" if is_corpus else "KEY.json or KEY.query.txt with KEY.png, .jpg or .webp"
        ignored = f" (ignored: {', '.join(scan.ignored_examples)})" if scan.ignored_examples else ""
        raise UserError(
            f"shard {shown(shard)} holds no {'page' if is_corpus else 'pair'}; its members must be named {wanted}, "
            f"with a KEY that holds no dot{ignored}"
        )


def scan_shards(
    shard_set: ShardSet,
    facts: dict[str, ShardFacts],
    cache: Path,
    store: ShardStore,
    *,
    processes: int | None = None,
) -> dict[ScanKey, ShardScan]:
    """The scan of each shard. What is not in the cache is scanned now, by as many processes as pay, with a bar."""
    folder = cache / "scans"
    path_of = {
        (shard, is_corpus): folder / f"{_digest([asdict(facts[shard]), is_corpus, SCAN_FORMAT])}.arrow"
        for shard, is_corpus in shard_set.shards()
    }
    scans = {key: _stored_scan(path) for key, path in path_of.items()}
    jobs = [((facts[key[0]], key[1], path_of[key]), facts[key[0]].size) for key, scan in scans.items() if scan is None]
    if jobs:
        folder.mkdir(parents=True, exist_ok=True)
        for (fact, is_corpus, path), _ in run_jobs(
            partial(_scan_and_store, store=store), jobs, "indexing shards", processes
        ):
            scans[fact.shard, is_corpus] = _stored_scan(path)
    found = {key: scan for key, scan in scans.items() if scan is not None}
    if len(found) < len(scans):
        raise UserError(f"scans vanished from {folder} while they were made; let nothing delete them, and start again")
    return found


def _scan_and_store(job: tuple[ShardFacts, bool, Path], store: ShardStore) -> None:
    facts, is_corpus, path = job
    try:
        with BufferedReader(store.open(facts.shard, facts), buffer_size=1 << 20) as file:
            scan = scan_shard(file, facts.shard, is_corpus)
    except OSError as error:
        raise UserError(
            f"shard {shown(facts.shard)} cannot be read ({error.strerror or error}); check its path and permissions"
        ) from None
    if scan.size != facts.size:
        raise UserError(f"shard {shown(facts.shard)} changed while it was scanned; try again when it is written")
    header = {
        "shard": scan.shard,
        "corpus": scan.corpus,
        "size": scan.size,
        "faults": [asdict(fault) for fault in scan.faults],
        "ignored_members": scan.ignored_members,
        "ignored_examples": scan.ignored_examples,
        "digest": scan.digest,
    }
    write_columns(path, scan.columns, header, SCAN_FORMAT)


def _stored_scan(path: Path) -> ShardScan | None:
    """The scan in a file, None where there is none or a torn one."""
    try:
        columns, header = open_columns(path, SCAN_FORMAT, check=True)
    except (FileNotFoundError, DamagedFileError):
        return None
    faults = tuple(Fault(**fault) for fault in header.pop("faults"))
    examples = tuple(header.pop("ignored_examples"))
    return ShardScan(**header, columns=columns, faults=faults, ignored_examples=examples)


def _opened(path: Path) -> Index | None:
    try:
        return open_index(path, check=True)
    except UserError:
        return None


def _digest(facts: Sequence[object]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {cache} cannot be written ({error.strerror or error}: {error.filename or cache}); check "
            "its permissions and the space on its disk, or name another one in data.cache_dir or FARNEAR_CACHE"
        ) from None
