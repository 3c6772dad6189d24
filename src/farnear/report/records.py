"""What a run folder's files say, checked line by line.

A report is drawn while a run is going on, after it has ended and after it has crashed, so every file but ``run.yaml``
may be missing or empty. What is there, though, must be right: a line that cannot be read is an error that names it,
never a point that quietly is not on the chart. A run that was resumed goes back to its checkpoint's step: lines of that
step and later ones that stand before the new line led to nothing any more. They are left out, and counted to be shown.

A figure that is not finite is written as NaN, Infinity or null by different writers. All of them become a float here
and show as a mark on the chart.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from farnear.errors import UserError
from farnear.report.gallery import Gallery, read_gallery
from farnear.report.lines import Record, records_of
from farnear.run_folder import RunFolder
from farnear.status import read_status

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
    padding_share: float | None = None
    quarantined: float | None = None


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
class Mining:
    """Hard negatives found anew by the model as it was after a step, a line of ``mined.jsonl``."""

    step: int
    pairs: int
    negatives: int
    pairs_with_fewer: int
    seconds: float


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
    minings: tuple[Mining, ...] = ()
    gallery: Gallery | None = None
    status: dict[str, object] = field(default_factory=dict)


def read_run(run_folder: Path) -> Run:
    """Read a run folder. Raises UserError, naming file and line, where it is not one or a file is damaged."""
    config_file = run_folder / "run.yaml"
    try:
        config = config_file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{run_folder} holds no run.yaml, so it is not a run folder: give the folder that a training wrote"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{config_file} is not UTF-8 text, so it is damaged: restore it from a copy") from None
    steps: list[Step] = []
    steps_undone = 0
    for record in records_of(run_folder / "metrics.jsonl"):
        step = _step(record)
        while steps and steps[-1].step >= step.step:
            steps.pop()
            steps_undone += 1
        steps.append(step)
    evaluations: list[Evaluation] = []
    for record in records_of(run_folder / "eval.jsonl"):
        evaluation = _evaluation(record)
        while evaluations and _moment(evaluations[-1]) >= _moment(evaluation):
            evaluations.pop()
        evaluations.append(evaluation)
    folder = RunFolder(run_folder)
    return Run(
        name=run_folder.resolve().name,
        config=config,
        steps=tuple(steps),
        evaluations=tuple(evaluations),
        summary=_summary(run_folder / "summary.json"),
        steps_undone=steps_undone,
        lost_to_faults=tuple(_fault(record) for record in records_of(run_folder / "faults.jsonl")),
        quarantined=tuple(_quarantined(record) for record in records_of(run_folder / "quarantine.jsonl")),
        minings=tuple(_mining(record) for record in records_of(folder.minings)),
        gallery=read_gallery(folder),
        status=read_status(folder) or {},
    )


def _step(record: Record) -> Step:
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
        **{key: record.number(key) for key in ("padding_share", "quarantined") if key in record.value},
    )


def _mining(record: Record) -> Mining:
    counts = {key: record.count(key) for key in ("step", "pairs", "negatives", "pairs_with_fewer")}
    return Mining(**counts, seconds=record.number("seconds"))


def _evaluation(record: Record) -> Evaluation:
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


def _fault(record: Record) -> LeftOut:
    name = record.text("shard").rpartition("/")[2]
    where = f"{name} at byte {record.count('offset'):,}"
    return LeftOut(where, f"{record.text('kind')}: {record.text('detail')}", record.count("pairs_lost"))


def _quarantined(record: Record) -> LeftOut:
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
