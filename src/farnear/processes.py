"""Processes that leave nothing behind and run nothing twice.

A rank whose launcher was killed would train on unseen, so ranks end with their parent (`end_with_parent`). A worker
whose rank was killed would wait for ever for its next job, so workers end with theirs (`end_with_starter`).

A process that multiprocessing starts without forking imports the program's main module first, so that functions defined
there can be sent to it. A script that calls `farnear.train` without `if __name__ == "__main__"` would train once more
in every worker. farnear sends its workers functions of its own modules only, so the main module is hidden from them.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

PR_SET_PDEATHSIG = 1  # prctl(2); Linux only
SIGNALS_OF_STARTER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal or a cluster's scheduler sends to all processes, for one of them to answer."""


def end_with_parent(parent: int) -> None:
    """Have this process take a SIGTERM when its parent dies, be it by a SIGKILL.

    Args:
        parent: Process id of the parent, which may have died already.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def end_with_starter() -> None:
    """Have this process, started by multiprocessing, end as soon as the one that asked for it is gone, however it went.

    That is not its parent where a fork server stands between them, and a killed process tells its children nothing. But
    the pipe that it held open to this one ends. A signal that reaches both is the starter's to answer.
    """
    starter = multiprocessing.parent_process()
    assert starter is not None, "this process was not started by multiprocessing"

    def watch() -> None:
        starter.join()
        os._exit(1)

    for number in SIGNALS_OF_STARTER:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch, name="end with starter", daemon=True).start()


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started inside, and those that they start, ignore what is their starter's to answer.

    Outside of the main thread, where Python lets nobody change what a signal does, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS_OF_STARTER}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Processes that are started inside know nothing of the program's main module."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
