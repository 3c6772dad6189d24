"""The watchdog: a hang is found, told once with everybody's place and stacks, and a long wait is none."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farnear.errors import RunStoppedError
from farnear.run_folder import RunFolder
from farnear.training.watch import Watch
from farnear.training.watchdog import Watchdog, clear_heartbeats, read_heartbeat

# A thread that ends as a process would.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

LIMIT = 1.0


class Rank:
    """A watchdog whose process does not end, but its thread does."""

    def __init__(self, folder: RunFolder, rank: int, world_size: int) -> None:
        self.watch = Watch(LIMIT)
        self.watch.name_of_pair = lambda pair: f"shard.tar/{pair}"
        self.ends: list[RunStoppedError | None] = []
        self.dog = Watchdog(self.watch, folder, rank, world_size, self._end)

    def _end(self, error: RunStoppedError | None) -> None:
        self.ends.append(error)
        raise SystemExit

    def wait_for_end(self, seconds: float = 5.0) -> RunStoppedError | None:
        deadline = time.monotonic() + seconds
        while not self.ends and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.ends, "the watchdog has not ended the rank"
        return self.ends[0]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_hang_is_told_with_all_places_pairs_and_stacks(folder: RunFolder) -> None:
    ranks = [Rank(folder, rank, 2) for rank in range(2)]
    ranks[0].watch.at("loss", step=5, pairs=np.array([3, 4]))
    ranks[1].watch.at("pass two", step=5, mini_batch=3, pairs=np.array([7]))
    started = time.monotonic()
    with ranks[0].dog, ranks[1].dog:
        ends = [rank.wait_for_end() for rank in ranks]
    assert LIMIT < time.monotonic() - started < 3 * LIMIT
    # Both say the same: ranks of one machine have it printed once, and those of another machine would say nothing.
    told, same = (end for end in ends if end is not None)
    assert str(told) == str(same)
    assert "no rank has made progress for 1 s: every rank's watchdog answers" in str(told)
    [report] = (folder.path / "hangs").glob("*/report.txt")
    text = report.read_text()
    assert f"{report}" in str(told)
    assert "step 5, loss" in text
    assert "shard.tar/3 shard.tar/4" in text
    assert "step 5, pass two, mini-batch 3" in text
    assert "shard.tar/7" in text
    assert text.count("test_a_hang_is_told_with_all_places_pairs_and_stacks") >= 2
    assert not folder.hang.exists()


def test_a_rank_that_cannot_answer_is_named_by_its_heartbeat(folder: RunFolder) -> None:
    silent = Rank(folder, 1, 2)
    silent.watch.at("pass one", step=7, mini_batch=2, pairs=np.array([9]))
    silent.dog._beat()
    rank = Rank(folder, 0, 2)
    rank.watch.at("loss", step=7, pairs=np.array([3]))
    with rank.dog:
        told = rank.wait_for_end()
    assert "silent: rank 1 (" in str(told)
    assert "last heard of at 20" in str(told)
    assert "in step 7, pass one, mini-batch 2 (pairs in hand: shard.tar/9); " in str(told)
    assert "rank 0 waits in step 7, loss (pairs in hand: shard.tar/3); " in str(told)


def test_a_rank_that_was_never_heard_of_is_named_too(folder: RunFolder) -> None:
    rank = Rank(folder, 0, 3)
    with rank.dog:
        assert "rank 1, which has left no heartbeat; rank 2, which has left no heartbeat" in str(rank.wait_for_end())


def test_a_wait_for_a_rank_that_moves_is_no_hang(folder: RunFolder) -> None:
    waiting, working = Rank(folder, 1, 2), Rank(folder, 0, 2)
    waiting.watch.at("evaluation: search")
    with waiting.dog, working.dog:
        for _ in range(30):
            working.watch.at("evaluation: search")
            time.sleep(LIMIT / 10)
        assert not waiting.ends
        assert not working.ends
        waiting.wait_for_end()


def test_patience_ends_where_its_block_does(folder: RunFolder) -> None:
    rank = Rank(folder, 0, 1)
    with rank.dog:
        with rank.watch.patient(60.0):
            time.sleep(2 * LIMIT)
        assert not rank.ends
        rank.wait_for_end()


def test_the_saving_thread_moves_its_rank(folder: RunFolder) -> None:
    rank = Rank(folder, 0, 1)
    with rank.dog:
        for _ in range(20):
            rank.watch.saving("write", 4)
            time.sleep(LIMIT / 10)
        assert not rank.ends
        beat: Any = read_heartbeat(folder, 0)
        assert beat["saves"] == "step 4, write"


def test_a_hang_is_found_where_nothing_can_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    rank = Rank(RunFolder(tmp_path / "run"), 0, 1)
    rank.watch.at("update", step=2)
    with rank.dog:
        assert "rank 0 hangs in step 2, update" in str(rank.wait_for_end())
    assert "test_a_hang_is_found_where_nothing_can_be_written" in capfd.readouterr().err


def test_an_end_in_order_leaves_no_heartbeat_and_no_thread(folder: RunFolder) -> None:
    rank = Rank(folder, 0, 1)
    with rank.dog:
        assert read_heartbeat(folder, 0) is not None
    assert read_heartbeat(folder, 0) is None
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    rank.dog._beat()
    folder.hang.mkdir()
    clear_heartbeats(folder)
    assert not folder.hang.exists()
    assert not folder.heartbeats.exists()
