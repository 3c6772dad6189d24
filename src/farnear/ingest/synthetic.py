"""Draws pages and asks for them: pairs for the demo, for tests, and for a first look at a machine's speed.

A page shows one combination of four attributes: kind of chart, colour, topic, year. Its query is a sentence that names
all four, so exactly one combination answers it, while dozens of others differ in one word. Training and evaluation
pages share no combination, yet each side shows every single value once it has some fifty pages: a model that scores
well on the evaluation pages has learnt to read the attributes and to join them, not to remember pages.

Combinations are ordered by a hash of the seed; the evaluation side takes the first ones, the training side the next.
Nothing depends on the clock, on the number of processes or on a library's random streams: equal arguments give equal
shards, as long as Pillow encodes alike.

With ``siblings`` the set is harder. Pages then come in families that share paper, layout, shift and, within a kind of
chart, data: pages that differ in their colour, topic or year are the same to the pixel wherever these do not show.
Evaluation holds whole families, so every query finds pages that differ from the right one in one attribute alone, for
each of the four.

PNG, not JPEG: at this size both decode in about 0.15 ms, and PNG keeps the colours that queries ask for.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, cycle, islice, product
from pathlib import Path

from farnear.errors import UserError
from farnear.ingest.page_drawing import CHARTS, COLOURS, Page, png_of_page
from farnear.ingest.pool import chunks, map_in_order, processes_for
from farnear.ingest.shards import EVAL, TRAIN, Pair, refuse_existing_shards, write_prefixes

# Few enough values that a batch of 128 holds pages which differ in the title alone, and reading it pays from the start.
TOPICS = ("revenue", "sales", "costs", "energy", "exports", "rainfall", "wages", "housing")
YEARS = tuple(range(2016, 2024))
TEMPLATES = (
    "Which page shows the {colour} {kind} of {topic} in {year}?",
    "Find the {topic} report of {year} with the {colour} {kind}.",
    "Where do I see {topic} in {year} as {article} {colour} {kind}?",
    "Show me the {colour} {kind} about {topic} from {year}.",
    "{topic} {year}, {colour} {kind}",
)
SMALLEST_SIDE = 64
PAGES_PER_TASK = 100
PAGES_WORTH_A_PROCESS = 1000

Combination = tuple[str, str, str, int]  # kind, colour, topic, year
Family = tuple[int, int, int]  # which pair of colours, of topics, of years


def synthesise(
    out: Path,
    *,
    train_pairs: int,
    eval_pairs: int,
    seed: int,
    size: tuple[int, int] = (128, 160),
    pairs_per_shard: int = 1000,
    siblings: bool = False,
) -> tuple[list[Path], list[Path]]:
    """Draw pages and write them as `train-*.tar` and `eval-*.tar`.

    Evaluation combinations are all distinct. So are the training ones until all that remain are used; from then on
    they come again with another layout and other data, and a warning says so.

    Args:
        out: the folder for the shards; made when it does not exist.
        train_pairs: pairs to train on, at least 1.
        eval_pairs: pairs to evaluate on, at most half of all combinations; may be 0.
        seed: settles which combinations go where, and every drawing.
        size: (width, height) of a page in pixels.
        pairs_per_shard: the last shard of a side may hold fewer.
        siblings: take combinations family by family, and draw a family's pages alike. A family has 24 pages: every kind
            of chart with two colours, two topics and two years. The last one of a side may be cut short.

    Returns:
        The training shards and the evaluation shards.

    Raises:
        UserError: a number is out of range, or `out` already holds such shards.
    """
    combinations = _ordered(list(product(CHARTS, COLOURS, TOPICS, YEARS)), seed)
    if train_pairs < 1 or not 0 <= eval_pairs <= len(combinations) // 2:
        raise UserError(
            f"{train_pairs} training and {eval_pairs} evaluation pages cannot be drawn: both sides share "
            f"{len(combinations)} combinations; train on 1 or more and evaluate on at most {len(combinations) // 2}"
        )
    if min(size) < SMALLEST_SIDE:
        raise UserError(
            f"pages of {size[0]}x{size[1]} pixels are too small to read a title on; use {SMALLEST_SIDE} or more a side"
        )
    refuse_existing_shards(out, (TRAIN, EVAL))
    in_order = _families_together if siblings else _every_value_first
    for_eval = in_order(combinations)[:eval_pairs]
    taken = set(for_eval)
    for_train = in_order([combination for combination in combinations if combination not in taken])
    if train_pairs > len(for_train):
        warnings.warn(
            f"{train_pairs} training pages show only {len(for_train)} different combinations, so queries repeat",
            stacklevel=2,
        )
    pages_of_prefix = {
        TRAIN: _pages(for_train, train_pairs, TRAIN, seed, siblings),
        EVAL: _pages(for_eval, len(for_eval), EVAL, seed, siblings),
    }
    pairs_of_prefix = {prefix: _drawn(pages, prefix, size) for prefix, pages in pages_of_prefix.items()}
    shards = write_prefixes(pairs_of_prefix, out, pairs_per_shard=pairs_per_shard)
    return shards[TRAIN], shards[EVAL]


def query_for(page: Page) -> str:
    """A sentence that asks for the page by its four attributes.

    The attributes pick the wording too, so that pages of one combination have the same query: training then knows them
    for duplicates and never takes one for a wrong answer to the other's query.
    """
    template = TEMPLATES[_hash(page.kind, page.colour, page.topic, page.year) % len(TEMPLATES)]
    article = "an" if page.colour[0] in "aeiou" else "a"
    return template.format(kind=page.kind, colour=page.colour, topic=page.topic, year=page.year, article=article)


def _ordered(combinations: Sequence[Combination], seed: int) -> list[Combination]:
    return sorted(combinations, key=lambda combination: _hash(seed, *combination))


def _every_value_first(combinations: Sequence[Combination]) -> list[Combination]:
    """The same combinations, those in front that show some attribute's value for the first time."""
    seen: set[str | int] = set()
    first: list[Combination] = []
    rest: list[Combination] = []
    for combination in combinations:
        (rest if seen.issuperset(combination) else first).append(combination)
        seen.update(combination)
    return first + rest


