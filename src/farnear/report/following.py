"""A run as its folder shows it at this moment, for who looks again and again (`farnear watch`).

Everything is read from files, so a run on other machines is seen through a shared disk, and is never touched. How long
ago a rank was heard of is counted from when its heartbeat was seen to change, since machines' clocks differ; at the
first look the clocks are all there is.
"""

import json
import os
import platform
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any

from farnear.course import Course, Pace, course_of, is_count, is_number
from farnear.report.tail import Record, Tail, samples
from farnear.run_folder import RunFolder
from farnear.status import read_status

SECONDS_OF_SILENCE = 30.0
"""A rank tells where it is every ten seconds at least."""

_POINTS = 2048
_SAMPLES = 120
_RECENT = 50  # steps whose phases are averaged


@dataclass(frozen=True)
class Rank:
    """One rank, by its heartbeat.

    Attributes:
        place: Where it is; None where there is no heartbeat.
        mark: What is wrong with it, if anything seems so.
    """

    number: int
    place: str | None
    seconds_ago: float = 0.0
    step: int | None = None
    mark: str = ""


@dataclass(frozen=True)
class View:
    """A run at one moment.

    Attributes:
        state: That of `status.json`; "none" before there is one, "killed" where it says running and nobody does.
        step: The last one that is done; None before the first.
        last: Its line of metrics.jsonl.
        recent: Those of the last ones.
        losses: (step, loss) over the whole run, thinned.
        before, now: The first and the last evaluation's line of everything, or of the sample while there is none else.
        bad_steps, quarantined: Lines of these files.
    """

    folder: Path
    state: str
    reason: str | None = None
    exit_code: int | None = None
    checkpoint: str | None = None
    best: str | None = None
    course: Course | None = None
    pace: Pace = field(default_factory=Pace)
    step: int | None = None
    last: Record = field(default_factory=dict)
    recent: Sequence[Record] = ()
    losses: Sequence[tuple[int, float]] = ()
    evaluations: Sequence[Record] = ()
    saves: Sequence[Record] = ()
    minings: Sequence[Record] = ()
    ranks: Sequence[Rank] = ()
    bad_steps: Sequence[Record] = ()
    quarantined: int = 0
    silent_for: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to come, unless it is started again."""
        return self.state in ("finished", "stopped", "failed", "killed")


class Following:
    """Looks at a run folder."""

    def __init__(self, path: Path) -> None:
        self._folder = RunFolder(path)
        self._metrics = Tail(self._folder.metrics)
        small = ("evaluations", "saves", "minings", "bad_steps", "quarantine")
        self._tails = {name: Tail(getattr(self._folder, name)) for name in small}
        self._records: dict[str, list[Record]] = {name: [] for name in small}
        self._recent: deque[Record] = deque(maxlen=_RECENT)
        self._losses: list[tuple[int, float]] = []
        self._has_looked = False
        self._beats: dict[int, _Beat] = {}

    def look(self) -> View:
        """The run as it is now."""
        self._read_metrics()
        for name, tail in self._tails.items():
            is_anew, records = tail.look()
            self._records[name] = records if is_anew else self._records[name] + records
        self._read_heartbeats()
        status = read_status(self._folder) or {}
        course = course_of(status)
        state = str(status.get("state", "none"))
        silent_for = min((beat.seconds_ago for beat in self._beats.values()), default=None)
        if state == "running" and (silent_for or 0.0) > SECONDS_OF_SILENCE and _is_gone(status):
            state = "killed"
        last = self._recent[-1] if self._recent else {}
        pace = Pace()
        pace.take(
            steps=self._recent,
            evaluations=self._records["evaluations"],
            minings=self._records["minings"],
            saves=self._records["saves"],
        )
        code = status.get("exit_code")
        return View(
            folder=self._folder.path,
            state=state,
            reason=status.get("reason"),
            exit_code=1 if state == "killed" else code if isinstance(code, int) else None,
            checkpoint=_name_in(self._folder.latest) if state == "running" else _name(status.get("checkpoint")),
            best=_name_in(self._folder.best),
            course=course,
            pace=pace,
            step=last.get("step", status["step"] or None if is_count(status.get("step")) else None),
            last=last,
            recent=tuple(self._recent),
            losses=tuple(self._losses),
            evaluations=self._records["evaluations"],
            saves=self._records["saves"],
            minings=self._records["minings"],
            ranks=tuple(self._ranks(course, state)),
            bad_steps=self._records["bad_steps"],
            quarantined=len({(str(one.get("shard")), str(one.get("key"))) for one in self._records["quarantine"]}),
            silent_for=silent_for,
        )

    def _read_metrics(self) -> None:
        is_anew, records = self._metrics.look()
        records = [record for record in records if is_count(record.get("step"))]
        if is_anew or not self._has_looked:
            self._recent.clear()
            self._losses = []
            first = records[0]["step"] if records else 0
            earlier = samples(self._folder.metrics, _SAMPLES) if first > 1 else []
            self._add_losses([one for one in earlier if is_count(one.get("step")) and one["step"] < first])
        self._has_looked = self._has_looked or bool(records)
        self._recent.extend(records)
        self._add_losses(records)

    def _add_losses(self, records: Sequence[Record]) -> None:
        self._losses += [(one["step"], one["loss"]) for one in records if is_number(one.get("loss"))]
        while len(self._losses) > _POINTS:
            pairs = zip(self._losses[::2], self._losses[1::2], strict=False)
            rest = self._losses[-1:] if len(self._losses) % 2 else []
            self._losses = [((a + b) // 2, (x + y) / 2) for (a, x), (b, y) in pairs] + rest

    def _read_heartbeats(self) -> None:
        found: dict[int, _Beat] = {}
        try:
            entries = [entry for entry in os.scandir(self._folder.heartbeats) if entry.name.endswith(".json")]
        except OSError:
            entries = []
        for entry in entries:
            try:
                number = int(entry.name.removeprefix("rank-").removesuffix(".json"))
                changed = entry.stat().st_mtime_ns
                before = self._beats.get(number)
                if before is not None and before.changed == changed:
                    found[number] = before
                    continue
                facts = json.loads(Path(entry.path).read_text(encoding="utf-8"))
                found[number] = _Beat(facts, changed, before)
            except (OSError, ValueError, TypeError):
                continue  # ended, or replaced, meanwhile
        self._beats = found

    def _ranks(self, course: Course | None, state: str) -> Iterator[Rank]:
        """Every rank of which something is known, or should be."""
        if state != "running":
            return
        furthest = max((beat.step or 0 for beat in self._beats.values()), default=0)
        told_furthest = min((beat.told_at for beat in self._beats.values() if (beat.step or 0) == furthest), default="")
        for number in sorted({*range(course.ranks if course else 0), *self._beats}):
            beat = self._beats.get(number)
            if beat is None:
                yield Rank(number, None, mark="no heartbeat")
                continue
            mark = ""
            if beat.seconds_ago > SECONDS_OF_SILENCE:
                mark = "silent"
            elif furthest > (beat.step or 0) and beat.told_at > told_furthest:
                mark = f"{furthest - (beat.step or 0)} behind"
            elif (stands := beat.stands_for) > SECONDS_OF_SILENCE:
                mark = f"stands for {stands:.0f} s"
            yield Rank(number, beat.place, beat.seconds_ago, beat.step, mark)


class _Beat:
    """A heartbeat, and when it was seen first."""

    def __init__(self, facts: Mapping[str, Any], changed: int, before: "_Beat | None") -> None:
        self.changed = changed
        self.told_at = str(facts.get("time", ""))
        self.place = str(facts.get("place", ""))
        step = facts.get("step")
        self.step = step if is_count(step) else None
        self._seen_at = monotonic()
        self._age_when_seen = 0.0 if before is not None else _age(self.told_at)
        self._moves = (facts.get("pid"), facts.get("moves"))
        is_still = before is not None and before._moves == self._moves
        self._moved_at: float = before._moved_at if before is not None and is_still else self._seen_at

    @property
    def seconds_ago(self) -> float:
        """Since the rank has told it."""
        return self._age_when_seen + monotonic() - self._seen_at

    @property
    def stands_for(self) -> float:
        """Seconds between the beats since which the rank has not moved, by what was seen of them."""
        return self._seen_at - self._moved_at


def is_run_folder(path: Path) -> bool:
    """Whether a run, or a job that waits, has left anything there."""
    folder = RunFolder(path)
    return any(one.exists() for one in (folder.lock, folder.status, folder.metrics, folder.submitted))


def _is_gone(status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote the status was on this machine and is no more."""
    pid = status.get("pid")
    if status.get("host") != platform.node() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _age(time: str) -> float:
    try:
        told = datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return 0.0
    return max(0.0, (datetime.now(timezone.utc) - told).total_seconds())


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _name_in(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
