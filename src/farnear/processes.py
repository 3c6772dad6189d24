"""Worker processes that do not run the user's script again.

A process that multiprocessing starts without forking imports the program's main module first, so that functions defined
there can be sent to it. A script that calls `farnear.train` without `if __name__ == "__main__"` would train once more
in every worker. farnear sends its workers functions of its own modules only, so the main module is hidden from them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Processes that are started inside know nothing of the program's main module."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
