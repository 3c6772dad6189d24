"""The loader: each rank's mini-batches of any step, in order, whatever the workers do."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tar_makers import STORE, index_of, number_of_image, pair_members, write_pairs, write_tar

from farnear.data import order as order_module
from farnear.data.batch import RankBatch
from farnear.data.dealing import SIDES, Dealing
from farnear.data.index import Index
from farnear.data.loader import TrainLoader, load_features
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.read import InputReader
from farnear.data.workers import WorkerDiedError, stand_in
from farnear.errors import RunStoppedError, UserError


def no_children() -> bool:
    return multiprocessing.active_children() == []


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> Iterator[None]:
    yield
    assert no_children()


def preprocess(inputs: list[Any], side: str) -> dict[str, Any]:
    """Features that tell what came in: the number of each query or page, and the process that worked on it."""
    numbers = [int(one.split()[1]) if isinstance(one, str) else number_of_image(one) for one in inputs]
    return {"numbers": torch.tensor(numbers), "side": side, "texts": list(map(str, numbers)), "pid": os.getpid()}


def page_tokens(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    return width * height


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """53 pairs over 4 shards, two of a page, with 0, 1, 2, 0, 1, ... hard negatives."""
    folder = tmp_path_factory.mktemp("shards")
    return index_of(write_pairs(folder, 53, 4, negatives_of_pair=2, copies_of_page=2))


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def loader_of(plans: Path) -> Any:
    def make(index: Index, tail: str = "pad", global_batch_size: int = 8, **changes: Any) -> TrainLoader:
        deal = {"page_tokens": page_tokens, "mini_batch_size": 3, "num_negatives": None, "rank": 0, "world_size": 1}
        for name in set(changes) & {*deal, "same_modalities"}:
            deal[name] = changes.pop(name)
        deal["mini_batch_size"] = dict.fromkeys(SIDES, deal["mini_batch_size"])
        options: dict[str, Any] = {"preprocess": preprocess, "num_workers": 0, **changes}
        order = Order(index, PlanSettings(1, global_batch_size, tail=tail), plans)
        return TrainLoader(order, Dealing(**deal), STORE, **options)

    return make


def numbers_of(batch: RankBatch, side: str) -> list[int]:
    """What came in for each row of a side, put in order by the mini-batches' rows."""
    found = {}
    for mini in batch.mini_batches:
        if mini.side == side:
            found.update(zip(mini.rows.tolist(), mini.features["numbers"].tolist(), strict=True))
    assert sorted(found) == list(range(len(found)))
    return [found[row] for row in sorted(found)]


def expected_negatives(pairs: list[int], most: int | None) -> list[int]:
    return [10_000 + pair * 10 + number for pair in pairs for number in range(pair % 3)[:most]]


