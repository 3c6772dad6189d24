"""How one made-up report page is drawn.

A page is a title (topic and year), one chart in one colour, and grey bars that stand for running text. What a query may
ask for (kind of chart, colour, topic, year) is drawn large and plain, and the title always in the same place: a tiny
model with random weights then learns to read it in some seventy steps, and in several times as many when titles move by
a few pixels. What no query asks for (layout below the title, data values, tint of the paper, a small shift) varies with
the page's seed, so that it cannot be learnt by heart.

Everything is drawn at twice the size and then averaged down, which smooths edges that Pillow leaves jagged. The
coordinates of a layout are fractions of the page, so every page size works. Random values come from
`random.Random(seed).random()` alone: that sequence is the one which Python promises to keep over its versions.
"""

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # left, top, right, bottom
Colour = tuple[int, int, int]
Draw = Callable[[], float]  # the next uniform number in [0, 1)
DrawChart = Callable[[ImageDraw.ImageDraw, Box, Colour, Draw], None]

INK: Colour = (32, 32, 36)
AXIS: Colour = (96, 96, 100)
CAP_HEIGHTS_A_FONT = 1.25  # of Aileron, with a little air
FILLER: Colour = (188, 188, 192)

COLOURS: Mapping[str, Colour] = MappingProxyType(
    {
        "red": (214, 32, 38),
        "blue": (28, 84, 204),
        "green": (30, 142, 50),
        "orange": (255, 140, 0),
    }
)


@dataclass(frozen=True)
class Page:
    """What is on a page. Only `seed` is unknown to the query: it settles layout, data and shift."""

    kind: str
    colour: str
    topic: str
    year: int
    seed: int


@dataclass(frozen=True)
class Layout:
    """Where chart and text stand below the title, in fractions of the page."""

    chart: Box
    columns: tuple[Box, ...]


TOPIC: Box = (0.06, 0.02, 0.97, 0.19)
YEAR: Box = (0.0, 0.2, 1.0, 0.4)
LAYOUTS = (
    Layout((0.06, 0.47, 0.94, 0.87), ((0.06, 0.91, 0.94, 0.97),)),
    Layout((0.06, 0.56, 0.94, 0.97), ((0.06, 0.47, 0.94, 0.52),)),
    Layout((0.06, 0.47, 0.66, 0.96), ((0.72, 0.47, 0.94, 0.96),)),
    Layout((0.34, 0.47, 0.94, 0.96), ((0.06, 0.47, 0.28, 0.96),)),
    Layout((0.06, 0.47, 0.94, 0.82), ((0.06, 0.86, 0.47, 0.97), (0.53, 0.86, 0.94, 0.97))),
)


def draw_page(page: Page, size: tuple[int, int]) -> Image.Image:
    """Draw one page.

    Args:
        page: what to draw; equal pages give equal pixels with one version of Pillow.
        size: (width, height) in pixels.

    Returns:
        An RGB image of that size.
    """
    width, height = 2 * size[0], 2 * size[1]
    draw = random.Random(page.seed).random
    paper = tuple(255 - int(10 * draw()) for _ in range(3))
    layout = LAYOUTS[int(draw() * len(LAYOUTS))]
    shift_x, shift_y = (0.016 * (draw() - 0.5) for _ in range(2))

    def placed(box: Box, x: float = 0, y: float = 0) -> Box:
        left, top, right, bottom = box
        return (left + x) * width, (top + y) * height, (right + x) * width, (bottom + y) * height

    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    _draw_title(pen, placed(TOPIC), placed(YEAR), page)
    CHARTS[page.kind](pen, placed(layout.chart, shift_x, shift_y), COLOURS[page.colour], draw)
    for column in layout.columns:
        _draw_filler(pen, placed(column, shift_x, shift_y), height, draw)
    return image.reduce(2)


def png_of_page(page: Page, size: tuple[int, int]) -> bytes:
    """The page as the bytes of a PNG file."""
    stream = io.BytesIO()
    draw_page(page, size).save(stream, "PNG", compress_level=3)
    return stream.getvalue()


@lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    """Aileron, which ships within Pillow; a Pillow without FreeType would hand out a bitmap font of one fixed size."""
    font = ImageFont.load_default(pixels)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "this Pillow was built without FreeType, which farnear needs to draw titles; reinstall Pillow"
        )
    return font


def _draw_title(pen: ImageDraw.ImageDraw, topic_box: Box, year_box: Box, page: Page) -> None:
    """The topic as a line of text; below it the year across the page, each digit in the middle of its quarter."""
    left, top, right, bottom = topic_box
    topic = page.topic.capitalize()
    pixels = bottom - top
    pixels *= min(1, (right - left) / _font(int(pixels)).getlength(topic))
    pen.text((left, (top + bottom) / 2), topic, fill=INK, font=_font(int(pixels)), anchor="lm", stroke_width=1)

    left, top, right, bottom = year_box
    font = _font(int(CAP_HEIGHTS_A_FONT * (bottom - top)))
    for number, digit in enumerate(str(page.year)):
        x = left + (right - left) * (number + 0.5) / 4
        pen.text((x, (top + bottom) / 2), digit, fill=INK, font=font, anchor="mm", stroke_width=1)


def _draw_filler(pen: ImageDraw.ImageDraw, box: Box, page_height: int, draw: Draw) -> None:
    left, top, right, bottom = box
    line = 0.024 * page_height
    for number in range(int((bottom - top) / line)):
        y = top + number * line
        end = left + (right - left) * (0.75 + 0.25 * draw())
        pen.rectangle((left, y, end, y + 0.45 * line), fill=FILLER)


def _draw_axes(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    pen.line((left, top, left, bottom, right, bottom), fill=AXIS, width=3)


def _draw_bars(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, draw: Draw) -> None:
    left, top, right, bottom = box
    bars = 4 + int(3 * draw())
    pitch = (right - left) / bars
    for number in range(bars):
        x = left + (number + 0.2) * pitch
        pen.rectangle((x, bottom - (bottom - top) * (0.35 + 0.65 * draw()), x + 0.7 * pitch, bottom), fill=colour)
    _draw_axes(pen, box)


def _draw_pie(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, draw: Draw) -> None:
    left, top, right, bottom = box
    radius = 0.48 * min(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    circle = (x - radius, y - radius, x + radius, y + radius)
    pale = tuple(255 - (255 - part) // 3 for part in colour)
    start, slices = 360 * draw(), 3 + int(2 * draw())
    shares = [0.4 + draw() for _ in range(slices)]
    for number, share in enumerate(shares):
        end = start + 360 * share / sum(shares)
        pen.pieslice(circle, start, end, fill=pale if number == 0 else colour, outline=(255, 255, 255), width=4)
        start = end


def _draw_table(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, draw: Draw) -> None:
    left, top, right, bottom = box
    rows, columns = 5 + int(2 * draw()), 3 + int(2 * draw())
    row_height, column_width = (bottom - top) / rows, (right - left) / columns
    pale = tuple(255 - (255 - part) // 4 for part in colour)
    for row in range(rows):
        y = top + row * row_height
        fill = colour if row == 0 else pale if row % 2 == 0 else (255, 255, 255)
        pen.rectangle((left, y, right, y + row_height), fill=fill)
        for column in range(columns):
            x = left + (column + 0.15) * column_width
            end = x + column_width * (0.3 + 0.4 * draw())
            pen.rectangle(
                (x, y + 0.35 * row_height, end, y + 0.65 * row_height), fill=(255, 255, 255) if row == 0 else AXIS
            )
    for column in range(columns + 1):
        x = left + column * column_width
        pen.line((x, top, x, bottom), fill=colour, width=3)
    pen.rectangle(box, outline=colour, width=3)


CHARTS: Mapping[str, DrawChart] = MappingProxyType(
    {
        "bar chart": _draw_bars,
        "pie chart": _draw_pie,
        "table": _draw_table,
    }
)
