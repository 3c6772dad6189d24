"""What a run folder's files say, checked line by line.

A report is drawn while a run is going on, after it has ended and after it has crashed, so every file but ``run.yaml``
may be missing or empty. What is there, though, must be right: a line that cannot be read is an error that names it,
never a point that quietly is not on the chart. A run that was resumed goes back to its checkpoint's step: lines of that
step and later ones that stand before the new line led to nothing any more. They are left out, and counted to be shown.

A figure that is not finite is written as NaN, Infinity or null by different writers. All of them become a float here
and show as a mark on the chart.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path

from farnear.errors import UserError

HEADLINE = "ndcg@10"  # the measure that every evaluation must hold


@dataclass(frozen=True)
class Step:
    """One optimizer step, a line of ``metrics.jsonl``."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    pairs_per_s: float
    masked: float
    tokens: float
    peak_memory_bytes: float
    seconds_by_phase: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, a line of ``eval.jsonl``: the measures of each Matryoshka dimension.

    Of a reranker's pages ``embedder`` is the headline measure in the order of the embedder that found them, if one did.
    """

    step: int
    kind: str
    queries: int
    pages: int
    measures_by_dim: dict[int, dict[str, float]]
    embedder: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """Pairs that could not be used: a line of ``faults.jsonl``, or one of ``quarantine.jsonl``."""

    where: str
    reason: str
    pairs: int  # at least


@dataclass(frozen=True)
class Run:
    """A run folder's files. Steps and evaluations ascend; ``steps_undone`` counts lines that a resume replaced."""

    name: str
    config: str
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    summary: dict[str, object]
    steps_undone: int
    lost_to_faults: tuple[LeftOut, ...] = ()
    quarantined: tuple[LeftOut, ...] = ()


def read_run(run_folder: Path) -> Run:
    """Read a run folder. Raises UserError, naming file and line, where it is not one or a file is damaged."""
    config_file = run_folder / "run.yaml"
    try:
        config = config_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{run_folder} holds no run.yaml, so it is not a run folder: give the folder that a training wrote"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{config_file} is not UTF-8 text, so it is damaged: restore it from a copy") from None
    steps: list[Step] = []
    steps_undone = 0
    for record in _records(run_folder / "metrics.jsonl"):
        step = _step(record)
        while steps and steps[-1].step >= step.step:
            steps.pop()
            steps_undone += 1
        steps.append(step)
    evaluations: list[Evaluation] = []
    for record in _records(run_folder / "eval.jsonl"):
        evaluation = _evaluation(record)
        while evaluations and _moment(evaluations[-1]) >= _moment(evaluation):
            evaluations.pop()
        evaluations.append(evaluation)
    return Run(
        name=run_folder.resolve().name,
        config=config,
        steps=tuple(steps),
        evaluations=tuple(evaluations),
        summary=_summary(run_folder / "summary.json"),
        steps_undone=steps_undone,
        lost_to_faults=tuple(_fault(record) for record in _records(run_folder / "faults.jsonl")),
        quarantined=tuple(_quarantined(record) for record in _records(run_folder / "quarantine.jsonl")),
    )


@dataclass(frozen=True)
class _Record:
    """A line's object with its place, so that a wrong value can be named."""

    place: str
    value: dict[str, object]

    def refuse(self, problem: str) -> UserError:
        return UserError(
            f"{self.place}: {problem}, so the report would be wrong: remove the line or restore the file from a copy"
        )

    def number(self, key: str) -> float:
        if key not in self.value:
            raise self.refuse(f"{key!r} is missing")
        value = self.value[key]
        if value is None:
            return nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(f"{key!r} is {value!r}, not a number")
        return float(value)

    def count(self, key: str) -> int:
        number = self.number(key)
        if not number.is_integer() or number < 0:
            raise self.refuse(f"{key!r} is {self.value[key]!r}, not a whole number of 0 or more")
        return int(number)

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str):
            raise self.refuse(f"{key!r} is {'missing' if key not in self.value else f'{value!r}, not a text'}")
        return value

    def inner(self, key: str) -> "_Record":
        value = self.value.get(key)
        if not isinstance(value, dict):
            raise self.refuse(f"{key!r} is {'missing' if key not in self.value else 'not an object'}")
        return _Record(self.place, value)


def _records(path: Path) -> Iterator[_Record]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path} line {number}"
        try:
            value = json.loads(line)
        except ValueError:
            raise _Record(place, {}).refuse("this is not a complete JSON object") from None
        if not isinstance(value, dict):
            raise _Record(place, {}).refuse("this is not a JSON object")
        yield _Record(place, value)


def _step(record: _Record) -> Step:
    seconds = record.inner("seconds")
    return Step(
        step=record.count("step"),
        epoch=record.number("epoch"),
        loss=record.number("loss"),
        lr=record.number("lr"),
        grad_norm=record.number("grad_norm"),
        pairs_per_s=record.number("pairs_per_s"),
        masked=record.number("masked"),
        tokens=record.number("tokens"),
        peak_memory_bytes=record.number("peak_memory_bytes"),
        seconds_by_phase={phase: seconds.number(phase) for phase in seconds.value},
    )


def _evaluation(record: _Record) -> Evaluation:
    kind = record.value.get("kind")
    if kind not in ("before", "during", "after"):
        raise record.refuse(f"'kind' is {kind!r}, not before, during or after")
    by_dim = record.inner("metrics")
    if not by_dim.value:
        raise record.refuse("'metrics' is empty")
    wrong = [dim for dim in by_dim.value if not (dim.isascii() and dim.isdigit())]
    if wrong:
        raise record.refuse(f"'metrics' has the key {wrong[0]!r}, which is not a number of dimensions")
    measures_by_dim: dict[int, dict[str, float]] = {}
    for dim in by_dim.value:
        measures = by_dim.inner(dim)
        measures.number(HEADLINE)
        measures_by_dim[int(dim)] = {name: measures.number(name) for name in measures.value}
        for name, value in measures_by_dim[int(dim)].items():
            if value < 0 or value > 1:
                raise record.refuse(f"{name!r} at {dim} dimensions is {value}, outside 0 to 1")
    return Evaluation(
        step=record.count("step"),
        kind=str(kind),
        queries=record.count("queries"),
        pages=record.count("pages"),
        measures_by_dim=measures_by_dim,
        embedder=record.inner("embedder").number(HEADLINE) if record.value.get("embedder") else None,
    )


def _fault(record: _Record) -> LeftOut:
    name = record.text("shard").rpartition("/")[2]
    where = f"{name} at byte {record.count('offset'):,}"
    return LeftOut(where, f"{record.text('kind')}: {record.text('detail')}", record.count("pairs_lost"))


def _quarantined(record: _Record) -> LeftOut:
    why = f"{record.text('input')} {record.text('reason')}, step {record.count('step'):,}"
    return LeftOut(f"{record.text('shard')}/{record.text('key')}", why, 1)


def _moment(evaluation: Evaluation) -> tuple[int, int]:
    return evaluation.step, ("before", "during", "after").index(evaluation.kind)


def _summary(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object, so it is damaged: remove it or restore it from a copy")
    return value
