"""The lists of a global batch: each a query with its positive page, its hard negatives, and negatives of the batch.

The negatives of the batch are positives of other pairs. Nothing is sent for them: which they are follows from the
plan, so every rank knows the lists of all and reads the pages of its own.

Drawn at random for each list, they would scatter a rank's pages over the whole batch, and with four of them a rank
would read and encode almost five times as many pages as it has pairs. So the pairs of a batch stand in a ring, in an
order drawn anew for each step, and a list takes the pages of the pairs that follow its own. Each set of followers is as
likely as any other, no list has a page twice, and a rank, whose lists are an arc of the ring, meets but a few pages
beside its own. The ring knows nothing of ranks, so the lists do not depend on their number.

Where an embedder's similarities are given, a list takes the nearest pages of the batch, which may be anywhere: a rank
then reads and encodes up to one more page for each negative of its lists. All ranks work out the lists of all, and must
find the same, so the similarities have to be the same to the last bit.

A page that answers the query is never a negative of it, by content: not the pair's own positives, and not those of
other pairs that ask the same. Nor does a list hold the same content twice.

Shapes: G lists in the global batch, E entries of them all, laid end to end.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.plan import random_bits

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

Similarity = Callable[[Int64, Int64], Float32]
"""(pairs [n], input rows of documents [m]) -> how like each pair's query they are to an embedder: float32 [n, m], and
the same numbers on every rank, whatever else is asked for beside them."""

_MOST_SIMILARITIES = 1 << 24  # at once


@dataclass(frozen=True, eq=False)
class Lists:
    """All lists of a global batch, in the order of the ring.

    Attributes:
        pair_G: Pair rows.
        start_G1: Where each list begins among the entries, and where the last one ends.
        document_E: Input rows, the positive first in each list.
        teacher_E: Scores of a teacher, nan where there is none.
        in_batch_E: Whether the page is another pair's positive.
        left_out: Hard negatives that would have been positives of the query, or in the list twice.
    """

    pair_G: Int64
    start_G1: Int64
    document_E: Int64
    teacher_E: Float32
    in_batch_E: Bool
    left_out: int


def lists_of_step(
    order: Order,
    step: int,
    negatives: Negatives,
    *,
    num_hard: int | None,
    num_in_batch: int,
    similarity: Similarity | None = None,
) -> Lists:
    """The lists of a step, counted over all epochs: a function of the plan, the same on every rank.

    Args:
        num_hard: Most hard negatives of a list; None for all.
        num_in_batch: Negatives of the batch in each list; fewer where the batch has no more.
        similarity: Has the nearest pages of the batch taken, in place of those that follow on the ring.
    """
    index = order.index
    pair_G = ring_of(order, step)
    positive_G = order.positives(pair_G, order.schedule.epoch_of(step))
    hash_G = index.input_hash_I[positive_G]
    # Of the nearest some are answers, copies, or hard negatives of the list already.
    looked_at = 2 * num_in_batch + 16
    others_G = _next_on_ring(len(pair_G)) if similarity is None else _nearest(similarity, pair_G, positive_G, looked_at)
    documents: list[int] = []
    teachers: list[float] = []
    in_batch: list[bool] = []
    start_G1 = np.zeros(len(pair_G) + 1, np.int64)
    left_out = 0
    for place, (pair, others) in enumerate(zip(pair_G.tolist(), others_G, strict=True)):
        taken = set(index.positive_hashes_of_query(pair).tolist())
        documents.append(int(positive_G[place]))
        place_of_positive = int(np.flatnonzero(index.positives_of(pair) == documents[-1])[0])
        teachers.append(float(negatives.positive_teacher[index.positive_start_N1[pair] + place_of_positive]))
        hard = slice(*negatives.start_N1[pair : pair + 2].tolist())
        hard_rows, hard_teacher = negatives.rows[hard][:num_hard], negatives.teacher[hard][:num_hard]
        for row, teacher in zip(hard_rows.tolist(), hard_teacher.tolist(), strict=True):
            if (content := int(index.input_hash_I[row])) in taken:
                left_out += 1
                continue
            taken.add(content)
            documents.append(row)
            teachers.append(teacher)
        found = _first_new(others, hash_G, taken, num_in_batch)
        in_batch += [False] * (len(documents) - len(in_batch)) + [True] * len(found)
        documents += positive_G[found].tolist()
        teachers += [np.nan] * len(found)
        start_G1[place + 1] = len(documents)
    return Lists(
        pair_G,
        start_G1,
        np.array(documents, np.int64),
        np.array(teachers, np.float32),
        np.array(in_batch, np.bool_),
        left_out,
    )


def ring_of(order: Order, step: int) -> Int64:
    """Pair rows of a step's global batch in the order of its ring."""
    pair_G = order.global_batch(step)
    key_G = random_bits(f"{order.index.fingerprint}/{order.settings.seed}/{step}/ring", pair_G)
    return pair_G[np.argsort(key_G, kind="stable")]


def arc_of_rank(cost_G: Int64, rank: int, world_size: int) -> Int64:
    """Places on the ring of a rank's lists: an arc. Arcs differ by one list at most.

    The ring is turned, by less than an arc, so that the most expensive arc costs as little as it can.
    """
    lists = len(cost_G)
    sizes = np.full(world_size, lists // world_size) + (np.arange(world_size) < lists % world_size)
    starts = np.cumsum(sizes) - sizes
    before = np.append(0, np.cumsum(np.concatenate([cost_G, cost_G])))
    turns = np.arange(max(1, int(sizes.max(initial=0))))
    first_tw = turns[:, None] + starts
    cost_tw = before[first_tw + sizes] - before[first_tw]
    turn = int(np.argmin(cost_tw.max(axis=1)))
    return (turn + starts[rank] + np.arange(sizes[rank])) % max(lists, 1)


def _next_on_ring(lists: int) -> Iterator[Iterable[int]]:
    """Of each list the places of the others, as they follow."""
    for place in range(lists):
        yield chain(range(place + 1, lists), range(place))


def _nearest(similarity: Similarity, pair_G: Int64, positive_G: Int64, most: int) -> Iterator[Iterable[int]]:
    """Of each list all places, the most similar first, of equals the first; beyond ``most`` sorted when asked for."""
    k = min(most, len(pair_G))
    rows = max(1, _MOST_SIMILARITIES // len(pair_G))
    for first in range(0, len(pair_G), rows):
        score_nG = similarity(pair_G[first : first + rows], positive_G)
        least_n = torch.topk(torch.from_numpy(score_nG), k, dim=1, sorted=False).values.amin(dim=1).numpy()
        owner, place = np.nonzero(score_nG >= least_n[:, None])
        place = place[np.lexsort((place, -score_nG[owner, place], owner))]
        for score_G, near in zip(score_nG, np.split(place, np.flatnonzero(np.diff(owner)) + 1), strict=True):
            yield chain(near.tolist(), _further(score_G, len(near)))


def _further(score_G: Float32, nearer: int) -> Iterator[int]:
    yield from np.argsort(-score_G, kind="stable")[nearer:].tolist()


def _first_new(others: Iterable[int], hash_G: Int64, taken: set[int], most: int) -> list[int]:
    """The first of some places whose content is not taken yet; it is then."""
    found: list[int] = []
    for other in others:
        if len(found) == most:
            break
        if (content := int(hash_G[other])) not in taken:
            taken.add(content)
            found.append(int(other))
    return found
