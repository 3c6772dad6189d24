"""Charts over optimizer steps, as inline SVG from plain numbers, without any library in the page.

A report is opened years later, on a phone, behind a firewall: it may load nothing. So a chart is a string of SVG with
no script: the browser's own tooltip (``<title>``) tells the value under the pointer, and a sentence stands for the
whole picture where it cannot be seen.

A long run has more steps than a chart has pixels. They are put together in at most ``BINS`` bins; each shows its mean
as a line and its smallest and largest value as a band, as thinning would hide just the spikes one looks for. A value
that is not finite cannot be drawn: it breaks the line and leaves a cross at the top.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10, nan
from typing import Literal

from markupsafe import Markup

from farnear.report.svg import number, scientific, svg, text

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 14, 40
ROOM_FOR_LABELS = 36
BINS = 200


@dataclass(frozen=True)
class Series:
    """Values over optimizer steps, ascending; ``value`` may hold NaN and infinity."""

    step: Sequence[int]
    value: Sequence[float]
    label: str = ""  # stands at the right end of a joined line, and in tooltips
    strength: float = 1.0  # opacity, so that ordered series read as one family
    joined: bool = True  # False: points that no line connects


@dataclass(frozen=True)
class Bin:
    """Neighbouring points that share a spot of the chart; ``mean`` is NaN when none of them is finite."""

    first_step: int
    last_step: int
    mean: float
    low: float
    high: float
    not_finite: int

    @property
    def middle(self) -> float:
        return (self.first_step + self.last_step) / 2

    @property
    def steps(self) -> str:
        first = f"step {self.first_step:,}"
        return first if self.first_step == self.last_step else f"steps {self.first_step:,} to {self.last_step:,}"


@dataclass(frozen=True)
class Scale:
    """From values to the places of the drawing."""

    low_step: float
    high_step: float
    low: float
    high: float
    right: float

    def x(self, step: float) -> float:
        share = (step - self.low_step) / (self.high_step - self.low_step) if self.low_step < self.high_step else 0.5
        return LEFT + share * (self.right - LEFT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)


def ticks(low: float, high: float, at_most: int, whole: bool = False) -> list[float]:
    """Round values, 1, 2 or 5 times a power of ten apart, within ``low`` and ``high``, which differ."""
    at_least = (high - low) / at_most
    power = 10.0 ** floor(log10(at_least))
    spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= at_least * (1 - 1e-9))
    spacing = max(1.0, spacing) if whole else spacing
    return [place * spacing for place in range(ceil(low / spacing - 1e-9), floor(high / spacing + 1e-9) + 1)]


def bins_of(series: Series, at_most: int = BINS) -> list[Bin]:
    """Put points together, the same number in each bin but the last."""
    per_bin = max(1, ceil(len(series.step) / at_most))
    bins = []
    for start in range(0, len(series.step), per_bin):
        steps, values = series.step[start : start + per_bin], series.value[start : start + per_bin]
        finite = [value for value in values if isfinite(value)]
        mean = sum(finite) / len(finite) if finite else nan
        bins.append(
            Bin(steps[0], steps[-1], mean, min(finite, default=nan), max(finite, default=nan), len(steps) - len(finite))
        )
    return bins


def chart_over_steps(
    name: str,
    series: Sequence[Series],
    style: Literal["line", "dots", "bars"],
    value_range: tuple[float, float] | None = None,
) -> Markup:
    """One or more series over optimizer steps. ``name`` is what the values are, for tooltips and the text alternative.

    ``dots`` marks every point of a line, for a few measurements; ``bars`` suits counts that are mostly 0. ``line`` and
    ``bars`` take one series and give it a tooltip at every step. ``value_range`` fixes the vertical axis, which
    otherwise follows the finite values.
    """
    bins_of_series = [bins_of(line) for line in series]
    everything = [point for bins in bins_of_series for point in bins]
    low_step, high_step = min(point.first_step for point in everything), max(point.last_step for point in everything)
    low, high = value_range or _range_of(everything, from_zero=style == "bars")
    labelled = any(line.label for line in series)
    scale = Scale(
        low_step,
        high_step,
        low,
        high,
        WIDTH - RIGHT - ROOM_FOR_LABELS * labelled,
    )
    parts = list(_axes(scale, whole_values=style == "bars"))
    for line, bins in zip(series, bins_of_series, strict=True):
        for stretch in _unbroken(bins) if line.joined and style != "bars" else ():
            parts.extend(_stretch(stretch, scale, line.strength))
        for point in bins:
            if point.not_finite:
                parts.append(_cross(scale.x(point.middle), f"{name}, {point.steps}: not finite"))
            elif style == "dots":
                parts.append(_dot(name, point, line, scale))
    if style == "bars":
        parts.extend(_bars(bins_of_series[0], scale))
    if labelled:
        parts.extend(_end_labels(series, bins_of_series, scale))
    if style != "dots":
        parts.extend(_hover_strips(name, bins_of_series[0], scale))
    return svg(parts, WIDTH, HEIGHT, "; ".join(_sentence(name, line) for line in series))


def _range_of(bins: Sequence[Bin], from_zero: bool) -> tuple[float, float]:
    """The finite values with a little air; from 0 where that is asked for or costs little height."""
    low = min((point.low for point in bins if isfinite(point.low)), default=0.0)
    high = max((point.high for point in bins if isfinite(point.high)), default=1.0)
    if low >= 0 and (from_zero or low < 0.6 * high):
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        air = abs(high) / 2 or 1.0
        return (low - air if low else 0.0), high + air
    return low, high + 0.04 * (high - low)


def _axes(scale: Scale, whole_values: bool) -> Iterator[Markup]:
    values = ticks(scale.low, scale.high, 6, whole_values)
    largest = max(abs(value) for value in values)
    for value in values:
        y = scale.y(value)
        # One notation for a whole axis: 0.001 above 8e-4 is hard to read.
        words = scientific(value, 3) if value and not 1e-2 <= largest < 1e6 else number(value)
        yield Markup('<line class="grid" x1="{}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, scale.right, y, y)
        yield text(LEFT - 8, y + 4, words, "end")
    has_one = scale.low_step == scale.high_step
    for step in [scale.low_step] if has_one else ticks(scale.low_step, scale.high_step, 6, True):
        x = scale.x(step)
        bottom = HEIGHT - BOTTOM
        yield Markup('<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(x, x, bottom, bottom + 4)
        yield text(x, bottom + 18, f"{step:,.0f}", "middle")
    yield Markup('<line class="axis" x1="{}" x2="{:.1f}" y1="{}" y2="{}"/>').format(
        LEFT, scale.right, HEIGHT - BOTTOM, HEIGHT - BOTTOM
    )
    yield text((LEFT + scale.right) / 2, HEIGHT - 6, "optimizer step", "middle")


def _unbroken(bins: Sequence[Bin]) -> Iterator[list[Bin]]:
    """The stretches between bins that hold nothing finite."""
    stretch: list[Bin] = []
    for point in bins:
        if isfinite(point.mean):
            stretch.append(point)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _stretch(stretch: Sequence[Bin], scale: Scale, strength: float) -> Iterator[Markup]:
    if any(point.first_step != point.last_step for point in stretch):
        edge = [f"{scale.x(point.middle):.1f},{scale.y(point.high):.1f}" for point in stretch]
        edge += [f"{scale.x(point.middle):.1f},{scale.y(point.low):.1f}" for point in reversed(stretch)]
        yield Markup('<polygon class="band" points="{}"/>').format(" ".join(edge))
    if len(stretch) == 1:
        x, y = scale.x(stretch[0].middle), scale.y(stretch[0].mean)
        yield Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2" opacity="{:.2f}"/>').format(x, y, strength)
        return
    path = " ".join(f"{scale.x(point.middle):.1f},{scale.y(point.mean):.1f}" for point in stretch)
    yield Markup('<polyline class="line" points="{}" opacity="{:.2f}"/>').format(path, strength)


def _bars(bins: Sequence[Bin], scale: Scale) -> Iterator[Markup]:
    """From 0 to the mean of each bin, and paler on to its largest value."""
    width = max(1.0, 0.7 * (scale.right - LEFT) / len(bins))
    floor_y = scale.y(max(0.0, scale.low))
    for point in bins:
        for kind, value in (("band", point.high), ("dot", point.mean)):
            if isfinite(value) and value > 0:
                yield Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    kind, scale.x(point.middle) - width / 2, scale.y(value), width, floor_y - scale.y(value)
                )


def _dot(name: str, point: Bin, line: Series, scale: Scale) -> Markup:
    title = f"{name} {number(point.mean)}, {point.steps}" + (f", {line.label}" if line.label else "")
    return Markup(
        '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.2" opacity="{:.2f}"><title>{}</title></circle>'
    ).format("dot" if line.joined else "ring", scale.x(point.middle), scale.y(point.mean), line.strength, title)


def _cross(x: float, title: str) -> Markup:
    return Markup('<path class="cross" d="M{:.1f} {}l8 8m0 -8l-8 8"><title>{}</title></path>').format(x - 4, TOP, title)


def _end_labels(series: Sequence[Series], bins_of_series: Sequence[list[Bin]], scale: Scale) -> Iterator[Markup]:
    """Each line's label at its right end, pushed down where it would cover the one above."""
    ends = [
        (scale.y(next((point.mean for point in reversed(bins) if isfinite(point.mean)), scale.low)), line)
        for line, bins in zip(series, bins_of_series, strict=True)
        if line.label and line.joined
    ]
    ends.sort(key=lambda end: end[0])
    lowest = HEIGHT - BOTTOM - 13.0 * (len(ends) - 1)
    previous = float("-inf")
    for place, (y, line) in enumerate(ends):
        y = max(previous + 13, min(y, lowest + 13 * place))
        previous = y
        yield text(scale.right + 8, y + 4, line.label, "start")


