"""Deal a global batch to ranks and cut a rank's part into mini-batches, by cost and before anything is decoded.

A step takes as long as its longest rank, and a mini-batch as much memory as its largest page. Both are known from the
index: an image's size gives the tokens it will cost, a text's length about those of a text. So pairs are dealt with the
most expensive first, each to the rank with the least so far (LPT; Graham 1969, SIAM J. Appl. Math. 17), among those
that have not got their share of pairs yet. The same rule cuts a rank's documents into mini-batches of equal cost.

Everything here is a function of the index and the batch, the same on every rank.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from farnear.data.index import Index
from farnear.data.ranges import ranges
from farnear.data.sample import AUDIO, IMAGE, VIDEO

Int64 = npt.NDArray[np.int64]

PageTokens = Callable[[Int64, Int64], Int64]
"""(width, height) in pixels -> tokens of the language model; see ``farnear.model.pixels.page_tokens``."""

_BYTES_PER_TEXT_TOKEN = 4
_BYTES_PER_MEDIA_TOKEN = 1000
_TOKENS_OF_TEMPLATE = 16


def input_cost(index: Index, rows: Int64, page_tokens: PageTokens) -> Int64:
    """Tokens that each input will cost, about: exact for images, by the bytes for everything else. int64 [n]."""
    start, stop = index.part_start_I1[rows], index.part_start_I1[rows + 1]
    counts = stop - start
    part = ranges(start, counts)
    kind, size = index.part_kind_M[part], index.part_size_M[part]
    cost = size // _BYTES_PER_TEXT_TOKEN
    is_image = kind == IMAGE
    cost[is_image] = page_tokens(
        index.part_width_M[part][is_image].astype(np.int64), index.part_height_M[part][is_image].astype(np.int64)
    )
    is_media = (kind == AUDIO) | (kind == VIDEO)
    cost[is_media] = size[is_media] // _BYTES_PER_MEDIA_TOKEN
    owner = np.repeat(np.arange(len(rows)), counts)
    return np.bincount(owner, cost, minlength=len(rows)).astype(np.int64) + _TOKENS_OF_TEMPLATE


def deal(cost_n: Int64, hands: int) -> list[Int64]:
    """Places 0 .. n - 1 in ``hands`` parts of even cost whose lengths differ by one at most, each in rising order."""
    sizes = [len(cost_n) // hands + (hand < len(cost_n) % hands) for hand in range(hands)]
    return _dealt(cost_n, sizes)


def cut(cost_n: Int64, max_size: int, max_cost: int | None) -> list[Int64]:
    """Places 0 .. n - 1 in few parts of even cost that hold ``max_size`` places and ``max_cost`` at most.

    One place that costs more than ``max_cost`` is a part by itself. Parts are in rising order of their first place.
    """
    if len(cost_n) == 0:
        return []
    parts = -(-len(cost_n) // max_size)
    if max_cost:
        # No two that cost more than half of it share a part.
        parts = max(parts, -(-int(cost_n.sum()) // max_cost), int(np.count_nonzero(2 * cost_n > max_cost)))
    while True:
        parts = min(parts, len(cost_n))
        cuts = _dealt(cost_n, [max_size] * parts)
        fits = max_cost is None or all(len(places) < 2 or cost_n[places].sum() <= max_cost for places in cuts)
        if fits or parts >= len(cost_n):
            return sorted((places for places in cuts if len(places)), key=lambda places: int(places[0]))
        parts += max(1, parts // 32)  # one more at a time would make the work grow with the square of n


def _dealt(cost_n: Int64, sizes: Sequence[int]) -> list[Int64]:
    """Give each place, the most expensive first, to the hand with the least cost that has room left."""
    hands: list[list[int]] = [[] for _ in sizes]
    heap = [(0, hand) for hand, size in enumerate(sizes) if size]
    costs = cost_n.tolist()
    for place in np.argsort(-cost_n, kind="stable").tolist():
        cost, hand = heapq.heappop(heap)
        hands[hand].append(place)
        if len(hands[hand]) < sizes[hand]:
            heapq.heappush(heap, (cost + costs[place], hand))
    return [np.array(sorted(places), np.int64) for places in hands]
