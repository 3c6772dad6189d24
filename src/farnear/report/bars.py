"""The small bars beside the report's tables: shares of a whole, and the way from one value to another.

They hold no words of their own, as the table has the figures; a sentence stands for each where it cannot be seen.
"""

from collections.abc import Sequence
from math import isfinite, nan

from markupsafe import Markup

from farnear.report.svg import number, svg, text


def stacked_bar(name: str, parts: Sequence[tuple[str, float]]) -> Markup:
    """One bar of shares; part i has the class ``c<i>``. ``parts`` are (what, share); the shares sum to 1."""
    drawn = []
    left = 0.0
    for index, (what, share) in enumerate(parts):
        drawn.append(
            Markup('<rect class="c{}" x="{:.2f}" y="0" width="{:.2f}" height="24"><title>{}</title></rect>').format(
                index % 8, left, max(0.0, share * 1000 - 2), f"{what}: {share:.1%}"
            )
        )
        left += share * 1000
    sentence = f"{name}: " + ", ".join(f"{what} {share:.1%}" for what, share in parts)
    return svg(drawn, 1000, 24, sentence, stretched=True)


def change_bar(before: float, after: float) -> Markup:
    """From a ring at ``before`` to a dot at ``after`` on an axis from 0 to 1; what is not finite is left out."""
    places = [6 + 148 * min(max(value, 0.0), 1.0) if isfinite(value) else nan for value in (before, after)]
    drawn = [Markup('<line class="grid" x1="{}" x2="{}" y1="3" y2="17"/>').format(x, x) for x in (6, 80, 154)]
    if all(isfinite(place) for place in places):
        drawn.append(Markup('<line class="change" x1="{:.1f}" x2="{:.1f}" y1="10" y2="10"/>').format(*places))
    for kind, place in zip(("ring", "dot"), places, strict=True):
        if isfinite(place):
            drawn.append(Markup('<circle class="{}" cx="{:.1f}" cy="10" r="4"/>').format(kind, place))
    return svg(drawn, 160, 20, f"from {number(before)} to {number(after)}")


def change_axis() -> Markup:
    """The scale above a column of ``change_bar``."""
    return svg([text(6 + 148 * at, 14, number(at), "middle") for at in (0.0, 0.5, 1.0)], 160, 20, "scale from 0 to 1")
