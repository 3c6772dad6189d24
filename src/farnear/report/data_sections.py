"""What the report says of time and data: where the seconds went, and what became of pairs and tokens.

As in ``sections``, nothing is computed but sums, means and shares, and what is not finite is said to be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite, nan

from markupsafe import Markup

from farnear.report import bars
from farnear.report.records import LeftOut, Mining, Run, Step
from farnear.report.sections import ABSENT, Chart, chart_of, duration, sum_of_finite
from farnear.report.svg import number
from farnear.wording import counted

_LOSSES_SHOWN = 50
_MININGS_SHOWN = 20


@dataclass(frozen=True)
class PhaseRow:
    name: str
    seconds: str
    share: str
    per_step: str


@dataclass(frozen=True)
class MiningRow:
    step: str
    pairs: str
    negatives: str
    fewer: str
    time: str


@dataclass(frozen=True)
class Losses:
    """Pairs that could not be used; ``more`` says how many rows stand in the files beside those shown."""

    sentence: str
    rows: list[LeftOut]
    more: str


@dataclass(frozen=True)
class TimeByPhase:
    bar: Markup
    rows: list[PhaseRow]


def data_charts(steps: Sequence[Step]) -> list[Chart]:
    """What became of the steps' tokens and pairs; a count without any has a note and no drawing."""
    if not steps:
        return []
    charts = []
    if any(step.padding_share is not None for step in steps):
        padding = [nan if step.padding_share is None else 100 * step.padding_share for step in steps]
        known = [share for share in padding if isfinite(share)]
        mean = f"{fsum(known) / len(known):.1f}% in the mean of the steps" if known else ABSENT
        note = "Percent of the tokens that only fill a mini-batch up to its longest row, and are computed for nothing."
        charts.append(Chart("Padding", mean, chart_of("Padding", steps, padding).drawing, note))
    note = (
        "Pages in a batch, of other pairs or hard negatives, that answer a query too: they are none of its negatives."
    )
    charts.append(_counts("Masked negatives", steps, [step.masked for step in steps], note))
    if any(step.quarantined is not None for step in steps):
        counts = [nan if step.quarantined is None else step.quarantined for step in steps]
        note = "Pairs that could not be read or decoded: they count in no loss."
        charts.append(_counts("Quarantined pairs", steps, counts, note))
    return charts


def minings(done: Sequence[Mining]) -> list[MiningRow]:
    """The newest times that hard negatives were mined anew."""
    return [
        MiningRow(
            f"{mining.step:,}",
            f"{mining.pairs:,}",
            f"{mining.negatives:,}",
            f"{mining.pairs_with_fewer:,}",
            duration(mining.seconds),
        )
        for mining in done[-_MININGS_SHOWN:]
    ]


def _counts(title: str, steps: Sequence[Step], values: Sequence[float], note: str) -> Chart:
    total = sum_of_finite(values)
    chart = chart_of(title, steps, values, "bars")
    return Chart(title, f"{number(total, 6)} in all", chart.drawing if total else Markup(""), note)


def time_by_phase(steps: Sequence[Step]) -> TimeByPhase | None:
    """Where the seconds of the steps went; None where none were recorded."""
    phases = list(dict.fromkeys(phase for step in steps for phase in step.seconds_by_phase))
    seconds = {phase: sum_of_finite([step.seconds_by_phase.get(phase, 0.0) for step in steps]) for phase in phases}
    total = fsum(seconds.values())
    if not total > 0:
        return None
    name_of_phase = {phase: phase.replace("_", " ").capitalize() for phase in phases}
    rows = [
        PhaseRow(
            name_of_phase[phase],
            duration(seconds[phase]),
            f"{seconds[phase] / total:.1%}",
            f"{number(1000 * seconds[phase] / len(steps))} ms",
        )
        for phase in phases
    ]
    shares = [(name_of_phase[phase], seconds[phase] / total) for phase in phases]
    return TimeByPhase(bars.stacked_bar("Time by phase", shares), rows)


def left_out(run: Run) -> Losses | None:
    """Pairs that the shards' faults cost, and those quarantined on the way; None where there are none."""
    rows = [*run.lost_to_faults, *run.quarantined]
    if not rows:
        return None
    lost = sum(fault.pairs for fault in run.lost_to_faults)
    quarantined = len({one.where for one in run.quarantined})
    sentence = (
        f"{counted(lost, 'pair')} or more lost to {counted(len(run.lost_to_faults), 'fault')} of the shards "
        f"(faults.jsonl), {counted(quarantined, 'pair')} quarantined in training (quarantine.jsonl)."
    )
    more = f"and {len(rows) - _LOSSES_SHOWN:,} more" if len(rows) > _LOSSES_SHOWN else ""
    return Losses(sentence, rows[:_LOSSES_SHOWN], more)
