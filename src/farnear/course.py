"""What a run goes through from its first step to its last, and how long the rest of it takes.

The run tells it in `status.json` once it knows, so that whoever looks at the run from outside reckons as the run does:
steps by the mean of the last ones, evaluations, minings and waits for saves by the last of their kind. What has not
happened yet has no known length; it is named instead, and left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeGuard

RECENT = 50
"""Steps whose mean is taken."""
_MOST_RANKS = 2**20
_MOST = 2.0**53
"""Whole numbers below it are floats too; no figure of a run is as large."""


@dataclass(frozen=True)
class Course:
    """What a run goes through.

    Attributes:
        total_steps: From its first step on.
        epochs: That these steps touch.
        ranks: Processes that train.
        eval_steps, save_steps, refresh_steps: Intervals in steps; None means never.
        evaluates: Whether there is anything to evaluate, which is done when the last step is.
    """

    total_steps: int
    epochs: int
    ranks: int
    eval_steps: int | None = None
    save_steps: int | None = None
    refresh_steps: int | None = None
    evaluates: bool = False

    def as_plain(self) -> dict[str, Any]:
        """For `status.json`."""
        return asdict(self)


FACTS = tuple(field.name for field in fields(Course))


def course_of(status: Mapping[str, Any]) -> Course | None:
    """From `status.json`; None where the run has not told it, or somebody has made something else of it."""
    intervals = [status.get(name) for name in ("eval_steps", "save_steps", "refresh_steps")]
    counts = [status.get(name) for name in ("total_steps", "epochs", "ranks")] + [x for x in intervals if x is not None]
    if not all(map(is_count, counts)) or status["ranks"] > _MOST_RANKS or not isinstance(status.get("evaluates"), bool):
        return None
    return Course(**{name: status.get(name) for name in FACTS})  # type: ignore[arg-type]


class Pace:
    """How long steps take, and what else a run does beside them."""

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._last: dict[str, float] = {}

    def step(self, record: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl."""
        phases = record.get("seconds")
        if isinstance(phases, Mapping):
            self._steps = [*self._steps[-RECENT + 1 :], sum(filter(_is_time, phases.values()))]

    def took(self, what: str, seconds: Any) -> None:
        """Take what one evaluation ("during", "after"), "mining" or wait for a "save" has taken."""
        if _is_time(seconds):
            # Both look at everything.
            self._last["after" if what == "before" else what] = seconds

    def take(
        self,
        *,
        steps: Iterable[Mapping[str, Any]] = (),
        evaluations: Iterable[Mapping[str, Any]] = (),
        minings: Iterable[Mapping[str, Any]] = (),
        saves: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Take lines of metrics.jsonl, eval.jsonl, mined.jsonl and saves.jsonl."""
        for record in steps:
            self.step(record)
        for record in evaluations:
            self.took(str(record.get("kind")), record.get("seconds"))
        for record in minings:
            self.took("mining", record.get("seconds"))
        for record in saves:
            self.took("save", record.get("seconds_waited"))

    def left(self, course: Course, step: int) -> tuple[float, Sequence[str]] | None:
        """(seconds from the end of ``step`` to that of the run, what is left out of them); None before any step.

        The first step of a start, which warms up, counts only while it is alone.
        """
        known = self._steps[1:] if 1 < len(self._steps) < RECENT else self._steps
        if not known:
            return None
        seconds = sum(known) / len(known) * (course.total_steps - step)
        to_come = {
            "during": ("evaluations", _due(course.eval_steps if course.evaluates else None, course, step)),
            "mining": ("minings", _due(course.refresh_steps, course, step, at_end=False)),
            "save": ("saves", _due(course.save_steps, course, step)),
            "after": ("the evaluation at the end", int(course.evaluates)),
        }
        unknown = []
        for kind, (name, count) in to_come.items():
            if kind in self._last:
                seconds += count * self._last[kind]
            elif count and kind != "save":  # the training hardly waits for one
                unknown.append(name)
        return seconds, unknown

    def left_text(self, course: Course, step: int) -> str:
        """How much is left, in words: ``1:23:45 left``; empty before any step."""
        known = self.left(course, step)
        if known is None:
            return ""
        seconds, unknown = known
        return f"{duration(seconds)} left" + (f" without {' and '.join(unknown)}" if unknown else "")


def duration(seconds: float) -> str:
    """``0:07``, ``12:05``, ``3:00:00``, ``2 days 3:00:00``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours or days else f"{minutes}:{seconds:02d}"
    return f"{days} day{'' if days == 1 else 's'} {clock}" if days else clock


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a record can be reckoned with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a number of steps, ranks, pages."""
    return is_number(value) and isinstance(value, int) and value >= 0


def _due(interval: int | None, course: Course, step: int, *, at_end: bool = True) -> int:
    """How often what comes every so many steps is still to come."""
    if not interval:
        return 0
    last = course.total_steps if at_end else course.total_steps - 1
    return max(0, last // interval - step // interval)


def _is_time(value: Any) -> bool:
    return is_number(value) and value >= 0
