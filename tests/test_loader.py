"""The loader: each rank's mini-batches of any step, in order, whatever the workers do."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tar_makers import number_of_image, pair_members, write_pairs, write_tar

from farnear.data.index import Index, build_index
from farnear.data.loader import RankBatch, TrainLoader, load_features
from farnear.data.read import PairReader
from farnear.errors import UserError


def no_children() -> bool:
    return multiprocessing.active_children() == []


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> Iterator[None]:
    yield
    assert no_children()


def preprocess(inputs: list[Any], side: str) -> dict[str, Any]:
    """Features that tell what came in: the number of each query or page, and the process that worked on it."""
    numbers = [int(text.split()[1]) for text in inputs] if side == "query" else [number_of_image(i) for i in inputs]
    return {"numbers": torch.tensor(numbers), "side": side, "texts": list(map(str, numbers)), "pid": os.getpid()}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """53 pairs over 4 shards, two of a page, with 0, 1, 2, 0, 1, ... hard negatives."""
    folder = tmp_path_factory.mktemp("shards")
    return build_index(write_pairs(folder, 53, 4, negatives_of_pair=2, copies_of_page=2))


def loader_of(index: Index, **changes: Any) -> TrainLoader:
    options: dict[str, Any] = {
        "preprocess": preprocess,
        "seed": 1,
        "global_batch_size": 8,
        "mini_batch_size": 3,
        "num_negatives": None,
        "rank": 0,
        "world_size": 1,
        "num_workers": 0,
    }
    return TrainLoader(index, **(options | changes))


def numbers_of(batch: RankBatch, side: str) -> list[int]:
    return [number for mini in batch.mini_batches if mini.side == side for number in mini.features["numbers"].tolist()]


def expected_negatives(pairs: list[int], most: int | None) -> list[int]:
    return [10_000 + pair * 10 + number for pair in pairs for number in range(pair % 3)[:most]]


def content(batch: RankBatch) -> tuple[Any, ...]:
    """All of a batch except the time and the worker."""
    minis = [(mini.side, mini.rows, mini.features["texts"]) for mini in batch.mini_batches]
    arrays = [getattr(batch, name).tolist() for name in ("pairs_b", "valid_b", "query_hash_b", "page_hash_p")]
    return batch.step, batch.epoch, arrays, minis


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("most", [None, 0, 1])
def test_a_batch_holds_its_pairs_then_their_negatives(index: Index, num_workers: int, most: int | None) -> None:
    loader = loader_of(index, num_workers=num_workers, num_negatives=most)
    assert loader.steps_per_epoch == 7
    seen: list[int] = []
    for batch in loader.batches(0, 7):
        pairs = batch.pairs_b.tolist()
        seen += pairs
        assert numbers_of(batch, "query") == pairs
        pages = [pair // 2 for pair in pairs] + expected_negatives(pairs, most)
        assert numbers_of(batch, "document") == pages
        assert batch.valid_b.all() and len(batch.valid_b) == len(pairs)
        assert batch.query_hash_b.tolist() == index.query_hash_N[pairs].tolist()
        assert batch.page_hash_p[: len(pairs)].tolist() == index.page_hash_P[index.positive_N[pairs]].tolist()
        assert len(batch.page_hash_p) == len(pages) and len(set(batch.page_hash_p.tolist())) == len(pages)
        for side, rows in (("query", len(pairs)), ("document", len(pages))):
            slices = [mini.rows for mini in batch.mini_batches if mini.side == side]
            assert slices == [slice(start, min(start + 3, rows)) for start in range(0, rows, 3)]
        sides = [mini.side for mini in batch.mini_batches]
        assert sides == sorted(sides)  # "document" before "query"
        assert batch.seconds_waited >= 0
    assert sorted(seen) == list(range(53))


def test_ranks_share_the_same_global_batches(index: Index) -> None:
    whole = [batch.pairs_b.tolist() for batch in loader_of(index).batches(0, 9)]
    assert len(set(whole[0])) == 8 and whole[7] != whole[0]
    for world_size in (2, 3):
        ranks = [loader_of(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, parts in enumerate(zip(*(rank.batches(0, 9) for rank in ranks), strict=True)):
            assert np.concatenate([part.pairs_b for part in parts]).tolist() == whole[step]
            assert all(part.step == step and part.epoch == step // 7 for part in parts)


def test_a_rank_without_rows_borrows_one_that_does_not_count(index: Index) -> None:
    """53 pairs leave 5 for the last step: with 8 ranks, three get none."""
    ranks = [loader_of(index, rank=rank, world_size=8) for rank in range(8)]
    parts = [next(rank.batches(6, 7)) for rank in ranks]
    row_G = ranks[0].plan(0).rows_SG[6]
    assert [int(part.valid_b.sum()) for part in parts] == [0, 1, 0, 1, 1, 0, 1, 1]
    assert [part.pairs_b[0] for part in parts if part.valid_b.all()] == row_G[:5].tolist()
    for part in parts:
        assert len(part.pairs_b) == 1 and {mini.side for mini in part.mini_batches} == {"query", "document"}
        if not part.valid_b.any():
            assert part.pairs_b[0] == row_G[0] and len(part.page_hash_p) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_any_step_gives_the_same_batches(index: Index, num_workers: int) -> None:
    whole = [content(batch) for batch in loader_of(index, num_workers=num_workers).batches(0, 16)]
    for first, last in ((5, 9), (6, 16), (7, 8), (14, 16)):
        resumed = [content(batch) for batch in loader_of(index, num_workers=num_workers).batches(first, last)]
        assert resumed == whole[first:last]
    assert list(loader_of(index, num_workers=num_workers).batches(3, 3)) == []


def test_reaching_a_step_reads_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read_query = PairReader.query
    monkeypatch.setattr(PairReader, "query", lambda reader, pair: reads.append(pair) or read_query(reader, pair))
    batch = next(loader_of(index).batches(7 * 10_000 + 3, 7 * 10_000 + 4))
    assert batch.epoch == 10_000 and reads == batch.pairs_b.tolist()


def test_a_plan_is_made_once_an_epoch(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    from farnear.data import loader as loader_module

    epochs: list[int] = []
    plan_epoch = loader_module.plan_epoch

    def counted(*arguments: Any, epoch: int, **rest: Any) -> Any:
        epochs.append(epoch)
        return plan_epoch(*arguments, epoch=epoch, **rest)

    monkeypatch.setattr(loader_module, "plan_epoch", counted)
    loader = loader_of(index, num_workers=2)
    assert len(list(loader.batches(0, 21))) == 21
    assert epochs == [0, 1, 2]
    assert loader.plan(2) is loader.plan(2)


def test_keys_name_the_whole_global_batch(index: Index) -> None:
    loader = loader_of(index, rank=1, world_size=2)
    row_G = loader.plan(1).rows_SG[6]
    keys = loader.keys_of_batch(13)
    assert keys == [index.pair_id(row) for row in row_G[row_G >= 0]]
    assert len(keys) == 5 and all(key.startswith("part-00") and "/k000" in key for key in keys)


def test_all_workers_are_busy_within_one_step(index: Index) -> None:
    loader = loader_of(index, num_workers=2, global_batch_size=24, mini_batch_size=2)
    batch = next(loader.batches(0, 1))
    assert len({mini.features["pid"] for mini in batch.mini_batches}) == 2


def slow_first(inputs: list[Any], side: str) -> dict[str, Any]:
    features = preprocess(inputs, side)
    torch.ones(1 + 4_000_000 * (int(features["numbers"][0]) % 2)).cumsum(0)
    return features


def test_order_is_kept_when_workers_differ_in_speed(index: Index) -> None:
    expected = [content(batch) for batch in loader_of(index).batches(0, 7)]
    actual = [content(batch) for batch in loader_of(index, preprocess=slow_first, num_workers=2).batches(0, 7)]
    assert actual == expected


def test_workers_end_with_the_iterator(index: Index) -> None:
    batches = loader_of(index, num_workers=2).batches(0, 7)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert no_children()
    assert len(list(loader_of(index, num_workers=2).batches(0, 2))) == 2
    assert no_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_random_state_of_training_is_left_alone(index: Index, num_workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(loader_of(index, num_workers=num_workers).batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def broken_index(tmp_path: Path) -> Index:
    members = [member for number in range(4) for member in pair_members(f"k{number}", f"query {number}", number)]
    members[5] = ("k2.png", b"not an image")
    return build_index([write_tar(tmp_path / "a.tar", members)])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_page_arrives_as_the_same_user_error(broken_index: Index, num_workers: int) -> None:
    with pytest.raises(UserError) as error:
        list(loader_of(broken_index, num_workers=num_workers, mini_batch_size=1).batches(0, 1))
    assert type(error.value) is UserError
    assert str(error.value).startswith("the page 'k2.png' in shard ") and "\n" not in str(error.value)
    assert no_children()


def divides_by_zero(inputs: list[Any], side: str) -> dict[str, Any]:
    raise ZeroDivisionError("a defect in the preprocess function")


def kills_itself(inputs: list[Any], side: str) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_defect_of_preprocess_keeps_its_type(index: Index, num_workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a defect in the preprocess function"):
        list(loader_of(index, preprocess=divides_by_zero, num_workers=num_workers).batches(0, 1))
    assert no_children()


def dislikes_query_4(inputs: list[Any], side: str) -> dict[str, Any]:
    if side == "query" and any("4" in query for query in inputs):
        raise ValueError("absolute aspect\nratio")
    return preprocess(inputs, side)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_input_that_the_model_cannot_take_is_named(index: Index, num_workers: int) -> None:
    pair = next(p for p in range(len(index)) if "4" in PairReader(index).query(p))
    with pytest.raises(UserError) as caught:
        list(load_features(PairReader(index), dislikes_query_4, "query", range(len(index)), 4, num_workers))
    assert str(caught.value).startswith(f"the query of {index.pair_id(pair)} cannot be prepared for the model")
    assert "(ValueError: absolute aspect ratio)" in str(caught.value)
    assert no_children()


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the other worker's clean-up
def test_a_killed_worker_is_an_error_and_no_hang(index: Index) -> None:
    with pytest.raises(RuntimeError, match=r"worker .*(killed by signal|exited unexpectedly)"):
        list(loader_of(index, preprocess=kills_itself, num_workers=2).batches(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_features_for_encoding_come_in_order(index: Index, workers: int) -> None:
    reader = PairReader(index)
    pairs = [9, 3, 52, 0, 17, 18, 40]
    found = list(load_features(reader, preprocess, "query", pairs, 3, workers))
    assert [rows for rows, _ in found] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert torch.cat([features["numbers"] for _, features in found]).tolist() == pairs
    pages = index.positive_N[pairs]
    found = list(load_features(reader, preprocess, "document", pages, 4, workers))
    assert torch.cat([features["numbers"] for _, features in found]).tolist() == [pair // 2 for pair in pairs]
    assert list(load_features(reader, preprocess, "query", [], 3, workers)) == []
    assert no_children()


def special(inputs: list[Any], side: str) -> dict[str, Any]:
    return {"array": np.arange(3), "text": "x", "none": None}


def test_features_are_not_touched_on_their_way(index: Index) -> None:
    for workers in (0, 1):
        ((_, features),) = load_features(PairReader(index), special, "query", [0], 1, workers)
        assert isinstance(features["array"], np.ndarray) and features["text"] == "x" and features["none"] is None
