"""Runs a function over shards in several processes, with a bar that counts bytes."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from tqdm import tqdm

from farnear.errors import RunStoppedError
from farnear.processes import end_with_starter, main_module_hidden

Job = TypeVar("Job")
Result = TypeVar("Result")

_BYTES_WORTH_A_PROCESS = 256 << 20


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[tuple[Job, int]],
    what: str,
    processes: int | None = None,
) -> Iterator[tuple[Job, Result]]:
    """Yield each job with its result, as they are done; the largest jobs come first.

    Args:
        function: Of a module, or a ``functools.partial`` of one.
        jobs: Each with the bytes that it will read.
        what: The bar's title. There is a bar on a terminal only.
        processes: None for as many as have a core each and 256 MB each.

    Raises:
        RunStoppedError: A process was killed. What ``function`` raises is raised here, and ends the other jobs.
    """
    total = sum(size for _, size in jobs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(processes or min(cores, 1 + total // _BYTES_WORTH_A_PROCESS), len(jobs))
    # The largest first, so that no process is left alone with one at the end.
    jobs = sorted(jobs, key=lambda job: -job[1])
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None) as bar:
        if processes <= 1:
            for job, size in jobs:
                yield job, function(job)
                bar.update(size)
            return
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=end_with_starter) as pool:
            try:
                with main_module_hidden():
                    running: dict[Future[Result], tuple[Job, int]] = {
                        pool.submit(function, job): (job, size) for job, size in jobs
                    }
                for done in as_completed(running):
                    job, size = running[done]
                    yield job, done.result()
                    bar.update(size)
            except BrokenProcessPool:
                raise RunStoppedError(
                    f"a process was killed while {what}, most likely for its memory; what was done is kept, so start "
                    "again, with fewer processes or more memory"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)
