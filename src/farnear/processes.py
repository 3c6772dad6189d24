"""Processes that leave nothing behind and run nothing twice.

A rank whose launcher was killed would train on unseen, so ranks end with their parent (`end_with_parent`).

A process that multiprocessing starts without forking imports the program's main module first, so that functions defined
there can be sent to it. A script that calls `farnear.train` without `if __name__ == "__main__"` would train once more
in every worker. farnear sends its workers functions of its own modules only, so the main module is hidden from them.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

PR_SET_PDEATHSIG = 1  # prctl(2); Linux only


def end_with_parent(parent: int) -> None:
    """Have this process take a SIGTERM when its parent dies, be it by a SIGKILL.

    Args:
        parent: Process id of the parent, which may have died already.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Processes that are started inside know nothing of the program's main module."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
