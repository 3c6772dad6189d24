"""`farnear watch`: draws a run again and again until it ends."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TextIO

from farnear.config import load_config
from farnear.errors import UserError
from farnear.flywheel_file import is_flywheel, read_flywheel
from farnear.report.following import Following, View, is_run_folder
from farnear.report.watch_text import BLOCKS, news, one_line, picture

SECONDS_BETWEEN_QUESTIONS = 30.0
"""To the cluster, about a job that waits."""

_HOME, _TO_END_OF_LINE, _TO_END = "\033[H", "\033[K", "\033[J"
_CLEAR = "\033[2J"


def run_folder_of(run: Path, overrides: Sequence[str]) -> Path:
    """The folder of a run that is named by it or by its run file.

    Raises:
        UserError: There is no run.
    """
    folder = run
    if run.is_file():
        if is_flywheel(run):
            stages = [str(stage.folder) for stage in read_flywheel(run, overrides).stages if stage.does == "train"]
            raise UserError(f"{run} has stages, each a run of its own; watch one of {', '.join(stages)}")
        folder = Path(load_config(run, overrides).output_dir)
    elif overrides:
        raise UserError(f"{overrides[0]} changes a run file, and {run} is none; name the run file, or the folder alone")
    if not is_run_folder(folder):
        raise UserError(
            f"there is no run in {folder}; name the output_dir of one, and wait some seconds where it has just begun"
        )
    return folder


def watch(
    folder: Path,
    interval: float,
    *,
    once: bool = False,
    waiting: Callable[[], str | None] = lambda: None,
    stream: TextIO | None = None,
) -> int:
    """Draw a run until it has ended.

    Args:
        interval: Seconds between two looks.
        once: Draw it once.
        waiting: What a cluster says of the run's job, where one waits.

    Returns:
        The run's exit code; with ``once`` 0 where it goes on; 130 after Ctrl-C.
    """
    stream = stream or sys.stdout
    following, job = Following(folder), _Asked(waiting)
    draws = stream.isatty() and os.environ.get("TERM") != "dumb"
    unicode = _can_write(stream, BLOCKS)
    before: View | None = None
    try:
        with _woken() as wake:
            while True:
                wake.clear()
                view = following.look()
                waits = job.answer() if view.state in ("none", "stopped", "killed") else None
                if once or draws:
                    width, height = shutil.get_terminal_size()
                    text = picture(view, width, height, waits=waits, unicode=unicode)
                    stream.write(f"{text}\n" if once else _drawn(text, is_first=before is None))
                else:
                    for line in _lines(before, view, waits):
                        stream.write(f"{line}\n")
                stream.flush()
                if once or (view.has_ended and waits is None):
                    return _code(view) if view.has_ended and waits is None else 0
                before = view
                wake.wait(interval)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


class _Asked:
    """A question that is asked now and then."""

    def __init__(self, ask: Callable[[], str | None]) -> None:
        self._ask, self._at = ask, -SECONDS_BETWEEN_QUESTIONS
        self._answer: str | None = None

    def answer(self) -> str | None:
        """The last answer."""
        if monotonic() - self._at >= SECONDS_BETWEEN_QUESTIONS:
            self._answer, self._at = self._ask(), monotonic()
        return self._answer


@contextmanager
def _woken() -> Iterator[threading.Event]:
    """An event that is set when the terminal has another size."""
    wake = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wake
        return
    previous = signal.signal(signal.SIGWINCH, lambda *_: wake.set())
    try:
        yield wake
    finally:
        signal.signal(signal.SIGWINCH, previous)


def _drawn(text: str, *, is_first: bool) -> str:
    """Over the last picture, without a flicker of an empty screen."""
    lines = text.replace("\n", f"{_TO_END_OF_LINE}\n")
    return f"{_CLEAR if is_first else ''}{_HOME}{lines}{_TO_END_OF_LINE}\n{_TO_END}"


def _lines(before: View | None, view: View, waits: str | None) -> Iterator[str]:
    """What a pipe gets: what is new."""
    yield from news(before, view)
    if before is None or (view.step, view.state) != (before.step, before.state):
        yield one_line(view, waits)


def _code(view: View) -> int:
    if view.state == "finished":
        return 0
    return view.exit_code if view.exit_code is not None else 1


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
