"""What each part of the report says, as plain values and drawings for the template.

Nothing is computed that the run's files do not hold, apart from sums, medians and differences. Two rules keep the page
honest. Measures are compared only where they were taken with as many queries and pages: nDCG on a sample of the corpus
is easier than on all of it, so points of another corpus stand apart and a sentence says so. And a figure that is
missing or not finite is said to be.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite, nan
from statistics import median
from typing import Literal

from markupsafe import Markup

from farnear.report import bars
from farnear.report.figures import Series, chart_over_steps
from farnear.report.records import HEADLINE, Evaluation, Run, Step
from farnear.report.svg import number
from farnear.wording import amount

ABSENT = "–"  # noqa: RUF001 (a dash is how tables say that there is nothing)


@dataclass(frozen=True)
class Tile:
    """One figure at the top of the page."""

    label: str
    value: str
    detail: str = ""
    hero: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    value: str  # what it came to, beside the title
    drawing: Markup
    note: str = ""


@dataclass(frozen=True)
class ChangeRow:
    """nDCG@10 at one dimension, before training and at the newest evaluation since."""

    dim: str
    before: str
    after: str
    change: str
    bar: Markup


@dataclass(frozen=True)
class Change:
    after_label: str
    axis: Markup
    rows: list[ChangeRow]
    note: str
    warning: str


@dataclass(frozen=True)
class Measures:
    """All measures of the newest evaluation: one row a dimension, its values in the order of ``names``."""

    title: str
    names: list[str]
    rows: list[tuple[str, list[str]]]


ONE_SCORE = 1
"""The number of dimensions of a reranker's score, by which its measures stand in the records."""


def state(run: Run) -> str:
    """How the run stands or has ended; empty where it did not say."""
    state, reason = run.status.get("state"), run.status.get("reason")
    time = str(run.status.get("time", "")).replace("T", " ").removesuffix("Z")[:16]
    if state == "running":
        return f"running, at step {run.steps[-1].step:,} when this was written" if run.steps else "running"
    if state == "finished":
        return f"finished {time} UTC"
    return f"{state} {time} UTC: {reason}" if state in ("stopped", "failed") else ""


def tiles(run: Run) -> list[Tile]:
    """The figures that a reader looks for first; each only where the run has written it."""
    before, newest = _before_and_newest(run.evaluations)
    shown = newest or before
    found = []
    if shown:
        dim = max(shown.measures_by_dim)
        after, earlier = _headline(shown, dim), _headline(before, dim)
        value = f"{_score(earlier)} \N{RIGHTWARDS ARROW} {_score(after)}" if newest and before else _score(after)
        what = "of the reranked pages" if dim == ONE_SCORE else f"with {dim:,} dimensions"
        found.append(Tile(f"nDCG@10 {what}", value, _when(shown), hero=True))
        if shown.embedder is not None:
            found.append(Tile("nDCG@10 by the embedder alone", _score(shown.embedder), "the order that was reranked"))
    if run.steps:
        last = run.steps[-1]
        found.append(Tile("Optimizer steps", f"{last.step:,}", f"epoch {number(last.epoch + 1)}"))
        # The summary's is a mean over the last steps: a single one may be a batch of one pair, whose loss is 0.
        loss = run.summary.get("loss")
        newest_loss = float(loss) if isinstance(loss, int | float) else last.loss
        found.append(Tile("Loss", number(newest_loss), f"from {number(run.steps[0].loss)}"))
    if "pairs_per_s" in run.summary:
        found.append(Tile("Pairs per second", plain(run.summary["pairs_per_s"])))
    elif run.steps:
        rates = [step.pairs_per_s for step in run.steps if isfinite(step.pairs_per_s)]
        found.append(Tile("Pairs per second", number(median(rates)) if rates else ABSENT, "median step"))
    seconds = run.summary.get("seconds")
    if isinstance(seconds, int | float):
        found.append(Tile("Time", duration(seconds), "in all"))
    elif run.steps:
        in_steps = sum_of_finite([value for step in run.steps for value in step.seconds_by_phase.values()])
        found.append(Tile("Time", duration(in_steps), "in steps"))
    if "world_size" in run.summary:
        strategy = plain(run.summary.get("strategy", ""))
        found.append(Tile("Processes", plain(run.summary["world_size"]), strategy))
    peaks = [step.peak_memory_bytes for step in run.steps if isfinite(step.peak_memory_bytes)]
    if any(peaks):
        found.append(Tile("Peak memory", amount(max(peaks))))
    return found


def change(evaluations: Sequence[Evaluation]) -> Change | None:
    """nDCG@10 before and after by dimension, the full one first; None without any evaluation."""
    before, newest = _before_and_newest(evaluations)
    shown = newest or before
    if shown is None:
        return None
    rows = []
    for dim in sorted({dim for found in (before, newest) if found for dim in found.measures_by_dim}, reverse=True):
        earlier, later = _headline(before, dim), _headline(newest, dim)
        difference = ABSENT if earlier is None or later is None else _signed(later - earlier)
        bar = bars.change_bar(nan if earlier is None else earlier, nan if later is None else later)
        rows.append(ChangeRow(_dim_name(dim), _score(earlier), _score(later), difference, bar))
    warning = ""
    if before and newest and _corpus(before) != _corpus(newest):
        warning = (
            f"Not the same task: {_in_words(_corpus(before))} before, {_in_words(_corpus(newest))} since. "
            "The change mixes both."
        )
    note = "" if warning else _in_words(_corpus(shown))
    return Change(_when(newest) if newest else "after", bars.change_axis(), rows, note, warning)


