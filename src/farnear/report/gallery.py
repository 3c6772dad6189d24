"""What a run folder's gallery holds: the ranks of all queries, and all that is shown of some of them.

A training writes it with its evaluations of the whole task (`farnear.retrieve.gallery`). The newest one counts; the
rankings before training stand beside it where they are of the same queries and pages.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from farnear.errors import UserError
from farnear.report.lines import Record, record_of, records_of
from farnear.run_folder import RunFolder

PAGES_SHOWN = 5
"""First pages of a ranking that are shown; the training leaves what is needed for these."""

Ranks = tuple[int | None, ...]
"""Of the first page that answers each query; None where it was not found."""


@dataclass(frozen=True)
class Card:
    """What stands for a page, or for a query that is no text alone."""

    kind: str
    name: str = ""
    words: str = ""
    picture: str = ""  # the file's name
    width: int = 0
    height: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Ranking:
    """Of one query: positions of the first pages, their scores, and the ranks among them that are right."""

    rank: int | None
    pages: tuple[int, ...]
    scores: tuple[float, ...]
    hits: frozenset[int]


@dataclass(frozen=True)
class ShownQuery:
    words: str
    key: str
    why: tuple[str, ...]
    right: int
    card: Card
    now: Ranking
    before: Ranking | None


@dataclass(frozen=True)
class Gallery:
    """One evaluation's rankings, and those before training, if they compare.

    Attributes:
        kind: Of the evaluation: "before" or "after".
        looked_at: How many ranks the right page was looked for in.
        page: By its position.
        picture: Bytes of each file by its name.
        is_other_task: Whether there are rankings before training, of other queries or pages.
    """

    kind: str
    looked_at: int
    ranks: Ranks
    ranks_before: Ranks | None
    shown: tuple[ShownQuery, ...]
    page: Mapping[int, Card]
    picture: Mapping[str, bytes] = field(repr=False)
    is_other_task: bool = False


@dataclass(frozen=True)
class _Rankings:
    fingerprint: str
    looked_at: int
    ranks: Ranks
    lines: Mapping[int, Record]


def read_gallery(folder: RunFolder) -> Gallery | None:
    """The newest evaluation's part of a run's gallery; None where there is none.

    Raises:
        UserError: A file is damaged, by its name.
    """
    # Rankings that nothing is chosen of were still being written when the run was killed.
    kinds = [kind for kind in ("after", "before") if (folder.gallery / f"{kind}-shown.json").exists()]
    if not kinds:
        return None
    kind = kinds[0]
    choice = record_of(folder.gallery / f"{kind}-shown.json")
    queries = [Record(choice.place, query) for query in choice.items("queries", dict)]
    wanted = {query.count("line") for query in queries}
    now = _rankings(folder.gallery / f"{kind}.jsonl", wanted)
    before = _rankings(folder.gallery / "before.jsonl", wanted) if kind == "after" and "before" in kinds else None
    is_other_task = before is not None and before.fingerprint != now.fingerprint
    if is_other_task:
        before = None
    cards = choice.inner("pages")
    page = {int(position): _card(cards.inner(position)) for position in cards.value if position.isdecimal()}
    shown = tuple(_shown(query, page, now, before) for query in queries)
    names = {card.picture for card in [*page.values(), *(query.card for query in shown)] if card.picture}
    paths = [folder.gallery / "thumbnails" / Path(name).name for name in sorted(names)]
    return Gallery(
        kind=kind,
        looked_at=now.looked_at,
        ranks=now.ranks,
        ranks_before=None if before is None else before.ranks,
        shown=shown,
        page=page,
        picture={path.name: path.read_bytes() for path in paths if path.exists()},
        is_other_task=is_other_task,
    )


def _rankings(path: Path, wanted: Collection[int]) -> _Rankings:
    """All ranks of a file, and the queries that are wanted by their places behind its first line."""
    records = records_of(path)
    head = next(records, None)
    if head is None:
        raise UserError(f"{path} is missing or empty, so its queries cannot be shown; restore it, or remove its folder")
    ranks: list[int | None] = []
    lines = {}
    for place, record in enumerate(records):
        ranks.append(None if record.value.get("rank") is None else record.count("rank"))
        if place in wanted:
            lines[place] = record
    if len(ranks) != head.count("queries"):
        raise head.refuse(f"'queries' is {head.count('queries')}, but {len(ranks)} follow")
    return _Rankings(head.text("fingerprint"), head.count("looked_at"), tuple(ranks), lines)


def _shown(query: Record, page: Mapping[int, Card], now: _Rankings, before: _Rankings | None) -> ShownQuery:
    place = query.count("line")
    if place not in now.lines:
        raise query.refuse(f"'line' is {place}, but there are {len(now.ranks)}")
    shown = ShownQuery(
        words=now.lines[place].text("query"),
        key=now.lines[place].text("key"),
        why=tuple(query.items("why", str)),
        right=query.count("right"),
        card=_card(query),
        now=_ranking(now.lines[place]),
        before=None if before is None else _ranking(before.lines[place]),
    )
    needed = {shown.right, *(one for of in (shown.now, shown.before) if of for one in of.pages[:PAGES_SHOWN])}
    if lacking := needed - page.keys():
        raise query.refuse(f"'pages' has nothing for page {min(lacking)}")
    return shown


def _ranking(line: Record) -> Ranking:
    return Ranking(
        rank=None if line.value.get("rank") is None else line.count("rank"),
        pages=tuple(line.items("pages", int)),
        scores=tuple(line.items("scores", float)),
        hits=frozenset(line.items("hits", int)),
    )


def _card(card: Record) -> Card:
    def text(key: str) -> str:
        return card.text(key) if key in card.value else ""

    return Card(
        kind=card.text("kind"),
        name=text("name"),
        words=text("words"),
        picture=text("picture"),
        width=card.count("width") if "picture" in card.value else 0,
        height=card.count("height") if "picture" in card.value else 0,
        fault=text("fault"),
    )
