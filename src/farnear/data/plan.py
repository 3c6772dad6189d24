"""The plan of an epoch: which pairs form which global batch, as a pure function.

Every rank has the same plan from the same few numbers: fingerprint of the index, seed, epoch, global batch size,
weights of the sources, mixing, tail and window. The number of ranks does not enter. A plan can be had of any epoch at
once, and with it any step, so a run is resumed by a step's number.

Each source is an endless stream of passes; a pass is its pairs in random order, and the schedule (see ``quotas``) says
which stretch of each stream a step shows. So every pair is shown exactly once a pass, also where a batch or an epoch
begins within one. Rows are ordered by a key each, splitmix64 of (fingerprint, seed, source, pass, row). numpy's own
generators are not used because their streams may change between numpy versions, and with them every resumed run. With
windows, a pass takes the shards of its source in random order, some at a time, and orders the pairs within those only,
so that the batches of a while come from few shards.

In-batch negatives go wrong when a batch holds a query or a page twice: the copy is a negative that is right. So at last
copies are parted by swaps between batches (see ``repair``); what cannot be parted is counted, and the loss masks it.

Shapes: N pairs, K sources, S steps of the epoch, G pairs in a global batch, X pairs shown in the epoch, a cell being
those of one source in one batch; n pairs of one source.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from farnear.data.quotas import Mixing, Schedule, Stretch, Tail, make_schedule
from farnear.data.ranges import ranges
from farnear.data.repair import Layout, part_copies, window_number
from farnear.errors import UserError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

ORDER_VERSION = 2
"""To be raised when the same facts and settings begin to give another order: plans kept on disk are not used then."""


@dataclass(frozen=True, eq=False)
class PairFacts:
    """What a plan needs to know of the pairs. ``fingerprint`` stands for all the rest.

    Sources lie one after the other: the rows of source k are ``source_start_K1[k] : source_start_K1[k + 1]``, at least
    one. The positive pages of row i are ``positive_start_N1[i] : positive_start_N1[i + 1]``, at least one.
    """

    fingerprint: str
    query_hash_N: Int64
    positive_hash: Int64  # content hashes of the positives of row 0, then of row 1, ...
    positive_start_N1: Int64
    shard_N: Int32  # number of the shard that holds the pages of the row
    source_start_K1: Int64


@dataclass(frozen=True)
class PlanSettings:
    """What the run file decides about the order."""

    seed: int
    global_batch_size: int
    weights: tuple[float, ...] | None = None  # one a source, of any sum; None weighs a source by its pairs
    mixing: Mixing = "within_batch"  # whether a batch mixes the sources or is of one
    tail: Tail = "carry"  # what becomes of the pairs at the end of a pass that fill no batch
    shards_per_window: int | None = None  # None: a source is shuffled as a whole


@dataclass(frozen=True, eq=False)
class Plan:
    """One epoch. Row ``s`` of ``rows_SG`` is the global batch of global step ``first_step + s``: rows of pairs, int64.

    -1 marks an empty slot; under tail ``pad`` there are some at the end of a batch that ends a pass.
    """

    epoch: int
    first_step: int
    rows_SG: Int64
    order_hash: str  # hash_rows of rows_SG
    moved: int  # pairs moved to another batch to keep a batch free of duplicates
    masked: int  # pairs left after one of the same query or page in their batch (masked by the loss)
    left_out: int  # pairs that tail ``drop`` cuts off from the passes that end in this epoch
    passes: tuple[float, ...]  # pairs shown of each source, divided by its pairs


def schedule_of(facts: PairFacts, settings: PlanSettings) -> Schedule:
    """The steps of every epoch, without any order. Raises ``UserError`` for settings that the pairs cannot satisfy."""
    return make_schedule(
        np.diff(facts.source_start_K1).tolist(),
        settings.weights,
        global_batch_size=settings.global_batch_size,
        mixing=settings.mixing,
        tail=settings.tail,
    )


def plan_epoch(facts: PairFacts, settings: PlanSettings, epoch: int) -> Plan:
    """Order the pairs of an epoch and part the copies of a query or a positive page.

    The result depends on the arguments only, bit for bit, on any machine. Raises ``UserError`` as ``schedule_of`` does.
    """
    if settings.shards_per_window is not None and settings.shards_per_window < 1:
        raise UserError(
            f"a window of {settings.shards_per_window} shards holds no pair; give 1 or more shards a window, or none "
            "to shuffle all of them together"
        )
    schedule = schedule_of(facts, settings)
    stretches = schedule.stretches(epoch)
    rows, window_X = _draw_rows(facts, settings, stretches)
    row_X = np.concatenate(rows)
    layout = _lay_out(stretches, [len(of_pass) for of_pass in rows], window_X, settings.global_batch_size)
    random_X = random_bits(f"{facts.fingerprint}/{settings.seed}/{epoch}/repair", np.arange(len(row_X)))
    item_X, moved, masked = part_copies(
        layout, facts.query_hash_N[row_X], _page_hashes(facts, settings.seed, epoch, row_X), random_X
    )
    first_step, stop_step = schedule.steps_before(epoch), schedule.steps_before(epoch + 1)
    rows_SG = np.full((stop_step - first_step, settings.global_batch_size), -1, np.int64)
    rows_SG.ravel()[layout.place_X] = row_X[item_X]
    return Plan(
        epoch=epoch,
        first_step=first_step,
        rows_SG=rows_SG,
        order_hash=hash_rows(rows_SG),
        moved=moved,
        masked=masked,
        left_out=schedule.left_out(epoch),
        passes=tuple(
            int((stretch.stop_C - stretch.start_C).sum()) / pairs
            for stretch, pairs in zip(stretches, schedule.pairs, strict=True)
        ),
    )


def plan_hash(plan: Plan) -> str:
    """A hex digest of the order, which ranks compare and a test pins. Known since the plan was made."""
    return plan.order_hash


def hash_rows(rows_SG: Int64) -> str:
    """A hex digest of an order: the same on any machine."""
    digest = hashlib.blake2b(f"{rows_SG.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(rows_SG, "<i8").data)
    return digest.hexdigest()


def drawn_positive(seed: int, epoch: int, rows: Int64, count_of_row: Int64) -> Int64:
    """Which of its positives each of ``rows`` shows in an epoch: a number from 0 to its count - 1 (below 2^32).

    Drawn by (seed, epoch, row) alone: whoever asks for a row, in whatever company, gets the same.
    """
    drawn = np.zeros(len(rows), np.int64)
    several = np.flatnonzero(count_of_row > 1)
    bits = random_bits(f"{seed}/{epoch}/positive", rows[several]) >> np.uint64(32)
    drawn[several] = (bits * count_of_row[several].astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    return drawn


def random_bits(name: str, index: Int64) -> UInt64:
    """Outputs number ``index`` (from 0) of splitmix64 (Steele, Lea, Flood; OOPSLA 2014) started at a hash of ``name``.

    Distinct indices have distinct outputs.
    """
    state = np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))
    word = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + state
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word


def _page_hashes(facts: PairFacts, seed: int, epoch: int, row_X: Int64) -> Int64:
    start_X = facts.positive_start_N1[row_X]
    count_X = facts.positive_start_N1[row_X + 1] - start_X
    return facts.positive_hash[start_X + drawn_positive(seed, epoch, row_X, count_X)]


def _draw_rows(facts: PairFacts, settings: PlanSettings, stretches: list[Stretch]) -> tuple[list[Int64], Int64]:
    """The rows that the stretches show, pass after pass and source after source, and the window of all of them."""
    rows: list[Int64] = []
    windows: list[Int64] = []
    for source, stretch in enumerate(stretches):
        pairs = int(facts.source_start_K1[source + 1] - facts.source_start_K1[source])
        size_C = stretch.stop_C - stretch.start_C
        position = ranges(stretch.start_C, size_C)
        for number in range(int(position[0]) // pairs, int(position[-1]) // pairs + 1) if len(position) else ():
            of_pass = slice(*np.searchsorted(position, (number * pairs, (number + 1) * pairs)))
            row_n, window_n = _pass_of_source(facts, settings, source, number)
            place = position[of_pass] - number * pairs
            windows.append(window_number(len(rows), window_n[place]))
            rows.append(row_n[place])
    return rows, np.concatenate(windows)


def _pass_of_source(facts: PairFacts, settings: PlanSettings, source: int, number: int) -> tuple[Int64, Int64]:
    """All rows of a source in the order of pass ``number``, and the window of each, counted from 0."""
    start, stop = facts.source_start_K1[source : source + 2].tolist()
    name = f"{facts.fingerprint}/{settings.seed}/{source}/{number}"
    key_n = random_bits(name, np.arange(stop - start))
    order_n = np.argsort(key_n, kind="stable").astype(np.int64, copy=False)
    if settings.shards_per_window is None:
        return start + order_n, np.zeros(len(order_n), np.int64)
    shards, shard_n = np.unique(facts.shard_N[start:stop], return_inverse=True)
    rank_of_shard = np.argsort(np.argsort(random_bits(f"{name}/shards", np.arange(len(shards))), kind="stable"))
    window_n = rank_of_shard[shard_n] // settings.shards_per_window
    order_n = order_n[np.argsort(window_n[order_n], kind="stable")]
    return start + order_n, window_n[order_n]


def _lay_out(stretches: list[Stretch], pairs_of_pass: list[int], window_X: Int64, global_batch_size: int) -> Layout:
    step_C = np.concatenate([stretch.step_C for stretch in stretches])
    size_C = np.concatenate([stretch.stop_C - stretch.start_C for stretch in stretches])
    cells = [len(stretch.step_C) for stretch in stretches]
    start_C1 = np.append(0, np.cumsum(size_C))
    number_X = np.arange(len(window_X)) - np.repeat(start_C1[:-1], size_C)
    step_X = np.repeat(step_C, size_C)
    if len(np.unique(step_C)) < len(step_C):
        # Sources alternate within a batch, so that every slice of it holds its share of each.
        even_X = np.argsort(step_X + (number_X + 0.5) / np.repeat(size_C, size_C), kind="stable")
        first_S = np.searchsorted(step_X[even_X], np.arange(step_C.max() + 1))
        number_X[even_X] = np.arange(len(even_X)) - first_S[step_X[even_X]]
    return Layout(
        global_batch_size=global_batch_size,
        place_X=step_X * global_batch_size + number_X,
        # A batch in which a pass ends and the next begins holds a cell of each.
        cell_start_C1=np.union1d(start_C1, np.cumsum(pairs_of_pass)),
        source_X=np.repeat(np.repeat(np.arange(len(stretches)), cells), size_C),
        window_X=window_X,
    )