def content(batch: RankBatch) -> tuple[Any, ...]:
    """All of a batch except the time and the worker."""
    minis = [(mini.side, mini.modality, mini.rows.tolist(), mini.features["texts"]) for mini in batch.mini_batches]
    names = ("pairs_b", "valid_b", "query_hash_b", "page_hash_p", "page_valid_p", "answers_bm")
    return batch.step, batch.epoch, [getattr(batch, name).tolist() for name in names], minis, batch.quarantined


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("most", [None, 0, 1])
def test_a_batch_holds_its_pairs_then_their_negatives(
    index: Index, loader_of: Any, num_workers: int, most: int | None
) -> None:
    loader = loader_of(index, num_workers=num_workers, num_negatives=most)
    assert loader.order.schedule.steps_before(1) == 7
    seen: list[int] = []
    for batch in loader.batches(0, 7):
        pairs = batch.pairs_b.tolist()
        seen += pairs
        assert numbers_of(batch, "query") == pairs
        pages = [pair // 2 for pair in pairs] + expected_negatives(pairs, most)
        assert numbers_of(batch, "document") == pages
        assert batch.valid_b.all() and len(batch.valid_b) == len(pairs)
        assert batch.query_hash_b.tolist() == index.query_hash_N[pairs].tolist()
        assert batch.page_hash_p[: len(pairs)].tolist() == index.input_hash_I[index.positives[pairs]].tolist()
        assert len(batch.page_hash_p) == len(pages) and len(set(batch.page_hash_p.tolist())) == len(pages)
        assert batch.page_valid_p.all() and len(batch.page_valid_p) == len(pages)
        assert batch.answers_bm.tolist() == batch.page_hash_p[: len(pairs), None].tolist()
        for side, rows in (("query", len(pairs)), ("document", len(pages))):
            sizes = [len(mini.rows) for mini in batch.mini_batches if mini.side == side]
            assert max(sizes) <= 3 and len(sizes) == -(-rows // 3)
        sides = [mini.side for mini in batch.mini_batches]
        assert sides == sorted(sides)  # "document" before "query"
        assert batch.seconds_waited >= 0
    assert sorted(seen) == list(range(53))


def test_ranks_share_the_same_global_batches(index: Index, loader_of: Any) -> None:
    whole = [set(batch.pairs_b.tolist()) for batch in loader_of(index).batches(0, 9)]
    assert len(whole[0]) == 8 and whole[7] != whole[0]
    for world_size in (2, 3):
        ranks = [loader_of(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, parts in enumerate(zip(*(rank.batches(0, 9) for rank in ranks), strict=True)):
            pairs = np.concatenate([part.pairs_b for part in parts]).tolist()
            assert len(pairs) == len(whole[step]) and set(pairs) == whole[step]
            assert max(len(part.pairs_b) for part in parts) - min(len(part.pairs_b) for part in parts) <= 1
            assert all(part.step == step and part.epoch == step // 7 for part in parts)


def test_a_rank_without_rows_borrows_one_that_does_not_count(index: Index, loader_of: Any) -> None:
    """53 pairs leave 5 for the last step: with 8 ranks, three get none."""
    ranks = [loader_of(index, rank=rank, world_size=8) for rank in range(8)]
    parts = [next(rank.batches(6, 7)) for rank in ranks]
    row_G = ranks[0].order.plan(0).rows_SG[6]
    assert [int(part.valid_b.sum()) for part in parts] == [1] * 5 + [0] * 3
    assert sorted(int(part.pairs_b[0]) for part in parts[:5]) == sorted(row_G[:5].tolist())
    for part in parts:
        assert len(part.pairs_b) == 1 and {mini.side for mini in part.mini_batches} == {"query", "document"}
        if not part.valid_b.any():
            assert part.pairs_b[0] == row_G[0] and len(part.page_hash_p) == 1 and not part.page_valid_p.any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_any_step_gives_the_same_batches(index: Index, loader_of: Any, num_workers: int) -> None:
    whole = [content(batch) for batch in loader_of(index, num_workers=num_workers).batches(0, 16)]
    for first, last in ((5, 9), (6, 16), (7, 8), (14, 16)):
        resumed = [content(batch) for batch in loader_of(index, num_workers=num_workers).batches(first, last)]
        assert resumed == whole[first:last]
    assert list(loader_of(index, num_workers=num_workers).batches(3, 3)) == []


def bytes_of_pairs(index: Index, loader_of: Any, world_size: int, num_workers: int, steps: range) -> dict[Any, Any]:
    """For each step and pair of the global batch, the text, pages and negatives that some rank was given."""
    found: dict[Any, Any] = {}
    for rank in range(world_size):
        loader = loader_of(index, tail="carry", rank=rank, world_size=world_size, num_workers=num_workers)
        for batch in loader.batches(steps.start, steps.stop):
            queries, documents = numbers_of(batch, "query"), numbers_of(batch, "document")
            negatives = iter(documents[len(queries) :])
            for place, pair in enumerate(batch.pairs_b.tolist()):
                own = [next(negatives) for _ in index.negatives_of(pair)]
                assert (batch.step, pair) not in found
                found[batch.step, pair] = (queries[place], documents[place], own)
    return found


def test_steps_go_on_on_any_number_of_ranks_and_workers(index: Index, loader_of: Any) -> None:
    """Trained on 1, then 4, 3, 8 and 1 ranks, each continuing where the other stopped: the same batches and bytes."""
    whole = bytes_of_pairs(index, loader_of, 1, 0, range(20))
    parts: dict[Any, Any] = {}
    for world_size, num_workers, steps in (
        (4, 0, range(5)),
        (3, 1, range(5, 9)),
        (8, 0, range(9, 10)),
        (8, 0, range(10, 14)),
        (1, 2, range(14, 20)),
    ):
        parts |= bytes_of_pairs(index, loader_of, world_size, num_workers, steps)
    assert parts == whole
    pairs_of_step = [sum(step == s for s, _ in whole) for step in range(20)]
    assert pairs_of_step == [8] * 20  # tail carry: no short batch, over the edges of epochs
    times = np.bincount([pair for _, pair in whole], minlength=53)
    assert set(times.tolist()) <= {2, 3, 4} and times.sum() == 160  # 20 steps end within the fourth pass


def test_reaching_a_step_reads_nothing(index: Index, loader_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = InputReader.__getitem__
    monkeypatch.setattr(InputReader, "__getitem__", lambda reader, row: reads.append(row) or read(reader, row))
    batch = next(loader_of(index, num_negatives=0).batches(7 * 10_000 + 3, 7 * 10_000 + 4))
    assert batch.epoch == 10_000
    assert sorted(reads) == sorted([*index.query_N[batch.pairs_b], *index.positives[batch.pairs_b]])


def test_a_plan_is_opened_once_an_epoch(index: Index, loader_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    stored_plan = order_module.stored_plan

    def counted(folder: Path, facts: Any, settings: Any, epoch: int) -> Any:
        epochs.append(epoch)
        return stored_plan(folder, facts, settings, epoch)

    monkeypatch.setattr(order_module, "stored_plan", counted)
    loader = loader_of(index, num_workers=2)
    assert len(list(loader.batches(0, 21))) == 21
    assert epochs == [0, 1, 2]
    assert loader.order.plan(2) is loader.order.plan(2)


def test_keys_name_the_whole_global_batch(index: Index, loader_of: Any) -> None:
    loader = loader_of(index, rank=1, world_size=2)
    row_G = loader.order.plan(1).rows_SG[6]
    keys = loader.keys_of_batch(13)
    assert keys == [index.pair_id(row) for row in row_G[row_G >= 0]]
    assert len(keys) == 5 and all(key.startswith("part-00") and "/k000" in key for key in keys)


def test_all_workers_are_busy_within_one_step(index: Index, loader_of: Any) -> None:
    loader = loader_of(index, num_workers=2, global_batch_size=24, mini_batch_size=2)
    batch = next(loader.batches(0, 1))
    assert len({mini.features["pid"] for mini in batch.mini_batches}) == 2


def slow_first(inputs: list[Any], side: str) -> dict[str, Any]:
    features = preprocess(inputs, side)
    torch.ones(1 + 4_000_000 * (int(features["numbers"][0]) % 2)).cumsum(0)
    return features


def test_order_is_kept_when_workers_differ_in_speed(index: Index, loader_of: Any) -> None:
    expected = [content(batch) for batch in loader_of(index).batches(0, 7)]
    actual = [content(batch) for batch in loader_of(index, preprocess=slow_first, num_workers=2).batches(0, 7)]
    assert actual == expected


def test_workers_end_with_the_iterator(index: Index, loader_of: Any) -> None:
    batches = loader_of(index, num_workers=2).batches(0, 7)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert no_children()
    assert len(list(loader_of(index, num_workers=2).batches(0, 2))) == 2
    assert no_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_random_state_of_training_is_left_alone(index: Index, loader_of: Any, num_workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(loader_of(index, num_workers=num_workers).batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def broken_index(tmp_path: Path) -> Index:
    """Four pairs; the first page of pair 2 and the second negative of pair 3 are no whole pictures."""
    members = [
        member for number in range(4) for member in pair_members(f"k{number}", f"query {number}", number, [50, 60])
    ]
    broken = {"k2.png", "k3.neg1.png"}
    members = [(name, data[:50] if name in broken else data) for name, data in members]
    return index_of([write_tar(tmp_path / "a.tar", members)])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("mini_batch_size", [1, 3, 20])
def test_what_cannot_be_decoded_keeps_its_place_and_does_not_count(
    broken_index: Index, loader_of: Any, num_workers: int, mini_batch_size: int
) -> None:
    (batch,) = loader_of(broken_index, num_workers=num_workers, mini_batch_size=mini_batch_size).batches(0, 1)
    pairs = batch.pairs_b.tolist()
    assert sorted(pairs) == [0, 1, 2, 3]
    assert dict(zip(pairs, batch.valid_b.tolist(), strict=True)) == {0: True, 1: True, 2: False, 3: True}
    owners = pairs + [pair for pair in pairs for _ in range(2)]
    assert len(batch.page_valid_p) == 12
    bad = [row for row in range(12) if not batch.page_valid_p[row]]
    # Pair 2 with its hard negatives, and one hard negative of pair 3.
    assert sorted(owners[row] for row in bad) == [2, 2, 2, 3] and bad[0] == pairs.index(2) and bad[1] >= 4
    found = sorted((one.shard, one.key, one.input) for one in batch.quarantined)
    (shard,) = broken_index.shards
    assert found == [(shard, "k2", "a.tar/k2.png"), (shard, "k3", "a.tar/k3.neg1.png")]
    assert all("cannot be decoded" in one.reason for one in batch.quarantined)
    documents = numbers_of(batch, "document")
    black = number_of_image(stand_in("image"))
    assert documents[bad[0]] == documents[next(row for row in bad if owners[row] == 3)] == black
    assert numbers_of(batch, "query") == pairs
    assert no_children()


def test_a_borrowed_pair_is_not_reported_twice(broken_index: Index, loader_of: Any) -> None:
    parts = [next(loader_of(broken_index, rank=rank, world_size=9).batches(0, 1)) for rank in range(9)]
    assert len([one for part in parts for one in part.quarantined]) == 2


def test_an_evaluation_stops_at_what_cannot_be_decoded(broken_index: Index) -> None:
    how = {"batch_size": 2, "page_tokens": page_tokens, "num_workers": 0}
    with pytest.raises(UserError, match=r"the member 'k2.png' in shard .*a.tar cannot be decoded") as error:
        list(load_features(broken_index, STORE, preprocess, "document", broken_index.positives, **how))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("modality", ["text", "image", "image+text", "audio", "video", "audio+video", "message"])
def test_there_is_a_stand_in_for_every_modality(modality: str) -> None:
    from sentence_transformers.base.modality import infer_modality

    kind = infer_modality(stand_in(modality))
    assert ("+".join(kind) if isinstance(kind, tuple) else kind) == modality


def test_a_stand_in_for_messages_has_their_media() -> None:
    """Where a forward is a collective it has to go through the same parts of the model."""
    [message] = stand_in("audio+image+message")
    assert [part["type"] for part in message["content"]] == ["audio", "image", "text"]
    assert {"array", "sampling_rate"} == message["content"][0]["audio"].keys()
    assert message["content"][1]["image"].size == (64, 64)


def divides_by_zero(inputs: list[Any], side: str) -> dict[str, Any]:
    raise ZeroDivisionError("a defect in the preprocess function")


def kills_itself(inputs: list[Any], side: str) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_defect_of_preprocess_keeps_its_type(index: Index, loader_of: Any, num_workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a defect in the preprocess function"):
        list(loader_of(index, preprocess=divides_by_zero, num_workers=num_workers).batches(0, 1))
    assert no_children()


def dislikes_query_4(inputs: list[Any], side: str) -> dict[str, Any]:
    if side == "query" and any("4" in query for query in inputs):
        raise ValueError("absolute aspect\nratio")
    return preprocess([query if query != "." else "query -1" for query in inputs] if side == "query" else inputs, side)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_input_that_the_model_cannot_take_is_named(index: Index, loader_of: Any, num_workers: int) -> None:
    loader = loader_of(index, preprocess=dislikes_query_4, num_workers=num_workers)
    for batch in loader.batches(0, 7):
        bad = [pair for pair in batch.pairs_b.tolist() if "4" in str(pair)]
        assert sorted(one.key for one in batch.quarantined) == sorted(index.pair_key[pair] for pair in bad)
        assert all(one.reason.endswith("(ValueError: absolute aspect ratio)") for one in batch.quarantined)
        assert set(batch.pairs_b[~batch.valid_b].tolist()) == set(bad)
    how = {"batch_size": 4, "page_tokens": page_tokens, "num_workers": num_workers}
    with pytest.raises(UserError) as caught:
        list(load_features(index, STORE, dislikes_query_4, "query", index.query_N, **how))
    assert str(caught.value).startswith(f"the query {index.input_id(int(index.query_N[4]))} cannot be prepared")
    assert no_children()


def dies_at_query_7(inputs: list[Any], side: str) -> dict[str, Any]:
    if side == "query" and "query 7" in inputs:
        os.kill(os.getpid(), signal.SIGKILL)
    return preprocess(inputs, side)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the other worker's clean-up
def test_a_killed_worker_is_an_error_with_its_last_key_and_no_hang(index: Index, loader_of: Any) -> None:
    with pytest.raises(WorkerDiedError, match=r"worker with pid \d+ died with part-000.tar/k00007.json in hand"):
        list(loader_of(index, preprocess=dies_at_query_7, num_workers=2, mini_batch_size=1).batches(0, 7))


class DiesOnArrival:
    """A preprocess function that kills the process which it is sent to."""

    def __call__(self, inputs: list[Any], side: str) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def __getstate__(self) -> dict[str, Any]:
        return {"some": "state"}


@pytest.mark.timeout(60)
def test_a_worker_killed_before_its_first_input_is_an_error_too(index: Index, loader_of: Any) -> None:
    with pytest.raises(WorkerDiedError, match=r"a data worker died before its first input, so its batch is missing"):
        list(loader_of(index, preprocess=DiesOnArrival(), num_workers=1).batches(0, 7))


def has_no_memory(inputs: list[Any], side: str) -> dict[str, Any]:
    raise MemoryError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_little_memory_stops_the_run_and_is_no_fault_of_an_input(
    index: Index, loader_of: Any, num_workers: int
) -> None:
    with pytest.raises(RunStoppedError, match=r"not enough memory to decode and prepare part-00\d.tar/"):
        list(loader_of(index, preprocess=has_no_memory, num_workers=num_workers).batches(0, 1))
    assert no_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_features_for_encoding_come_with_their_places(index: Index, workers: int) -> None:
    pairs = [9, 3, 52, 0, 17, 18, 40]
    how = {"page_tokens": page_tokens, "num_workers": workers}
    for side, rows, expected in (
        ("query", index.query_N[pairs], pairs),
        ("document", index.positives[pairs], [pair // 2 for pair in pairs]),
    ):
        found = list(load_features(index, STORE, preprocess, side, rows, batch_size=3, **how))
        assert [len(places) for places, _ in found] == [3, 3, 1]
        numbers = {p: n for places, f in found for p, n in zip(places.tolist(), f["numbers"].tolist(), strict=True)}
        assert [numbers[place] for place in range(len(pairs))] == expected
    assert list(load_features(index, STORE, preprocess, "query", index.query_N[:0], batch_size=3, **how)) == []
    assert no_children()


def special(inputs: list[Any], side: str) -> dict[str, Any]:
    return {"array": np.arange(3), "text": "x", "none": None}


def test_features_are_not_touched_on_their_way(index: Index) -> None:
    for workers in (0, 1):
        how = {"batch_size": 1, "page_tokens": page_tokens, "num_workers": workers}
        ((_, features),) = load_features(index, STORE, special, "query", index.query_N[:1], **how)
        assert isinstance(features["array"], np.ndarray) and features["text"] == "x" and features["none"] is None


def kinds(inputs: list[Any], side: str) -> dict[str, Any]:
    names = ["text" if isinstance(one, str) else "image" if isinstance(one, Image.Image) else "both" for one in inputs]
    return {"kinds": names, "texts": names}


@pytest.mark.parametrize("same", [False, True])
def test_mini_batches_hold_one_modality_in_the_same_order_everywhere(
    tmp_path: Path, loader_of: Any, same: bool
) -> None:
    members = [member for number in range(6) for member in pair_members(f"k{number}", f"query {number}", number)]
    members[1] = ("k0.txt", b"a page that is a text")
    members.insert(2, ("k0.neg0.png", members[3][1]))
    index = index_of([write_tar(tmp_path / "a.tar", members)])
    orders = []
    for rank in range(3):
        loader = loader_of(index, preprocess=kinds, same_modalities=same, rank=rank, world_size=3, global_batch_size=6)
        (batch,) = loader.batches(0, 1)
        orders.append(list(dict.fromkeys((mini.side, mini.modality) for mini in batch.mini_batches)))
        for mini in batch.mini_batches:
            assert set(mini.features["kinds"]) == {mini.modality}
        borrowed = [mini for mini in batch.mini_batches if len(mini.rows) == 0]
        assert len(borrowed) == (same and 0 not in batch.pairs_b)
        covered = np.sort(np.concatenate([mini.rows for mini in batch.mini_batches if mini.side == "document"]))
        assert covered.tolist() == list(range(len(batch.page_hash_p)))
    everything = [("document", "text"), ("document", "image"), ("query", "text")]
    assert orders == [everything] * 3 if same else sorted(map(len, orders)) == [2, 2, 3]


def test_every_answer_to_a_query_is_known(tmp_path: Path, loader_of: Any) -> None:
    """Pairs 0 and 1 ask the same; pair 2 has two positives, of which an epoch draws one."""
    pages = [(f"p{number}.png", member[1]) for number in range(9) for member in [pair_members("x", "q", number)[1]]]
    corpus = write_tar(tmp_path / "pages.tar", pages)
    records = [
        {"query": "query 1", "pos_id": "p0", "neg_ids": ["p3"]},
        {"query": " QUERY  1", "pos_id": "p1"},
        {"query": "query 2", "pos_ids": ["p2", "p3", "p4"], "neg_ids": ["p0"]},
    ]
    shard = write_tar(tmp_path / "a.tar", [(f"k{n}.json", json.dumps(r).encode()) for n, r in enumerate(records)])
    index = index_of([shard], corpus=[corpus])
    hash_of = {index.part_name[row]: int(index.input_hash_I[row]) for row in index.corpus_C.tolist()}
    drawn = set()
    for batch in loader_of(index, global_batch_size=3).batches(0, 30):
        answers = dict(zip(batch.pairs_b.tolist(), map(set, batch.answers_bm.tolist()), strict=True))
        in_batch = set(batch.page_hash_p.tolist())
        assert answers[0] == answers[1] == {hash_of["p0.png"], hash_of["p1.png"]}
        assert answers[2] == {hash_of[f"p{n}.png"] for n in (2, 3, 4)} & in_batch and hash_of["p3.png"] in answers[2]
        places = {pair: place for place, pair in enumerate(batch.pairs_b.tolist())}
        documents = numbers_of(batch, "document")
        assert documents[places[0]] == 0 and documents[places[1]] == 1 and set(documents[3:]) == {0, 3}
        drawn.add(documents[places[2]])
        assert batch.page_hash_p[places[2]] in answers[2]
    assert drawn == {2, 3, 4}
