"""What rank 0 says on the terminal while a run goes on.

    step 120/600  epoch 2/3  loss 1.2345  lr 9.50e-06  grad norm 0.812  93.1 pairs/s  41.2 GB  12:05 left

stands there every `logging_steps` steps, with the loss of all pairs since the line before. Where nothing has been said
for a minute, in an evaluation of fifty thousand pages, in a mining, in one long step, a line says what the run is at
and how far. Both are all that a pipe or a file gets.

A terminal gets, besides, a last line that is drawn anew twice a second: a bar, and the same things as they are now.
What anything prints goes above it.

A thread reads the place from `farnear.training.watch`, so whatever tells the watchdog where it is is shown here too.
"""

import math
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from time import monotonic
from typing import Any, TextIO

from tqdm import tqdm

from farnear.course import Course, Pace, duration
from farnear.training.metrics import mean_loss
from farnear.training.watch import Place, Watch
from farnear.wording import amount

SECONDS_OF_SILENCE = 60.0
_SECONDS_BETWEEN_DRAWS = 0.5
_BAR = 16
# Phases beside the steps, which may take minutes; whatever else there is passes within one.
_BESIDE = ("evaluation", "mining", "first stage", "save", "export", "checkpoint")


class Terminal:
    """Speaks while it is open; before and after, step lines alone come through.

    Args:
        watch: Knows where the rank is.
        is_main: Whether this rank speaks.
    """

    def __init__(self, watch: Watch, *, is_main: bool = True) -> None:
        self._watch, self._is_main = watch, is_main
        self.pace = Pace()
        self._course: Course | None = None
        self._logging_steps = 1
        self._since_line: list[Mapping[str, Any]] = []
        self._last: Mapping[str, Any] | None = None
        self._said_at = monotonic()
        self._stretch = _Stretch(watch.place)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: _LiveLine | None = None

    def begin(self, course: Course | None = None, logging_steps: int = 1) -> None:
        """What was to be opened is open: from now on there is something to draw. A training has a course."""
        self._course, self._logging_steps = course, logging_steps
        if self._thread is not None and is_terminal(sys.stdout):
            self._live = _LiveLine()

    def step(self, record: Mapping[str, Any]) -> None:
        """Take a step's line of metrics.jsonl, and print one when it is due."""
        assert self._course is not None
        self.pace.step(record)
        self._since_line.append(record)
        self._last = record
        step, total = record["step"], self._course.total_steps
        if step % self._logging_steps and step != total:
            return
        self._say(step_line(record, self._course, mean_loss(self._since_line), self.pace))
        self._since_line.clear()

    def __enter__(self) -> "Terminal":
        if self._is_main:
            self._said_at = monotonic()
            self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the last line away, and speak no more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._live is not None:
            self._live.close()
            self._live = None

    def _say(self, text: str) -> None:
        self._said_at = monotonic()
        print(text, flush=True)

    def _run(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_DRAWS):
            place = self._watch.place
            self._stretch = self._stretch.at(place)
            if self._live is not None:
                self._live.draw(*self._now(place))
            elif monotonic() - self._said_at > SECONDS_OF_SILENCE:
                self._say(self._where(place))

    def _now(self, place: Place) -> tuple[int, int, str]:
        """What the live line shows: (done, total, text)."""
        course, record = self._course, self._last
        if course is None:
            count = place.count
            text = f"{place.in_step}{self._stretch.left()}"
            return (0, 1, text) if count is None else (count.done, count.total, text)
        step = record["step"] if record is not None else max((place.step or 0) - 1, 0)
        if _is_beside(place):
            count = place.count
            head = f"step {place.step:,}: " if place.step else ""
            text = f"{head}{place.in_step}{self._stretch.left()}{self._saving(place)}"
            return (count.done, count.total, text) if count is not None else (step, course.total_steps, text)
        parts = [f"step {step:,}/{course.total_steps:,}"]
        if record is not None:
            parts += [f"loss {_loss(record['loss'])}", *_speed(record), self.pace.left_text(course, step)]
        parts.append(place.in_step)
        return step, course.total_steps, "  ".join(filter(None, parts)) + self._saving(place)

    def _where(self, place: Place) -> str:
        """What a line after a minute of silence says."""
        course = self._course
        step = "" if not place.step else f"step {place.step}" + (f"/{course.total_steps}" if course else "") + ": "
        return f"{step}{place.in_step}{self._stretch.left() or self._stretch.since()}{self._saving(place)}"

    def _saving(self, place: Place) -> str:
        """What the thread that saves is at, where the training waits for it."""
        saves = self._watch.saves
        return f" ({saves})" if saves is not None and place.phase.startswith("save") else ""


