"""Read everything again: are the bytes those that were indexed, and can every image be decoded?

Indexing reads the header of an image and no more, and it does not look at a shard again whose size and time of change
are the same. So a disk that forgets, or a page that ends in the middle, is noticed when the pair's turn comes. This
looks before, in several processes, and takes as long as reading and decoding all shards once.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from farnear.data.faults import Fault
from farnear.data.index import Index
from farnear.data.index_cache import ShardSet, cached_index
from farnear.data.media import decode_image, reason_of
from farnear.data.remote import shown
from farnear.data.sample import IMAGE, hash_bytes
from farnear.data.shard_jobs import run_jobs
from farnear.data.shard_store import ShardFacts, ShardStore
from farnear.data.tarwalk import Break, NotATarError, walk_members
from farnear.errors import UserError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Verified:
    """``faults`` that were found beside those of the index, and the rows of the ``lost`` pairs that they cost."""

    index: Index
    faults: tuple[Fault, ...]
    lost: tuple[int, ...]


def verify_shards(shard_set: ShardSet, cache: Path, store: ShardStore, *, processes: int | None = None) -> Verified:
    """Read what the index of ``shard_set`` refers to, and look for what is wrong beside the faults that it has: bytes
    that changed, images that cannot be decoded, damage to the archives themselves since they were indexed.

    A pair is counted as lost by the first part of it that is bad, be it of a hard negative. What belongs to left out
    pairs only is not looked at. Errors as ``cached_index``, and as ``run_jobs``.
    """
    index = cached_index(shard_set, cache, store, processes=processes)
    used = np.flatnonzero(
        index.is_part_of(np.concatenate([index.query_N, index.positives, index.negatives, index.corpus_C]))
    )
    # Parts lie shard after shard.
    rows_S = np.split(used, np.searchsorted(index.part_shard_M[used], np.arange(1, len(index.shards))))
    size_of_shard: dict[str, int] = {}
    rows_of_shard: dict[str, list[Int64]] = defaultdict(list)
    for shard, size, rows in zip(index.shards, index.shard_size_S.tolist(), rows_S, strict=True):
        size_of_shard[shard] = size
        rows_of_shard[shard].append(rows)  # twice where it is a shard of pairs and of documents
    jobs = [((shard, np.concatenate(rows)), size_of_shard[shard]) for shard, rows in rows_of_shard.items()]
    check = partial(_verify_shard, index=index, store=store)
    bad = [one for _, found in run_jobs(check, jobs, "verifying shards", processes) for one in found]
    faults, lost = _with_lost_pairs(index, sorted(bad, key=lambda one: (one[0].shard, one[0].offset)))
    return Verified(index, faults, lost)


_Bad = tuple[Fault, list[int]]
"""A fault, and the part rows that it is about."""


def _verify_shard(job: tuple[str, Int64], index: Index, store: ShardStore) -> list[_Bad]:
    """What is wrong with a shard and with those part rows of it that are used."""
    shard, used = job
    number = index.shards.index(shard)
    facts = ShardFacts(shard, int(index.shard_size_S[number]), index.etags[number])
    rows_of_place: dict[int, list[int]] = defaultdict(list)
    for row in used.tolist():
        rows_of_place[int(index.part_offset_M[row])].append(row)
    bad: list[_Bad] = []
    try:
        with BufferedReader(store.open(shard, facts), buffer_size=1 << 20) as file:
            for offset, rows in sorted(rows_of_place.items()):
                size = int(index.part_size_M[rows[0]])
                if wrong := _wrong_with(os.pread(file.fileno(), size, offset), index, rows[0]):
                    bad.append((Fault(shard, offset, *wrong, 0), rows))
            known = {(fault.shard, fault.offset, fault.kind) for fault in index.faults}
            for one in _breaks(file):
                if (shard, one.offset, one.kind) not in known:
                    bad.append((Fault(shard, one.offset, one.kind, one.detail, 0), []))
    except OSError as error:
        raise UserError(
            f"shard {shown(shard)} cannot be read ({error.strerror or error}); check its path and its disk"
        ) from None
    return bad


def _wrong_with(data: bytes, index: Index, part: int) -> tuple[str, str] | None:
    name = index.part_name[part]
    if hash_bytes(data) != index.part_hash_M[part]:
        return "changed", f"{name!r} has other bytes than when it was indexed"
    if index.part_kind_M[part] == IMAGE:
        try:
            decode_image(data)
        except MemoryError:
            raise
        except Exception as error:  # on broken bytes Pillow's decoders raise almost anything
            return "undecodable", f"{name!r}: {reason_of(error)}"
    return None


def _breaks(file: BinaryIO) -> Iterator[Break]:
    file.seek(0)
    try:
        yield from (found for found in walk_members(file) if isinstance(found, Break))
    except NotATarError as error:
        yield Break(0, error.kind, str(error))


def _with_lost_pairs(index: Index, bad: Sequence[_Bad]) -> tuple[tuple[Fault, ...], tuple[int, ...]]:
    """The faults with the number of pairs that each costs, and these pairs."""
    input_M = np.repeat(np.arange(len(index.input_hash_I)), np.diff(index.part_start_I1))
    row_of_use, pair_of_use = _uses(index)
    order = np.argsort(row_of_use, kind="stable")
    faults: list[Fault] = []
    lost: set[int] = set()
    for fault, parts in bad:
        pairs: set[int] = set()
        for row in np.unique(input_M[parts]).tolist() if parts else ():
            first, last = np.searchsorted(row_of_use, [row, row + 1], sorter=order)
            pairs.update(pair_of_use[order[first:last]].tolist())
        faults.append(replace(fault, pairs_lost=len(pairs - lost)))
        lost |= pairs
    return tuple(faults), tuple(sorted(lost))


def _uses(index: Index) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(input row, pair) for each query, positive and negative of each pair."""
    pairs = np.arange(len(index))
    rows = np.concatenate([index.query_N, index.positives, index.negatives])
    of_positives = np.repeat(pairs, np.diff(index.positive_start_N1))
    of_negatives = np.repeat(pairs, np.diff(index.negative_start_N1))
    return rows, np.concatenate([pairs, of_positives, of_negatives])
