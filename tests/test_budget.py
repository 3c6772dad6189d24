"""Dealing pairs and cutting mini-batches by cost: even, within bounds, the same everywhere."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_makers import index_of, pair_members, write_tar

from farnear.data.budget import cut, deal, input_cost

COSTS = st.lists(st.integers(1, 10_000), min_size=1, max_size=60).map(lambda costs: np.array(costs, np.int64))


@settings(deadline=None)
@given(COSTS, st.integers(1, 12))
def test_hands_take_every_place_once_and_differ_by_one_at_most(cost_n: np.ndarray, hands: int) -> None:
    dealt = deal(cost_n, hands)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(cost_n)))
    sizes = [len(places) for places in dealt]
    assert len(dealt) == hands and max(sizes) - min(sizes) <= 1
    assert all((np.diff(places) > 0).all() for places in dealt)


@settings(deadline=None)
@given(COSTS, st.none() | st.integers(1, 9), st.none() | st.integers(1, 30_000))
def test_mini_batches_keep_their_bounds(cost_n: np.ndarray, max_size: int | None, max_cost: int | None) -> None:
    parts = cut(cost_n, max_size, max_cost)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(cost_n)))
    for places in parts:
        assert 0 < len(places) <= (max_size or len(cost_n))
        assert max_cost is None or len(places) == 1 or cost_n[places].max() * len(places) <= max_cost
    if max_cost is None:
        assert len(parts) == (-(-len(cost_n) // max_size) if max_size else 1)
    # Sorted: nothing in a part is cheaper than anything in the next.
    assert all(cost_n[a].min() >= cost_n[b].max() for a, b in pairwise(parts))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9).map(np.array), st.integers(1, 4), st.integers(12, 40))
def test_no_other_way_to_cut_is_better(cost_n: np.ndarray, max_size: int, max_cost: int) -> None:
    def padded(parts: list[np.ndarray]) -> list[int]:
        return [int(part.max()) * len(part) for part in parts]

    falling = np.sort(cost_n)[::-1]
    ways = []
    for cuts in range(2 ** (len(falling) - 1)):
        parts = np.split(falling, [place + 1 for place in range(len(falling) - 1) if cuts >> place & 1])
        if all(len(part) <= max_size for part in parts) and max(padded(parts)) <= max_cost:
            ways.append((len(parts), max(padded(parts))))
    mine = [cost_n[places] for places in cut(cost_n, max_size, max_cost)]
    assert (len(mine), max(padded(mine))) == min(ways)


def test_costs_are_even() -> None:
    rng = np.random.default_rng(0)
    cost_n = np.sort(rng.choice([100, 400, 1600, 3600], size=512)).astype(np.int64)
    for hands in (2, 7, 8):
        loads = [cost_n[places].sum() for places in deal(cost_n, hands)]
        in_order = [cost_n[len(cost_n) * r // hands : len(cost_n) * (r + 1) // hands].sum() for r in range(hands)]
        assert max(loads) / np.mean(loads) < 1.01
        assert max(in_order) / np.mean(in_order) > 1.02  # what dealing in order gives


def test_little_of_a_mini_batch_is_padding() -> None:
    cost_n = np.random.default_rng(0).integers(50, 1500, 512)
    for parts in (cut(cost_n, 8, None), cut(cost_n, None, 4096)):
        padded = sum(int(cost_n[places].max()) * len(places) for places in parts)
        assert padded / cost_n.sum() < 1.05
    in_order = sum(int(cost_n[start : start + 8].max()) * 8 for start in range(0, 512, 8))
    assert in_order / cost_n.sum() > 1.5
    # With room for as many tokens in each, all take about as long.
    loads = [int(cost_n[places].max()) * len(places) for places in cut(cost_n, None, 8192)]
    assert min(loads) / max(loads) > 0.7


def test_nothing_is_cut_into_nothing() -> None:
    assert cut(np.zeros(0, np.int64), 4, None) == []
    assert [len(places) for places in deal(np.ones(2, np.int64), 4)] == [1, 1, 0, 0]


def test_the_cost_of_an_input_comes_from_the_index(tmp_path: Path) -> None:
    members = [*pair_members("a", "x" * 400, 1), *pair_members("b", "y", 2, [3]), ("b.txt", b"z" * 80)]
    index = index_of([write_tar(tmp_path / "a.tar", members)])

    def page_tokens(width: np.ndarray, height: np.ndarray) -> np.ndarray:
        return width * 1000 + height

    of_queries = input_cost(index, index.query_N, page_tokens)
    assert of_queries[0] - of_queries[1] == (len('{"query": ""}') + 400) // 4 - (len('{"query": ""}') + 1) // 4
    of_documents = input_cost(index, np.concatenate([index.positives, index.negatives]), page_tokens)
    # 6 x 4 pixels each; the second document has 80 bytes of text beside its page.
    assert (of_documents - of_documents[0]).tolist() == [0, 20, 0]
    assert of_documents[0] - 6004 == of_queries[1] - (len('{"query": ""}') + 1) // 4