class _Stretch:
    """One phase of one step, since it was first seen."""

    def __init__(self, place: Place) -> None:
        self._first = self._now = place
        self._began = monotonic()

    def at(self, place: Place) -> "_Stretch":
        """This one, or the next."""
        if _kind(place) != _kind(self._first):
            return _Stretch(place)
        self._now = place
        return self

    def left(self) -> str:
        """How much is left of what is counted; empty where nothing is, or it has only begun."""
        first, now = self._first.count, self._now.count
        if first is None or now is None or now.done <= first.done:
            return ""
        seconds = (now.total - now.done) * (monotonic() - self._began) / (now.done - first.done)
        return f", {duration(seconds)} left"

    def since(self) -> str:
        """How long it has lasted."""
        return f", for {duration(monotonic() - self._began)}"


class _LiveLine:
    """The last line of the terminal, below all that is printed."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._out, self._err = sys.stdout, sys.stderr
        self._text = ""
        sys.stdout = _Above(self._out, self)
        if is_terminal(self._err):
            sys.stderr = _Above(self._err, self)

    def draw(self, done: int, total: int, text: str) -> None:
        """Draw it anew."""
        width = shutil.get_terminal_size().columns - 1
        ascii_only = None if (self._out.encoding or "").lower().startswith("utf") else True
        form = f"|{{bar:{min(_BAR, max(width // 5, 1))}}}| {{desc}}"
        line = tqdm.format_meter(done, max(total, 1), 0, ncols=width, ascii=ascii_only, bar_format=form, prefix=text)
        with self._lock:
            if line != self._text:
                self._text = line
                self._put()

    def print(self, stream: TextIO, lines: str) -> None:
        """Write whole lines above it."""
        with self._lock:
            self._out.write("\r\033[K")
            self._out.flush()
            stream.write(lines)
            stream.flush()
            self._put()

    def close(self) -> None:
        """Take it away."""
        with self._lock:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, _Above):
                    stream.end()
            self._text = ""
            self._put()
            sys.stdout, sys.stderr = self._out, self._err

    def _put(self) -> None:
        self._out.write(f"\r{self._text}\033[K")
        self._out.flush()


class _Above:
    """A standard stream whose lines go above the live line, each when it is whole."""

    def __init__(self, stream: TextIO, live: _LiveLine) -> None:
        self._stream, self._live, self._begun = stream, live, ""

    def write(self, text: str) -> int:
        lines, newline, rest = (self._begun + text).rpartition("\n")
        self._begun = rest
        if newline:
            self._live.print(self._stream, lines + newline)
        return len(text)

    def end(self) -> None:
        """Let go what is no whole line."""
        if self._begun:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def step_line(record: Mapping[str, Any], course: Course, loss: float | None, pace: Pace) -> str:
    """A step's line on the terminal.

    Args:
        record: The step's line of metrics.jsonl.
        loss: Of the pairs since the line before.
    """
    norm = f"{record['grad_norm']:.3f}"
    if math.isnan(record["grad_norm"]):
        # Where nothing is left out, fp16 has scaled a gradient too far up.
        norm = f"none, {what} not finite" if (what := record["left_out"]) else "too large for fp16, step skipped"
    parts = [
        f"step {record['step']}/{course.total_steps}",
        f"epoch {record['epoch'] + 1}/{course.epochs}",
        f"loss {loss or 0.0:.4f}",
        f"lr {record['lr']:.2e}",
        f"grad norm {norm}",
        *_speed(record),
        pace.left_text(course, record["step"]),
    ]
    return "  ".join(filter(None, parts))


def is_terminal(stream: TextIO) -> bool:
    """Whether lines can be drawn anew there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _speed(record: Mapping[str, Any]) -> list[str]:
    return [f"{record['pairs_per_s']:.1f} pairs/s", amount(record["peak_memory_bytes"])]


def _loss(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def _is_beside(place: Place) -> bool:
    return place.count is not None or place.phase.startswith(_BESIDE)


def _kind(place: Place) -> tuple[object, ...]:
    return place.phase, place.step, place.count.what if place.count is not None else None
