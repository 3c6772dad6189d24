"""What a run keeps of an evaluation for people to look at: the rankings of all queries, and pictures for some of them.

    gallery/before.jsonl         a line that says what was ranked, then one a query, in the order of the task
    gallery/before-shown.json    the queries that the report shows, why, and what stands for their pages
    gallery/after.jsonl, gallery/after-shown.json
    gallery/thumbnails/          JPEG files, each named by the content that it shows

The report is drawn of these alone, wherever the run folder lies and whatever has become of the shards. It shows a fixed
number of queries, so they are chosen to say something honest: what gained and what lost most, what is still wrong, and
a sample that no ranking has a say in. A ranking is compared with an earlier one of the same queries and pages only.

A page that cannot be decoded is named in the place of its picture: an evaluation has used it, and a run may not fail
over it now. Inputs without a picture are shown by their words, or by the word for what they are.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from farnear.data.document_names import DocumentNames
from farnear.data.index import modality_name
from farnear.data.plan import random_bits
from farnear.data.read import BadInputError, InputReader
from farnear.errors import UserError
from farnear.files import published, replace_text
from farnear.report.gallery import PAGES_SHOWN
from farnear.retrieve.evaluate import RetrievalTask
from farnear.retrieve.rankings import Rankings
from farnear.retrieve.thumbnail import SIDE, thumbnail_bytes
from farnear.wording import printable

Int64 = npt.NDArray[np.int64]
Made = TypeVar("Made")

QUERIES_SHOWN = 60
OF_A_KIND = 15
"""Queries that are shown for having gained, for having lost and for being wrong, at most, and drawn, at least."""
_THREADS = 8
_CHARACTERS_OF_QUERY = 1000
_CHARACTERS_OF_PAGE = 300


def write_gallery(
    folder: Path,
    task: RetrievalTask,
    rankings: Rankings,
    kind: str,
    step: int,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Write the files of an evaluation; the one that says which queries are shown comes last.

    Args:
        folder: The gallery; made where it is missing.
        kind: "before" or "after"; an "after" is compared with the "before" that stands there.
        moved: Called with each input that is read.
    """
    earlier = _lines_of(folder / "before.jsonl", task.fingerprint) if kind == "after" else None
    words = _words(task, moved) if earlier is None else [line["query"] for line in earlier]
    lines = list(_lines(task, rankings, words))
    hash_Q = task.index.query_hash_N[task.query_pair_Q]
    why = choose(rankings.rank_Q, None if earlier is None else _ranks(earlier), hash_Q)
    shown = [
        _shown(query, reasons, [of[query] for of in (lines, earlier) if of is not None])
        for query, reasons in why.items()
    ]
    thumbnails = folder / "thumbnails"
    thumbnails.mkdir(parents=True, exist_ok=True)
    pages = sorted({page for query in shown for page in query["pages"]})
    card = partial(_card, folder=thumbnails)
    of_page = _in_threads(task, task.page_row_P[pages], card, moved)
    row_of_query = task.index.query_N[task.query_pair_Q[[query["line"] for query in shown]]]
    for query, of_query in zip(shown, _in_threads(task, row_of_query, card, moved), strict=True):
        query.update(of_query)
    names = DocumentNames(task.index).names(task.page_row_P[pages])
    cards = {str(page): {"name": printable(names[place]), **of_page[place]} for place, page in enumerate(pages)}
    head = {
        "kind": kind,
        "step": step,
        "fingerprint": task.fingerprint,
        "queries": len(lines),
        "pages": task.pages,
        "looked_at": rankings.looked_at,
    }
    with published(folder / f"{kind}.jsonl") as file:
        file.writelines((json.dumps(line) + "\n").encode() for line in (head, *lines))
    replace_text(folder / f"{kind}-shown.json", json.dumps({"queries": shown, "pages": cards}) + "\n")
    _remove_unused(folder)


def choose(rank_Q: Int64, earlier_Q: Int64 | None, hash_Q: Int64) -> dict[int, list[str]]:
    """The queries to show, with the reasons for each.

    Args:
        rank_Q: Of the first page that answers, from 1; 0 where none was found.
        earlier_Q: The same before training, if that is known.
        hash_Q: Of the queries; settles what is drawn, and the order of equals.
    """
    drawn = np.argsort(random_bits("gallery", hash_Q), kind="stable")
    now_Q = _reciprocal(rank_Q)

    def first(value_Q: npt.NDArray[np.float64], is_one_Q: npt.NDArray[np.bool_]) -> list[int]:
        by_value = drawn[np.argsort(value_Q[drawn], kind="stable")]
        found: list[int] = by_value[is_one_Q[by_value]][:OF_A_KIND].tolist()
        return found

    if earlier_Q is None:
        groups = {"wrong": first(now_Q, rank_Q != 1)}
    else:
        gain_Q = now_Q - _reciprocal(earlier_Q)
        groups = {
            "gained most": first(-gain_Q, gain_Q > 0),
            "lost most": first(gain_Q, gain_Q < 0),
            "still wrong": first(now_Q, (rank_Q != 1) & (earlier_Q != 1)),
        }
    # The sample is one of all queries, whatever else is shown, and what room is left is filled with more of it.
    groups["random sample"] = drawn[:OF_A_KIND].tolist()
    more = iter(drawn[OF_A_KIND:].tolist())
    chosen = {query for group in groups.values() for query in group}
    while len(chosen) < QUERIES_SHOWN and (query := next(more, None)) is not None:
        groups["random sample"].append(query)
        chosen.add(query)
    return {query: [name for name, group in groups.items() if query in group] for query in sorted(chosen)}


