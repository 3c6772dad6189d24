"""Real gloo processes for tests: given a time limit, and gone afterwards whatever happened.

They are forked from one server process that has imported torch, transformers and deepspeed and done nothing else (see
`conftest.py`), which saves each rank the ten seconds that these imports take.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp


def run_ranks(work: Callable[..., None], world_size: int, *arguments: Any, seconds: float = 240) -> None:
    """Run ``work(rank, world_size, *arguments)`` in as many processes, with torchrun's environment in each.

    ``work`` is a function at the top of a module. It joins the process group itself, as a training does.
    """
    context = mp.start_processes(
        _rank_main, (world_size, free_port(), work, arguments), nprocs=world_size, join=False, start_method="forkserver"
    )
    try:
        # Raises the first rank's exception, with its traceback, and ends the others.
        if not _join(context, seconds):
            pytest.fail(f"{work.__name__} on {world_size} ranks did not end within {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(context: Any, seconds: float) -> bool:
    """Wait in slices: join returns when a process ends, not only when all have."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if context.join(timeout=1.0):
            return True
    return False


def _rank_main(rank: int, world_size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    # As launches set it on two cores. Unset, accelerate would take all cores for each rank, and sums round otherwise.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    work(rank, world_size, *arguments)
