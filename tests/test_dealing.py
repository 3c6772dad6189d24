"""The way from a plan to ranks: every pair of every global batch on one rank, whatever the numbers are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_makers import image_bytes, index_of, write_tar

from farnear.data.dealing import SIDES, Dealing
from farnear.data.index import Index
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.errors import UserError

SOURCES = (31, 17, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def indexes(folder: Path) -> dict[int, Index]:
    """By number of sources: pairs of three shards, whose pages differ in size and in their hard negatives."""
    corpus = write_tar(folder / "corpus.tar", [(f"p{number}.png", image_bytes(number)) for number in range(60)])
    shards = []
    for source, pairs in enumerate(SOURCES):
        first = sum(SOURCES[:source])
        members = []
        for pair in range(first, first + pairs):
            negatives = [f"p{(pair + step) % 60}" for step in range(1, 1 + pair % 4)]
            record = {"query": f"query {pair} " + "word " * (pair % 50), "pos_id": f"p{pair}", "neg_ids": negatives}
            members.append((f"k{pair:02d}.json", json.dumps(record).encode()))
        shards.append(write_tar(folder / f"source-{source}.tar", members))
    return {1: index_of(shards, corpus=[corpus]), 3: index_of(*[[shard] for shard in shards], corpus=[corpus])}


def page_tokens(width: Any, height: Any) -> Any:
    return width * height


@settings(deadline=None, max_examples=60)
@given(
    sources=st.sampled_from([1, 3]),
    batch=st.integers(2, 20),
    world_size=st.integers(1, 9),
    tail=st.sampled_from(["carry", "pad", "drop"]),
    mixing=st.sampled_from(["within_batch", "per_batch"]),
    mini_batch=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_ranks_share_every_pair_of_every_step_once(
    folder: Path,
    indexes: dict[int, Index],
    sources: int,
    batch: int,
    world_size: int,
    tail: Any,
    mixing: Any,
    mini_batch: int,
    seed: int,
) -> None:
    index = indexes[sources]
    plan_settings = PlanSettings(seed, batch, mixing=mixing, tail=tail)
    try:
        order = Order(index, plan_settings, folder)
    except UserError as error:  # a source that cannot fill a batch
        assert sources == 3 and "global_batch_size" in str(error)
        return
    ranks = [
        Dealing(
            rank=rank, world_size=world_size, page_tokens=page_tokens, mini_batch_size=dict.fromkeys(SIDES, mini_batch)
        )
        for rank in range(world_size)
    ]
    shown = np.zeros(len(index), np.int64)
    for step in range(order.schedule.steps_before(2)):
        pairs_G = order.global_batch(step)
        slices = [rank.slice_of(order, step) for rank in ranks]
        own = [one.pairs_b for one in slices if not one.borrowed]
        assert sorted(np.concatenate(own).tolist()) == sorted(pairs_G.tolist())
        assert max(map(len, own)) - min(map(len, own)) <= 1 and len(own) == min(world_size, len(pairs_G))
        np.add.at(shown, pairs_G, 1)
        for one in slices:
            expected = [index.positives_of(pair)[0] for pair in one.pairs_b]
            if not one.borrowed:
                expected += [row for pair in one.pairs_b for row in index.negatives_of(pair)]
            assert one.documents_p.tolist() == expected
            assert one.owner_p.tolist()[: len(one.pairs_b)] == list(range(len(one.pairs_b)))
            for side, rows in (("document", one.documents_p), ("query", index.query_N[one.pairs_b])):
                places = np.concatenate([positions for job, positions in one.jobs if job.side == side])
                assert sorted(places.tolist()) == list(range(len(rows)))
                for job, positions in one.jobs:
                    assert job.side != side or (
                        job.rows.tolist() == rows[positions].tolist() and len(positions) <= mini_batch
                    )
    if sources == 1:
        assert shown.max() <= 2
        assert shown.sum() == {"carry": 2 * 57 // batch * batch, "pad": 2 * 57, "drop": 57 // batch * batch * 2}[tail]