def _lines(task: RetrievalTask, rankings: Rankings, words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A query each: its words, its first pages and their scores, which ranks of them are right, and the first right."""
    names = DocumentNames(task.index).names(task.page_row_P)
    for query, pair in enumerate(task.query_pair_Q.tolist()):
        page_k = rankings.page_Qk[query][rankings.page_Qk[query] >= 0].tolist()
        yield {
            "key": task.index.pair_id(pair),
            "query": words[query],
            "rank": int(rankings.rank_Q[query]) or None,
            "right": int(rankings.right_Q[query]),
            "relevant": len(task.relevant[query]),
            "hits": [rank for rank, page in enumerate(page_k, 1) if page in task.relevant[query]],
            "pages": page_k,
            "names": [printable(names[page]) for page in page_k],
            "scores": [float(f"{score:.6g}") for score in rankings.score_Qk[query][: len(page_k)].tolist()],
        }


def _words(task: RetrievalTask, moved: Callable[[], None]) -> list[str]:
    """Of each query; empty where it has none."""
    rows = task.index.query_N[task.query_pair_Q]
    return _in_threads(task, rows, lambda reader, row: _cut(reader.words(row), _CHARACTERS_OF_QUERY), moved)


def _lines_of(path: Path, fingerprint: str) -> list[dict[str, Any]] | None:
    """The queries of rankings that were kept; None where there are none, or those of another task."""
    if not path.exists():
        return None
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return lines if head["fingerprint"] == fingerprint else None


def _ranks(lines: Sequence[dict[str, Any]]) -> Int64:
    return np.array([line["rank"] or 0 for line in lines], np.int64)


def _reciprocal(rank_Q: Int64) -> npt.NDArray[np.float64]:
    return np.where(rank_Q > 0, 1.0 / np.maximum(rank_Q, 1), 0.0)


def _shown(query: int, why: list[str], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A query for the report, by its line; ``lines`` are its newest ranking, and the one before, if there is one."""
    right = next((line["right"] for line in lines if line["rank"]), lines[0]["right"])
    pages = {page for line in lines for page in line["pages"][:PAGES_SHOWN]} | {right}
    return {"line": query, "why": why, "right": right, "pages": sorted(pages)}


def _in_threads(
    task: RetrievalTask, rows: Int64, work: Callable[[InputReader, int], Made], moved: Callable[[], None]
) -> list[Made]:
    """What becomes of some inputs, in their order: shards may be far away, and decoders let go of Python's lock."""

    def some(part: Int64) -> list[Made]:
        with closing(InputReader(task.index, task.store)) as reader:
            made = []
            for row in part.tolist():
                moved()
                made.append(work(reader, row))
            return made

    with ThreadPoolExecutor(_THREADS) as pool:
        return [one for made in pool.map(some, np.array_split(rows, _THREADS)) for one in made]


def _card(reader: InputReader, row: int, folder: Path) -> dict[str, Any]:
    index = reader.index
    card: dict[str, Any] = {"kind": modality_name(int(index.input_modality_I[row]))}
    name = f"{int(index.input_hash_I[row]) & (1 << 64) - 1:016x}.jpg"
    try:
        if words := _cut(reader.words(row), _CHARACTERS_OF_PAGE):
            card["words"] = words
        if not (folder / name).exists() and (picture := reader.picture(row, SIDE)) is not None:
            with published(folder / name) as file:
                file.write(thumbnail_bytes(picture))
    except UserError as error:
        # Its name stands beside it, and the folder that it lies in is nobody's business.
        reason = error.reason if isinstance(error, BadInputError) else str(error)
        return {**card, "fault": _cut(reason, _CHARACTERS_OF_PAGE)}
    if (folder / name).exists():
        with Image.open(folder / name) as picture:
            card |= {"picture": name, "width": picture.width, "height": picture.height}
    return card


def _cut(text: str, most: int) -> str:
    """In one line, at most so many characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _remove_unused(folder: Path) -> None:
    """Thumbnails that no file names any more."""
    used = set()
    for path in folder.glob("*-shown.json"):
        shown = json.loads(path.read_text(encoding="utf-8"))
        used |= {card.get("picture") for card in [*shown["queries"], *shown["pages"].values()]}
    for path in (folder / "thumbnails").iterdir():
        if path.name not in used:
            path.unlink()
