"""Deal a global batch to ranks and cut a rank's part into mini-batches, by cost and before anything is decoded.

A step takes as long as its longest rank, and a mini-batch as much memory as its largest page. Both are known from the
index: an image's size gives the tokens it will cost, a text's length about those of a text. So pairs are dealt with the
most expensive first, each to the rank with the least so far (LPT; Graham 1969, SIAM J. Appl. Math. 17), among those
that have not got their share of pairs yet. Mini-batches are runs of inputs in order of their cost, so that hardly any
of what goes through the model is padding.

Everything here is a function of the index and the batch, the same on every rank.
"""

import heapq
from collections.abc import Callable

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
    dealt: list[list[int]] = [[] for _ in sizes]
    heap = [(0, hand) for hand, size in enumerate(sizes) if size]
    costs = cost_n.tolist()
    for place in np.argsort(-cost_n, kind="stable").tolist():
        cost, hand = heapq.heappop(heap)
        dealt[hand].append(place)
        if len(dealt[hand]) < sizes[hand]:
            heapq.heappush(heap, (cost + costs[place], hand))
    return [np.array(sorted(places), np.int64) for places in dealt]


def cut(cost_n: Int64, max_size: int | None, max_cost: int | None) -> list[Int64]:
    """Places 0 .. n - 1 in as few parts as possible that hold ``max_size`` places and ``max_cost`` at most, padded.

    A part's inputs are padded to its most expensive one, so a part is a run of places in falling order of their cost
    and costs its first times its length. One place that costs more than ``max_cost`` is a part by itself. Among the
    ways to make so few parts it is the one whose most expensive part is cheapest: parts of like cost take like time.
    """
    if len(cost_n) == 0:
        return []
    order_n = np.argsort(-cost_n, kind="stable")
    falling_n = np.maximum(cost_n[order_n], 1)
    most = int(falling_n[0]) * len(cost_n) if max_cost is None else max_cost
    starts = _runs(falling_n, max_size, most)
    # The cheapest bound that needs no more parts, by bisection: with a lower bound there are never fewer.
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if len(_runs(falling_n, max_size, middle)) == len(starts):
            high = middle
        else:
            low = middle
    return np.split(order_n, _runs(falling_n, max_size, high)[1:])


def _runs(falling_n: Int64, max_size: int | None, max_cost: int) -> list[int]:
    """Where the parts begin when each takes as many places as it may."""
    starts, start = [], 0
    while start < len(falling_n):
        starts.append(start)
        fits = max(1, max_cost // int(falling_n[start]))
        start += fits if max_size is None else min(fits, max_size)
    return starts
