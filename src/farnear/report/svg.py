"""What every drawing is made of: its frame, its words and its numbers.

Everything goes through ``Markup.format``, which escapes what it is given. Colours and fonts are classes of the page's
style sheet, so that drawings follow its light and dark themes.
"""

from collections.abc import Sequence
from math import floor, isfinite, log10
from typing import Literal

from markupsafe import Markup


def number(value: float, digits: int = 3) -> str:
    """A value for people: ``digits`` significant ones, thousands apart, 2e-5 rather than 2e-05."""
    if not isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return scientific(value, digits)
    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    rounded = f"{value:,.{decimals}f}"
    return rounded.rstrip("0").rstrip(".") if decimals else rounded


def scientific(value: float, digits: int) -> str:
    """``digits`` significant digits and the exponent, without what adds nothing to them."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def text(x: float, y: float, words: str, anchor: Literal["start", "middle", "end"]) -> Markup:
    """Words at a place, which is their start, middle or end."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def svg(parts: Sequence[Markup], width: int, height: int, sentence: str, stretched: bool = False) -> Markup:
    """A drawing with ``sentence`` as its text alternative; ``stretched`` ones fill any box, so they hold no words."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"{}>{}</svg>').format(
        width, height, sentence, Markup(' preserveAspectRatio="none"') if stretched else "", Markup("").join(parts)
    )