def _families_together(combinations: Sequence[Combination]) -> list[Combination]:
    """The same combinations, family after family, in the order of each one's first."""
    members: dict[Family, list[Combination]] = {}
    for combination in combinations:
        members.setdefault(_family(combination), []).append(combination)
    return list(chain.from_iterable(members.values()))


def _family(combination: Combination) -> Family:
    """Which two colours, topics and years it is among; of the kinds, which are three, a family has all."""
    _, colour, topic, year = combination
    return list(COLOURS).index(colour) // 2, TOPICS.index(topic) // 2, YEARS.index(year) // 2


def _pages(combinations: Sequence[Combination], count: int, prefix: str, seed: int, siblings: bool) -> list[Page]:
    """Pages of the combinations in turn, again and again, drawn anew in each round."""
    pages = []
    for number, combination in enumerate(islice(cycle(combinations), count)):
        alike = (number // len(combinations), *_family(combination)) if siblings else (number, *combination)
        pages.append(Page(*combination, seed=_hash(seed, prefix, *alike)))
    return pages


def _drawn(pages: Sequence[Page], prefix: str, size: tuple[int, int]) -> Iterator[Pair]:
    processes = processes_for(len(pages), items_worth_a_process=PAGES_WORTH_A_PROCESS)
    images = chain.from_iterable(map_in_order(partial(_draw_all, size=size), chunks(pages, PAGES_PER_TASK), processes))
    for number, (page, image) in enumerate(zip(pages, images, strict=True)):
        key = f"{prefix}-{number:06d}"
        yield Pair(key, query_for(page), image, "png", document=key)


def _draw_all(pages: Sequence[Page], size: tuple[int, int]) -> list[bytes]:
    return [png_of_page(page, size) for page in pages]


def _hash(*parts: str | int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")