def _hover_strips(name: str, bins: Sequence[Bin], scale: Scale) -> Iterator[Markup]:
    """An invisible strip over each bin, for a tooltip that need not be aimed at."""
    width = (scale.right - LEFT) / max(len(bins), 1)
    for point in bins:
        if not isfinite(point.mean):
            continue
        title = f"{name} {number(point.mean)}, {point.steps}"
        if point.first_step != point.last_step:
            title += f" (mean; {number(point.low)} to {number(point.high)})"
        yield Markup(
            '<rect class="strip" x="{:.1f}" y="{}" width="{:.2f}" height="{}"><title>{}</title></rect>'
        ).format(scale.x(point.middle) - width / 2, TOP, width, HEIGHT - BOTTOM - TOP, title)


def _sentence(name: str, line: Series) -> str:
    finite = [(value, step) for step, value in zip(line.step, line.value, strict=True) if isfinite(value)]
    what = f"{name} {line.label}".strip()
    broken = len(line.step) - len(finite)
    bad = f"{broken} of {len(line.step)} values are not finite" if broken else ""
    if not finite:
        return f"{what}: {bad}"
    (first, first_step), (last, last_step), (lowest, _), (highest, _) = finite[0], finite[-1], min(finite), max(finite)
    return (
        f"{what}: {number(first)} at step {first_step:,}, {number(last)} at step {last_step:,}, "
        f"lowest {number(lowest)}, highest {number(highest)}" + (f", {bad}" if bad else "")
    )
