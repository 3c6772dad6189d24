"""Workers do not outlive the process that asked for them, however it went."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from tar_makers import STORE, index_of, write_pairs

from farnear.data.read import InputReader
from farnear.data.shard_jobs import run_jobs
from farnear.data.workers import Job, Workers
from farnear.ingest.pool import map_in_order


def features(inputs: list[str], side: str) -> dict[str, list[str]]:
    return {"texts": inputs}


def sleeps(job: object) -> None:
    time.sleep(60)


def waits_with_data_workers(folder: Path) -> None:
    index = index_of(write_pairs(folder, 4, 1))
    workers = Workers(InputReader(index, STORE), features, num_workers=2, prefetch_factor=1, pin_memory=False)
    results = workers.run(Job("query", "text", np.array([row]), needed=True) for row in index.query_N.tolist())
    next(results)
    (folder / "ready").touch()
    time.sleep(60)


def waits_for_shard_jobs(folder: Path) -> None:
    list(run_jobs(sleeps, [(folder, 1), (folder, 2)], "sleeping", processes=2))


def waits_for_a_pool(folder: Path) -> None:
    list(map_in_order(sleeps, range(2), processes=2))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("rank", [waits_with_data_workers, waits_for_shard_jobs, waits_for_a_pool])
def test_workers_end_when_their_rank_is_killed(rank: Callable[[Path], None], tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=rank, args=(tmp_path,))
    process.start()
    assert process.pid is not None
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    at_work = 3 if rank is waits_with_data_workers else 2  # those of the data come from a fork server
    while time.monotonic() < deadline and len(workers) < at_work:
        time.sleep(0.2)
        workers = psutil.Process(process.pid).children(recursive=True)
    try:
        assert len(workers) == at_work
        time.sleep(1.0)  # for workers that are still being started
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        _, left = psutil.wait_procs(workers, timeout=30)
        assert left == []
    finally:
        for worker in workers:
            if worker.is_running():
                worker.kill()
