"""Splits pairs into a training and an evaluation side.

A figure on evaluation pages is worth little when the model has trained on the same document or the same question.
Pairs that share a document or a query are therefore tied together, and so are those tied to the same third one:
`split` deals out whole groups of tied pairs. Which group goes where depends on a hash of the group's name and the seed
alone, so that adding documents moves few others to the other side.

Hard negatives tie nothing: mined from one collection of pages, they would tie everything to everything. So a page that
is asked for on one side may be a wrong answer on the other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from farnear.errors import UserError

Queries = str | tuple[str, ...]  # one, or several for the same page


@dataclass(frozen=True)
class Record:
    """A pair without its page.

    Attributes:
        key: names the pair within its shard; no dot and no slash, at which a tar's reader would cut it.
        query: the text to search for, or several.
        document: what the page is part of; pairs of one document stay on one side of a split.
    """

    key: str
    query: Queries
    document: str


def split(records: Sequence[Record], eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Deal records out to training and evaluation so that no document and no query is on both sides.

    Queries are the same when they differ in case and white space only.

    Args:
        records: N of them.
        eval_fraction: the share of records wanted for evaluation, 0 <= eval_fraction < 1.
        seed: another seed, another split.

    Returns:
        Row numbers of the training side and of the evaluation side, both rising, N in all. The evaluation side is
        empty for a fraction of 0 and else has between half and twice as many rows as wanted, most often as many.

    Raises:
        UserError: the fraction is out of range, or the groups of tied records are too large to split near it.
    """
    if not 0 <= eval_fraction < 1:
        raise UserError(f"an evaluation fraction of {eval_fraction} leaves nothing to train on; give 0 <= fraction < 1")
    if eval_fraction == 0:
        return list(range(len(records))), []
    groups = _tied_groups(records)
    if len(groups) < 2:
        raise UserError(
            f"cannot split {len(records)} pairs: all of them hang together through shared documents or queries, so any "
            "split would put one on both sides; add other documents or import the evaluation pairs by themselves"
        )
    wanted = max(1, round(eval_fraction * len(records)))
    ordered_names = sorted(groups, key=lambda name: hashlib.blake2b(f"{seed}\0{name}".encode()).digest())
    eval_rows: list[int] = []
    for name in ordered_names:
        with_group = len(eval_rows) + len(groups[name])
        if with_group < len(records) and abs(with_group - wanted) < abs(len(eval_rows) - wanted):
            eval_rows += groups[name]
    if 2 * len(eval_rows) < wanted:
        sizes = sorted(len(rows) for rows in groups.values())
        fitting = [size / len(records) for size in sizes if wanted < size <= len(records) / 2]
        raise UserError(
            f"cannot keep about {wanted} of {len(records)} pairs for evaluation: the largest groups of pairs tied by "
            f"shared documents or queries hold {', '.join(map(str, sizes[:-6:-1]))} pairs and must stay whole; "
            + (f"ask for a fraction of {fitting[0]:.2g}" if fitting else "import the evaluation pairs by themselves")
            + ", or add documents"
        )
    in_eval = set(eval_rows)
    return [row for row in range(len(records)) if row not in in_eval], sorted(eval_rows)


def normalised(query: str) -> str:
    """What makes two queries the same one: the text without regard to case and white space."""
    return " ".join(query.split()).casefold()


def queries_of(query: Queries) -> tuple[str, ...]:
    """One query or several, as several."""
    return (query,) if isinstance(query, str) else query


def _tied_groups(records: Sequence[Record]) -> dict[str, list[int]]:
    """Rows of each connected component of documents and queries, by the component's smallest document id."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for record in records:
        for query in queries_of(record.query):
            parent[root(("query", normalised(query)))] = root(("document", record.document))
    rows_of_root: dict[tuple[str, str], list[int]] = {}
    for row, record in enumerate(records):
        rows_of_root.setdefault(root(("document", record.document)), []).append(row)
    return {min(records[row].document for row in rows): rows for rows in rows_of_root.values()}
