"""Plans on disk: computed once, whoever asks at once; never trusted when damaged; few kept."""

import fcntl
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farnear.data import plan_store
from farnear.data.plan import PairFacts, Plan, PlanSettings, plan_epoch, plan_hash
from farnear.data.plan_store import PLANS_KEPT, stored_plan
from farnear.errors import UserError

CONTEXT = multiprocessing.get_context("spawn")
SETTINGS = PlanSettings(seed=1, global_batch_size=32)


def some_facts(pairs: int = 500, fingerprint: str = "f") -> PairFacts:
    return PairFacts(
        fingerprint=fingerprint,
        query_hash_N=np.arange(pairs),
        positive_hash=np.arange(pairs) // 3,
        positive_start_N1=np.arange(pairs + 1),
        shard_N=np.zeros(pairs, np.int32),
        source_start_K1=np.array([0, pairs]),
    )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs that were computed, and not read."""
    epochs: list[int] = []

    def counted(facts: PairFacts, settings: PlanSettings, epoch: int) -> Plan:
        epochs.append(epoch)
        return plan_epoch(facts, settings, epoch)

    monkeypatch.setattr(plan_store, "plan_epoch", counted)
    return epochs


def assert_same(one: Plan, other: Plan) -> None:
    assert np.array_equal(one.rows_SG, other.rows_SG)
    assert {**vars(one), "rows_SG": None} == {**vars(other), "rows_SG": None}


def plans_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("plan-*.arrow"))


@pytest.mark.parametrize("chosen", [SETTINGS, PlanSettings(1, 32, tail="drop"), PlanSettings(2, 900, tail="pad")])
def test_a_plan_that_was_kept_is_the_plan(tmp_path: Path, computed: list[int], chosen: PlanSettings) -> None:
    expected = plan_epoch(some_facts(), chosen, 3)
    for _ in range(3):
        plan = stored_plan(tmp_path / "new" / "folder", some_facts(), chosen, 3)
        assert_same(plan, expected)
        assert plan_hash(plan) == plan_hash(expected)
        assert not plan.rows_SG.flags.writeable
    assert computed == [3]


def test_what_decides_the_order_decides_the_file(tmp_path: Path, computed: list[int]) -> None:
    other_sources = some_facts()
    object.__setattr__(other_sources, "source_start_K1", np.array([0, 200, 500]))
    cases: list[tuple[PairFacts, PlanSettings, int]] = [
        (some_facts(), SETTINGS, 0),
        (some_facts(), SETTINGS, 1),
        (some_facts(fingerprint="g"), SETTINGS, 0),
        (other_sources, SETTINGS, 0),
        (some_facts(), PlanSettings(2, 32), 0),
        (some_facts(), PlanSettings(1, 32, shards_per_window=3), 0),
        (some_facts(), PlanSettings(1, 32, weights=(2.5,)), 0),
    ]
    for case in cases + cases:
        assert_same(stored_plan(tmp_path, *case), plan_epoch(*case))
    assert len(computed) == len(cases) == len(plans_in(tmp_path))


def cut(file: bytes) -> bytes:
    return file[: len(file) // 2]


def flip(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def damage(file: bytes) -> bytes:
        assert old in file
        return file.replace(old, new)

    return damage


ROWS_OF_EPOCH_0 = plan_epoch(some_facts(), SETTINGS, 0).rows_SG.tobytes()


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda file: b"",
        lambda file: bytes(len(file)),
        lambda file: file[:-20],
        flip(ROWS_OF_EPOCH_0, ROWS_OF_EPOCH_0[8:16] + ROWS_OF_EPOCH_0[:8] + ROWS_OF_EPOCH_0[16:]),
        flip(b'"masked": 0', b'"masked": 1'),
        flip(b'"shape": [', b'"shape":[ '),
    ],
    ids=["half", "empty", "zeros", "no end", "another order", "another count", "another header"],
)
def test_a_damaged_plan_is_computed_again(
    tmp_path: Path, computed: list[int], damage: Callable[[bytes], bytes]
) -> None:
    expected = stored_plan(tmp_path, some_facts(), SETTINGS, 0)
    (path,) = plans_in(tmp_path)
    whole = path.read_bytes()
    path.unlink()  # what is mapped stays as it is
    path.write_bytes(damage(whole))
    assert_same(stored_plan(tmp_path, some_facts(), SETTINGS, 0), expected)
    assert computed == [0, 0]
    assert path.read_bytes() == whole
    stored_plan(tmp_path, some_facts(), SETTINGS, 0)
    assert computed == [0, 0]


def test_few_plans_are_kept_and_a_removed_one_stays_readable(tmp_path: Path, computed: list[int]) -> None:
    first = stored_plan(tmp_path, some_facts(), SETTINGS, 0)
    (first_path,) = plans_in(tmp_path)
    os.utime(first_path, (1, 1))
    torn = tmp_path / ".plan-1.arrow.0.tmp"
    torn.write_text("left by a process that was killed")
    being_written = tmp_path / ".plan-2.arrow.0.tmp"
    being_written.write_text("of another node")
    os.utime(torn, (0, 0))
    for epoch in range(1, PLANS_KEPT + 3):
        stored_plan(tmp_path, some_facts(), SETTINGS, epoch)
        assert len(plans_in(tmp_path)) == min(epoch + 1, PLANS_KEPT)
    assert not first_path.exists() and not torn.exists() and being_written.exists()
    assert_same(first, plan_epoch(some_facts(), SETTINGS, 0))
    computed.clear()
    for epoch in range(3, PLANS_KEPT + 3):
        stored_plan(tmp_path, some_facts(), SETTINGS, epoch)
    assert computed == []


def test_a_folder_that_takes_no_plan_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError) as caught:
        stored_plan(file, some_facts(), SETTINGS, 4)
    assert str(caught.value) == (
        f"the plan of epoch 4 cannot be kept in {file} (File exists), and each process would compute its own; make the "
        "folder one that can be written to, with space on its disk"
    )
    assert list(tmp_path.iterdir()) == [file]


def test_a_plan_that_cannot_be_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data has 500 pairs, but a global batch of 501 pairs"):
        stored_plan(tmp_path, some_facts(), PlanSettings(1, 501), 0)
    assert plans_in(tmp_path) == [] and list(tmp_path.glob("*.tmp")) == []


def ask_for_plans(folder: Path, start: Any, answers: Any) -> None:
    """A process of a node: waits for the others, then asks for the same plans as they do."""

    def counted(facts: PairFacts, settings: PlanSettings, epoch: int) -> Plan:
        with open(folder / "computed", "a", encoding="utf-8") as file:
            file.write(f"{epoch}\n")
        time.sleep(0.2)  # time for the others to come
        return plan_epoch(facts, settings, epoch)

    plan_store.plan_epoch = counted
    start.wait(60)
    answers.put([plan_hash(stored_plan(folder, some_facts(), SETTINGS, epoch)) for epoch in range(3)])


def test_of_processes_that_ask_at_once_one_computes(tmp_path: Path) -> None:
    start, answers = CONTEXT.Barrier(4), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=ask_for_plans, args=(tmp_path, start, answers)) for _ in range(4)]
    try:
        for process in processes:
            process.start()
        hashes = [answers.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
            process.join()
    expected = [plan_hash(plan_epoch(some_facts(), SETTINGS, epoch)) for epoch in range(3)]
    assert hashes == [expected] * 4
    assert (tmp_path / "computed").read_text().split() == ["0", "1", "2"]


def hold_the_lock(folder: Path, held: Any) -> None:
    """A process that is in the midst of a plan, and never gets done."""
    with open(folder / "plans.lock", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held.set()
        time.sleep(600)


def test_a_process_that_is_killed_at_it_holds_nobody_up(tmp_path: Path) -> None:
    held = CONTEXT.Event()
    holder = CONTEXT.Process(target=hold_the_lock, args=(tmp_path, held))
    start, answers = CONTEXT.Barrier(2), CONTEXT.Queue()
    waiter = CONTEXT.Process(target=ask_for_plans, args=(tmp_path, start, answers))
    try:
        holder.start()
        assert held.wait(60)
        waiter.start()
        start.wait(60)
        with pytest.raises(queue.Empty):
            answers.get(timeout=1)
        os.kill(holder.pid or 0, signal.SIGKILL)
        assert len(answers.get(timeout=60)) == 3
    finally:
        for process in (holder, waiter):
            if process.pid:
                process.kill()
                process.join()


def test_a_kept_plan_of_a_million_pairs_opens_at_once(tmp_path: Path) -> None:
    facts = some_facts(1_000_000)
    stored_plan(tmp_path, facts, PlanSettings(1, 1024), 0)
    seconds = time.process_time()
    plan = stored_plan(tmp_path, facts, PlanSettings(1, 1024), 0)
    assert time.process_time() - seconds < 0.1
    assert plan.rows_SG.shape == (976, 1024)