def ndcg_chart(evaluations: Sequence[Evaluation]) -> Chart | None:
    """nDCG@10 over steps, a line a dimension; only evaluations of one corpus are joined by a line."""
    if not evaluations:
        return None
    evaluations_of_corpus = Counter(_corpus(found) for found in evaluations)
    joined_corpus = max(evaluations_of_corpus, key=lambda corpus: (evaluations_of_corpus[corpus], corpus))
    dims = sorted({dim for found in evaluations for dim in found.measures_by_dim})
    series = []
    for corpus in sorted(evaluations_of_corpus, key=lambda corpus: corpus != joined_corpus):
        for place, dim in enumerate(dims):
            points = [found for found in evaluations if _corpus(found) == corpus and dim in found.measures_by_dim]
            if points:
                series.append(
                    Series(
                        [found.step for found in points],
                        [found.measures_by_dim[dim][HEADLINE] for found in points],
                        label=_dim_name(dim),
                        strength=1.0 if dim == dims[-1] else 0.35 + 0.5 * place / len(dims),
                        joined=corpus == joined_corpus,
                    )
                )
    note = f"{_in_words(joined_corpus)}."
    note = (
        f"A reranker's order of its candidates; {note}"
        if dims == [ONE_SCORE]
        else f"A line for each number of dimensions; {note}"
    )
    others = [corpus for corpus in evaluations_of_corpus if corpus != joined_corpus]
    if others:
        note += f" Rings apart from the lines: {'; '.join(map(_in_words, others))}, not to be compared with them."
    drawing = chart_over_steps("nDCG@10", series, "dots", value_range=(0.0, 1.0))
    newest = evaluations[-1]
    return Chart("nDCG@10 over steps", f"{_score(_headline(newest, dims[-1]))} {_when(newest)}", drawing, note)


def _dim_name(dim: int) -> str:
    return "reranked" if dim == ONE_SCORE else f"{dim:,}"


def measures(evaluations: Sequence[Evaluation]) -> Measures | None:
    if not evaluations:
        return None
    shown = evaluations[-1]
    names = list(dict.fromkeys(name for found in shown.measures_by_dim.values() for name in found))
    rows = [
        (_dim_name(dim), [_score(shown.measures_by_dim[dim].get(name)) for name in names])
        for dim in sorted(shown.measures_by_dim, reverse=True)
    ]
    return Measures(f"All measures, {_when(shown)}", [_measure_name(name) for name in names], rows)


def training_charts(steps: Sequence[Step]) -> list[Chart]:
    if not steps:
        return []
    return [
        chart_of("Loss", steps, [step.loss for step in steps]),
        chart_of("Gradient norm", steps, [step.grad_norm for step in steps]),
        chart_of("Learning rate", steps, [step.lr for step in steps]),
        chart_of("Pairs per second", steps, [step.pairs_per_s for step in steps]),
    ]


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.8 s, 2 min 33 s, 3 h 5 min."""
    if not isfinite(seconds) or seconds < 60:
        return f"{number(seconds)} s" if isfinite(seconds) else number(seconds)
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def plain(value: object) -> str:
    """A value of summary.json as text: numbers shortened, anything nested as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return number(value, 4)
    return json.dumps(value)


def chart_of(
    title: str, steps: Sequence[Step], values: Sequence[float], style: Literal["line", "bars"] = "line"
) -> Chart:
    """One value a step, and its last one beside the title."""
    drawing = chart_over_steps(title, [Series([step.step for step in steps], values)], style)
    broken = sum(not isfinite(value) for value in values)
    note = f"{broken:,} of {len(values):,} values are not finite: crosses at the top." if broken else ""
    return Chart(title, f"{number(values[-1])} at step {steps[-1].step:,}", drawing, note)


def _before_and_newest(evaluations: Sequence[Evaluation]) -> tuple[Evaluation | None, Evaluation | None]:
    """The evaluation before training and the newest one since, each None where it was not made."""
    before = next((found for found in evaluations if found.kind == "before"), None)
    since = [found for found in evaluations if found.kind != "before"]
    return before, since[-1] if since else None


def _headline(evaluation: Evaluation | None, dim: int) -> float | None:
    return None if evaluation is None else evaluation.measures_by_dim.get(dim, {}).get(HEADLINE)


def _corpus(evaluation: Evaluation) -> tuple[int, int]:
    return evaluation.queries, evaluation.pages


def _in_words(corpus: tuple[int, int]) -> str:
    return f"{corpus[0]:,} queries against {corpus[1]:,} pages"


def _when(evaluation: Evaluation) -> str:
    return f"at step {evaluation.step:,}" if evaluation.kind == "during" else f"{evaluation.kind} training"


def _measure_name(key: str) -> str:
    name, _, cut = key.partition("@")
    return {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP", "recall": "Recall"}.get(name, name) + ("@" + cut if cut else "")


def _score(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:.3f}" if isfinite(value) else number(value)


def _signed(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", "\N{MINUS SIGN}") if isfinite(difference) else number(difference)


def sum_of_finite(values: Sequence[float]) -> float:
    """Of what can be summed."""
    return fsum(value for value in values if isfinite(value))
