"""The plan of an epoch: which pairs form which global batch, as a pure function.

Every rank computes the same plan from the same few numbers (fingerprint of the index, seed, epoch, global batch size),
so nothing about the order needs to be stored or sent, any step can be reached at once, and the number of ranks does not
enter. Rows are ordered by a key each, splitmix64 of (fingerprint, seed, epoch, row). numpy's own generators are not
used because their streams may change between numpy versions, and with them every resumed run.

In-batch negatives go wrong when a batch holds a query or a page twice: the copy is a negative that is right. So after
the shuffle copies are parted by swaps between batches (see ``repair``); what cannot be parted is counted, and the loss
masks it.

Shapes: N pairs, S steps of the epoch, G pairs in a global batch.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from farnear.data.repair import part_copies

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Plan:
    """One epoch. Row ``s`` of ``rows_SG`` is the global batch of step ``s``: index rows of pairs, int64.

    Every pair stands in it exactly once. -1 marks an empty slot; those are at the end of the last batch only.
    """

    rows_SG: Int64
    moved: int  # pairs moved to another batch to keep a batch free of duplicates
    masked: int  # pairs left in a batch that holds their query or page already (masked by the loss)


def steps_per_epoch(pairs: int, global_batch_size: int) -> int:
    """Steps that show ``pairs`` pairs once; the last batch may be short."""
    return -(-pairs // global_batch_size)


def plan_epoch(
    query_hash_N: Int64, page_hash_N: Int64, *, fingerprint: str, seed: int, epoch: int, global_batch_size: int
) -> Plan:
    """Order the pairs of an epoch and part the copies of a query or a positive page.

    ``query_hash_N`` and ``page_hash_N`` (int64) say which pairs share a query or a positive page. The result depends on
    the arguments only, bit for bit, on any machine.
    """
    pairs = len(query_hash_N)
    steps = steps_per_epoch(pairs, global_batch_size)
    key_N = _random_keys(f"{fingerprint}/{seed}/{epoch}", pairs)
    order_N = np.argsort(key_N, kind="stable").astype(np.int64, copy=False)
    moved, masked = part_copies(order_N, query_hash_N, page_hash_N, key_N, global_batch_size)
    rows_SG = np.full(steps * global_batch_size, -1, np.int64)
    rows_SG[:pairs] = order_N
    return Plan(rows_SG.reshape(steps, global_batch_size), moved, masked)


def plan_hash(plan: Plan) -> str:
    """A hex digest of the order, for a test that must notice when any version of anything changes it."""
    return hashlib.blake2b(plan.rows_SG.astype("<i8").tobytes(), digest_size=16).hexdigest()


def slice_of_rank(row_G: Int64, rank: int, world_size: int) -> Int64:
    """The part of one global batch that ``rank`` trains on: contiguous, empty slots dropped.

    The slices of all ranks make up the batch and differ by one row at most; with more ranks than rows some are empty.
    """
    rows = row_G[row_G >= 0]
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]


def _random_keys(name: str, count: int) -> UInt64:
    """``count`` distinct 64-bit keys: splitmix64 (Steele, Lea, Flood; OOPSLA 2014) started at a hash of ``name``."""
    state = np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))
    key_N: UInt64 = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state
    key_N = (key_N ^ (key_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key_N = (key_N ^ (key_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key_N ^= key_N >> np.uint64(31)
    return key_N
