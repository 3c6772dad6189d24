"""The gallery's part of the report: which queries got better and worse, and what is shown of some of them.

A query stands by the rank of the first page that answers it. What it gained is the difference of 1 / rank, after minus
before: from rank 2 to 1 is a half, from 200 to 100 next to nothing, as it is for a reader. A page that was not found
counts as 0.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farnear.report.gallery import PAGES_SHOWN, Card, Gallery, Ranking, Ranks, ShownQuery
from farnear.report.svg import number
from farnear.wording import counted


@dataclass(frozen=True)
class Thumbnail:
    """A picture, or the words in its place.

    Attributes:
        picture: Its number in the page's list of pictures; None where there are words.
        name: What is shown, for those who do not see it, and above its enlargement.
    """

    id: str
    picture: int | None
    words: str
    name: str


@dataclass(frozen=True)
class Place:
    """One page in a ranking."""

    rank: int
    is_right: bool
    score: str
    thumbnail: Thumbnail
    label: str


@dataclass(frozen=True)
class Row:
    name: str
    places: list[Place]


@dataclass(frozen=True)
class QueryCard:
    """A query; ``tags`` are what it is filtered by, ``keys`` what it is sorted by, smallest first."""

    words: str
    key: str
    picture: Thumbnail | None
    move: str
    verdict: str
    why: str
    tags: list[str]
    keys: dict[str, float]
    rows: list[Row]
    right: Thumbnail | None


@dataclass(frozen=True)
class Picture:
    width: int
    height: int
    base64: str


@dataclass(frozen=True)
class Queries:
    """All that the template needs.

    Attributes:
        lead: How the evaluation's queries stand, for the head of the page.
        about: What is shown of them.
        filters: (tag, label, number of shown queries); the first is all.
        orders: (key, label); the first is how they stand.
        thumbnails: To be enlarged, each once.
    """

    lead: str
    about: str
    cards: list[QueryCard]
    filters: list[tuple[str, str, int]]
    orders: list[tuple[str, str]]
    pictures: list[Picture]
    thumbnails: list[Thumbnail]


def queries(gallery: Gallery | None) -> Queries | None:
    """None where there is no gallery."""
    if gallery is None or not gallery.shown:
        return None
    numbers = {name: place for place, name in enumerate(gallery.picture)}
    card_of_picture = {card.picture: card for card in (*gallery.page.values(), *(one.card for one in gallery.shown))}
    thumbnail_of = {page: _thumbnail(f"p{page}", card, numbers) for page, card in gallery.page.items()}
    cards = [_card(query, place, gallery, thumbnail_of, numbers) for place, query in enumerate(gallery.shown)]
    compares = gallery.ranks_before is not None
    orders = [("gain", "Biggest gain"), ("loss", "Biggest loss")] if compares else []
    orders += [("now", "Worst now" if gallery.kind == "after" else "Worst"), ("words", "Alphabetical")]
    first = orders[0][0]
    cards.sort(key=lambda card: card.keys[first])
    tags = {"better": "Better", "worse": "Worse", "wrong": "Still wrong" if compares else "Wrong"}
    filters = [("", "All", len(cards))]
    filters += [(tag, label, sum(tag in card.tags for card in cards)) for tag, label in tags.items()]
    shown = {place.thumbnail.id: place.thumbnail for card in cards for row in card.rows for place in row.places}
    shown |= {one.id: one for card in cards for one in (card.right, card.picture) if one}
    return Queries(
        lead=_lead(gallery),
        about=_about(gallery, compares),
        cards=cards,
        filters=[one for one in filters if compares or one[0] in ("", "wrong")],
        orders=orders,
        pictures=[
            Picture(card_of_picture[name].width, card_of_picture[name].height, base64.b64encode(data).decode())
            for name, data in gallery.picture.items()
        ],
        thumbnails=list(shown.values()),
    )


def _card(
    query: ShownQuery,
    place: int,
    gallery: Gallery,
    thumbnail_of: Mapping[int, Thumbnail],
    numbers: Mapping[str, int],
) -> QueryCard:
    now, before = query.now, query.before
    rankings = [("before training", before)] if before else []
    rankings.append((f"{gallery.kind} training", now))
    rows = [Row(name, _places(name, ranking, thumbnail_of)) for name, ranking in rankings]
    is_shown = any(place.is_right for row in rows for place in row.places)
    gain = _reciprocal(now.rank) - _reciprocal(before.rank) if before else 0.0
    is_wrong = now.rank != 1 and (before is None or before.rank != 1)
    tags = [tag for tag, holds in (("better", gain > 0), ("worse", gain < 0), ("wrong", is_wrong)) if holds]
    ranks = [_rank(ranking.rank, gallery.looked_at) for _, ranking in rankings]
    picture = _thumbnail(f"q{place}", query.card, numbers) if query.card.picture or not query.words else None
    return QueryCard(
        words=query.words,
        key=query.key,
        picture=picture,
        move=" \N{RIGHTWARDS ARROW} ".join(ranks),
        verdict=("better" if gain > 0 else "worse" if gain < 0 else "as before") if before else "",
        # Where all are shown, none was chosen.
        why=", ".join(query.why) if len(gallery.shown) < len(gallery.ranks) else "",
        tags=tags,
        keys={"gain": -gain, "loss": gain, "now": -(now.rank or gallery.looked_at + 1)},
        rows=rows,
        right=None if is_shown else thumbnail_of[query.right],
    )


def _places(when: str, ranking: Ranking, thumbnail_of: Mapping[int, Thumbnail]) -> list[Place]:
    places = []
    for rank, (page, score) in enumerate(zip(ranking.pages[:PAGES_SHOWN], ranking.scores, strict=False), 1):
        is_right = rank in ranking.hits
        thumbnail = thumbnail_of[page]
        told = f"{'right' if is_right else 'wrong'} page at rank {rank} {when}, score {number(score)}: {thumbnail.name}"
        places.append(Place(rank, is_right, f"{score:.2f}".replace("-", "\N{MINUS SIGN}"), thumbnail, told))
    return places


def _thumbnail(id_of_it: str, card: Card, numbers: Mapping[str, int]) -> Thumbnail:
    words = card.fault or card.words or card.kind
    return Thumbnail(id_of_it, numbers.get(card.picture), words, card.name or card.kind)


def _lead(gallery: Gallery) -> str:
    """The run in two sentences: what a person asks who wants to know whether it was worth it."""
    now, count = _first(gallery.ranks), len(gallery.ranks)
    lead = f"The right page comes first for {now:,} of {counted(count, 'query', 'queries')}"
    if gallery.ranks_before is None:
        return f"{lead} {gallery.kind} training."
    before = _first(gallery.ranks_before)
    way = (
        f"{'up' if now > before else 'down'} from {before:,} before training" if now != before else "as before training"
    )
    better, worse = _moved(gallery.ranks, gallery.ranks_before)
    return f"{lead}, {way}. {counted(better, 'query finds', 'queries find')} it earlier, {worse:,} later."


def _about(gallery: Gallery, compares: bool) -> str:
    shown, count = len(gallery.shown), len(gallery.ranks)
    if gallery.is_other_task:
        other = "The rankings before training are of other queries or pages and are not shown beside these. "
    else:
        other = ""
    if shown == count:
        return f"{other}All {counted(count, 'query', 'queries')} of the evaluation."
    if compares:
        how = "those that gained most, those that lost most, the worst of those still wrong, and"
    else:
        how = "the worst of those that are wrong, and"
    return f"{other}{shown:,} of {counted(count, 'query', 'queries')}: {how} a random sample."


def _moved(now: Ranks, before: Ranks) -> tuple[int, int]:
    """How many got better, and worse."""
    gains = [_reciprocal(later) - _reciprocal(earlier) for later, earlier in zip(now, before, strict=True)]
    return sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)


def _first(ranks: Sequence[int | None]) -> int:
    return sum(rank == 1 for rank in ranks)


def _reciprocal(rank: int | None) -> float:
    return 1 / rank if rank else 0.0


def _rank(rank: int | None, looked_at: int) -> str:
    return f"> {looked_at:,}" if rank is None else f"{rank:,}"
