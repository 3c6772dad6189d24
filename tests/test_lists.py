"""Lists of a global batch: a function of the plan, and nothing in them that answers the query but the positive."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farnear.data import lists as lists_module
from farnear.data.index import Index
from farnear.data.index_cache import ShardSet, SourceShards, cached_index
from farnear.data.list_dealing import ListDealing
from farnear.data.lists import arc_of_rank, lists_of_step
from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import ShardStore


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """40 pairs; queries and pages come again, and hard negatives are at times other pairs' positives."""
    folder = tmp_path_factory.mktemp("lists")
    random = np.random.default_rng(0)
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for pair in range(40):
            members = {
                "json": json.dumps({"query": f"Query {random.integers(12)}"}).encode(),
                "txt": f"page {random.integers(20)}".encode(),
                **{f"neg{n}.txt": f"page {random.integers(20)}".encode() for n in range(random.integers(3))},
            }
            for name, data in members.items():
                info = tarfile.TarInfo(f"{pair:03d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    store = ShardStore(ShardCache(folder / "shards"))
    return cached_index(ShardSet((SourceShards("a", (str(folder / "train-0.tar"),)),)), folder / "cache", store)


def order_of(index: Index, batch: int, seed: int, tmp_path: Path) -> Order:
    return Order(index, PlanSettings(seed=seed, global_batch_size=batch, tail="pad"), tmp_path / "plans")


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(2, 40), seed=st.integers(0, 9), in_batch=st.integers(0, 6), top=st.booleans())
def test_no_negative_is_ever_an_answer_and_no_content_comes_twice(
    index: Index, tmp_path_factory: pytest.TempPathFactory, batch: int, seed: int, in_batch: int, top: bool
) -> None:
    order = order_of(index, batch, seed, tmp_path_factory.getbasetemp())

    def similarity(pairs: np.ndarray, documents: np.ndarray) -> np.ndarray:
        # Many are equal.
        return np.round(2 * np.cos(pairs[:, None] * 1.7 + documents[None])).astype(np.float32)

    lists = lists_of_step(
        order,
        0,
        Negatives.of_index(index),
        num_hard=None,
        num_in_batch=in_batch,
        similarity=similarity if top else None,
    )
    assert sorted(lists.pair_G.tolist()) == sorted(order.global_batch(0).tolist())
    for place, pair in enumerate(lists.pair_G.tolist()):
        entries = slice(*lists.start_G1[place : place + 2].tolist())
        contents = index.input_hash_I[lists.document_E[entries]].tolist()
        answers = set(index.positive_hashes_of_query(pair).tolist())
        assert contents[0] in answers and not answers & set(contents[1:])
        assert len(set(contents)) == len(contents)
        assert int(lists.in_batch_E[entries].sum()) <= in_batch
        if top:
            assert lists.document_E[entries][lists.in_batch_E[entries]].tolist() == nearest(
                lists, order, place, similarity, in_batch
            )


def nearest(lists: Any, order: Order, place: int, similarity: Any, most: int) -> list[int]:
    """The negatives of the batch of one list, by sorting them all."""
    index, found, pair_G = order.index, [], lists.pair_G
    positives = order.positives(pair_G, 0)
    entries = slice(*lists.start_G1[place : place + 2].tolist())
    is_hard = ~lists.in_batch_E[entries]
    used = set(index.input_hash_I[lists.document_E[entries][is_hard]].tolist())
    used |= set(index.positive_hashes_of_query(int(pair_G[place])).tolist())
    score = similarity(pair_G[[place]], positives)[0]
    for other in sorted(range(len(pair_G)), key=lambda one: (-score[one], one)):
        content = int(index.input_hash_I[positives[other]])
        if content not in used and len(found) < most:
            used.add(content)
            found.append(int(positives[other]))
    return found


def test_far_more_than_are_wanted_may_be_answers(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at in blocks of one row, of which the nearest alone is known at first."""
    order = order_of(index, 40, 1, tmp_path)

    def similarity(pairs: np.ndarray, documents: np.ndarray) -> np.ndarray:
        answers = [index.positive_hashes_of_query(int(pair)) for pair in pairs]
        return np.stack([np.isin(index.input_hash_I[documents], own) for own in answers]).astype(np.float32)

    def found() -> Any:
        return lists_of_step(order, 0, Negatives.of_index(index), num_hard=0, num_in_batch=5, similarity=similarity)

    whole = found()
    assert int(whole.in_batch_E.sum()) == 5 * 40
    monkeypatch.setattr(lists_module, "_MOST_SIMILARITIES", 1)
    real = lists_module._nearest
    monkeypatch.setattr(lists_module, "_nearest", lambda *of: real(*of[:3], 1))
    np.testing.assert_array_equal(found().document_E, whole.document_E)


@pytest.mark.parametrize("whole", [True, False])
def test_ranks_share_the_lists_whatever_their_number(index: Index, tmp_path: Path, whole: bool) -> None:
    order = order_of(index, 24, 3, tmp_path)

    def shares(world_size: int) -> list[tuple[int, tuple[int, ...]]]:
        found = []
        for rank in range(world_size):
            share = ListDealing(
                rank=rank,
                world_size=world_size,
                page_tokens=lambda width, height: width * height,
                mini_batch_size={"document": 3, "pair": 20 if whole else 2},
                mini_batch_num_tokens={"document": None, "pair": None},
                negatives=Negatives.of_index(index),
                num_hard=None,
                num_in_batch=3,
            ).slice_of(order, 0)
            assert share.whole_lists == whole
            # Every entry goes through the model once, and its page is prepared once.
            assert sorted(np.concatenate(share.turns).tolist()) == list(range(len(share.list_e)))
            assert sorted(np.concatenate([e for _, e in share.jobs]).tolist()) == list(range(len(share.list_e)))
            rows = np.concatenate([np.unique(share.document_e[e]) for _, e in share.jobs])
            assert len(set(rows.tolist())) == len(rows)
            for turn in share.turns if whole else ():
                assert all(
                    (share.list_e == one).sum() == (share.list_e[turn] == one).sum() for one in share.list_e[turn]
                )
            for place, pair in enumerate(share.pairs_b.tolist()):
                found.append((pair, tuple(share.document_e[share.list_e == place].tolist())))
        return sorted(found)

    assert shares(1) == shares(2) == shares(5)


def test_a_rank_meets_few_pages_beside_its_own(index: Index, tmp_path: Path) -> None:
    order = order_of(index, 40, 1, tmp_path)
    lists = lists_of_step(order, 0, Negatives.of_index(index), num_hard=0, num_in_batch=3)
    arc = arc_of_rank(np.ones(len(lists.pair_G), np.int64), 1, 4)
    of_rank = {int(r) for g in arc for r in lists.document_E[lists.start_G1[g] : lists.start_G1[g + 1]]}
    assert len(arc) == 10 and len(of_rank) < 20


def test_arcs_differ_by_one_list_and_the_ring_is_turned_to_even_their_cost() -> None:
    cost = np.array([9, 1, 1, 1, 9, 1, 1], np.int64)
    arcs = [arc_of_rank(cost, rank, 3) for rank in range(3)]
    assert sorted(np.concatenate(arcs).tolist()) == list(range(7))
    assert sorted(map(len, arcs)) == [2, 2, 3]
    assert max(int(cost[arc].sum()) for arc in arcs) < 18
    cost = np.array([1, 1, 9, 9, 1, 1], np.int64)  # not turned, the two dear ones are one rank's
    assert max(int(cost[arc_of_rank(cost, rank, 3)].sum()) for rank in range(3)) == 10
