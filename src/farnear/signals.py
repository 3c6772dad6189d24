"""Signals that should end a training: noted at once, whatever the process is doing, and acted on where it can.

Python runs a signal's handler between two instructions of the main thread, which may be waiting for minutes in a
collective. But the number of the signal is written to a file descriptor at once, and a thread reads it there. So a
signal is known as soon as it comes, and a second Ctrl-C ends the process even in the middle of a hang.

    SIGTERM, SIGUSR1, SIGINT    noted; all ranks save at the same step and end with code 75 (`farnear.training.guard`)
    SIGINT after any of them    the process ends at once, with code 130
"""

import os
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """The first signal that came while the context was open.

    Entered anywhere but in the main thread, where Python lets nobody handle signals, it notes none.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reads, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        self._previous_descriptor = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            # What is ignored on purpose, as under nohup, stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, _noted_elsewhere)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._previous_descriptor)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writes.close()  # ends the thread
        self._thread.join()
        self._reads.close()

    def _read(self) -> None:
        while numbers := self._reads.recv(16):
            for number in numbers:
                if number in self._previous:
                    self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        if self.first is not None and number == signal.SIGINT:
            print("farnear: SIGINT again, stopped at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.first = self.first or number


def _noted_elsewhere(number: int, frame: FrameType | None) -> None:
    """What the descriptor is told does not depend on it, but without a handler the signal would end the process."""
