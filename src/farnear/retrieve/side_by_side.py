"""Several models on one task: each measured, the first compared with every other, told as tables and left as files.

    OUT/qrels.txt              what answers what, as TREC has it
    OUT/NAME/results.json      the measures at every dimension and precision, bytes and seconds beside them
    OUT/NAME/run.trec          what was found at the largest dimension, in fp32 where that is to be had
    OUT/comparison.json        of every model with the first: differences with their intervals
    OUT/queries.csv            a line for each query: its measure and the rank of its page by each model, what changed

Collections may come from anywhere, so what is compared is made sure of: the same queries, the same pages, the same
answers. Their rows may stand in other orders.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farnear.errors import UserError
from farnear.files import replace_text
from farnear.retrieve.codes import Precision
from farnear.retrieve.collection import Collection, refuse_dim
from farnear.retrieve.compare import Difference, differences
from farnear.retrieve.measure import OF_AN_EVALUATION
from farnear.retrieve.quality import Quality, qualities, refuse_unmeasurable
from farnear.retrieve.trec import write_qrels, write_run
from farnear.wording import counted

OF_A_COMPARISON = ("comparison.json", "queries.csv")
NOT_FOUND = 0
"""The rank of a page that is not among the ``DEPTH`` nearest."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that was measured."""

    name: str
    collection: Collection
    qualities: Sequence[Quality]

    def quality(self, dim: int, precision: Precision) -> Quality | None:
        """Of a dimension in a precision, if it was measured."""
        return next((one for one in self.qualities if (one.dim, one.precision) == (dim, precision)), None)


@dataclass(frozen=True)
class Compared:
    """A measure of a model beside the baseline's, at one dimension in one precision."""

    model: str
    dim: int
    precision: Precision
    measure: str
    baseline: float
    value: float
    difference: Difference


def measured(
    collections: Mapping[str, Collection],
    dims: Sequence[int] | None,
    precisions: Sequence[Precision],
    rescore_multiplier: int = 1,
) -> list[Subject]:
    """Measure models by their names.

    Args:
        dims: Unset: the whole embedding of each, and the Matryoshka dims that any of their manifests tells of.

    Raises:
        UserError: A dimension is larger than every model has, or they are not of one task.
    """
    for collection in collections.values():
        refuse_unmeasurable(collection)
    refuse_other_tasks(collections)
    found = []
    known = {dim for one in collections.values() for dim in one.facts.get("matryoshka_dims") or ()}
    largest = max(one.dim for one in collections.values())
    if dims and max(dims) > largest:
        raise UserError(f"no model has {max(dims)} components, the most are {largest}; ask for fewer")
    for name, collection in collections.items():
        wanted = {collection.dim, *known} if dims is None else set(dims)
        within = [dim for dim in wanted if dim <= collection.dim]
        if not within:
            raise UserError(f"{name} has {collection.dim} components, fewer than any dimension asked for; add one")
        if collection.precision != "float32" and collection.dim not in within:
            raise UserError(
                f"{name} is stored in {collection.precision} and can be measured at its own {collection.dim} "
                "components alone; add them to --dims"
            )
        if collection.precision == "float32" and "binary" in precisions:
            for dim in within:
                refuse_dim(dim, collection.dim, "binary")
        found.append(Subject(name, collection, qualities(collection, within, precisions, rescore_multiplier)))
    return found


def refuse_other_tasks(collections: Mapping[str, Collection]) -> None:
    """Raise UserError unless all have the queries, the pages and the answers of the first."""
    (first_name, first), *others = collections.items()
    for name, other in others:
        for what, ids, known in (
            ("query", other.query_ids, first.query_ids),
            ("page", other.document_ids, first.document_ids),
        ):
            if ids != known and (odd := set(ids) ^ set(known)):
                several = {"query": "queries"}.get(what)
                raise UserError(
                    f"{name} and {first_name} are not measured on the same task: {counted(len(odd), what, several)} "
                    f"({min(odd)} first) belong to one of them only; encode the same shards with both"
                )
        if _answers(other) != _answers(first):
            raise UserError(
                f"{name} and {first_name} have other pages for the same queries in qrels.txt, so their measures do not "
                "compare; encode the same shards with both"
            )


def _answers(collection: Collection) -> dict[str, set[str]]:
    ids = collection.document_ids
    rows = zip(collection.query_ids, collection.relevant, strict=True)
    return {query: {ids[page] for page in pages} for query, pages in rows}


def compare(subjects: Sequence[Subject], *, resamples: int, seed: int) -> list[Compared]:
    """Every model but the first with the first, wherever both were measured."""
    baseline, *others = subjects
    found = []
    for other in others:
        place_Q = _places(baseline, other)
        both = measured_by_both(baseline, other)
        columns = [one.by_query[name][place_Q] - base.by_query[name] for one, base in both for name in OF_AN_EVALUATION]
        found_differences = iter(differences(np.stack(columns, axis=1), resamples=resamples, seed=seed))
        found += [
            Compared(other.name, one.dim, one.precision, name, base.measures[name], one.measures[name], difference)
            for one, base in both
            for name, difference in zip(OF_AN_EVALUATION, found_differences, strict=False)
        ]
    return found


def measured_by_both(baseline: Subject, other: Subject) -> list[tuple[Quality, Quality]]:
    """The other model's qualities, the largest first, each with the baseline's at its dimension and precision.

    Raises:
        UserError: There is none.
    """
    both = [(one, base) for one in other.qualities if (base := baseline.quality(one.dim, one.precision))]
    if not both:
        told = [
            f"{subject.name} ({', '.join(f'{one.precision} at {one.dim}' for one in subject.qualities)})"
            for subject in (baseline, other)
        ]
        raise UserError(
            f"nothing was measured alike of {told[0]} and {told[1]}, so they cannot be compared; ask for a dimension "
            "and a precision that both have with --dims and --precision"
        )
    return both


def _places(baseline: Subject, other: Subject) -> npt.NDArray[np.int64]:
    """Where the baseline's queries stand in another collection."""
    place_of = {query: place for place, query in enumerate(other.collection.query_ids)}
    return np.array([place_of[query] for query in baseline.collection.query_ids], np.int64)


def first_ranks(subject: Subject, quality: Quality) -> npt.NDArray[np.int64]:
    """The rank, from 1, of the first page that answers each query; ``NOT_FOUND`` where none is that near."""
    ranks = [
        next((rank for rank, page in enumerate(pages, 1) if page in answers), NOT_FOUND)
        for pages, answers in zip(quality.page_Qk.tolist(), subject.collection.relevant, strict=True)
    ]
    return np.array(ranks, np.int64)


@dataclass(frozen=True)
class QueryChange:
    """A query by the baseline and by another model, both at the largest dimension that both were measured at."""

    query: str
    text: str
    baseline: float
    value: float
    baseline_rank: int
    rank: int

    @property
    def change(self) -> float:
        """Of the measure; above 0 where it got better."""
        return self.value - self.baseline


def query_changes(baseline: Subject, other: Subject, measure: str) -> list[QueryChange]:
    """Every query by both models, the greatest gain first."""
    (of_other, of_base), *_ = measured_by_both(baseline, other)
    place_Q = _places(baseline, other)
    texts = baseline.collection.texts
    columns = zip(
        baseline.collection.query_ids,
        of_base.by_query[measure].tolist(),
        of_other.by_query[measure][place_Q].tolist(),
        first_ranks(baseline, of_base).tolist(),
        first_ranks(other, of_other)[place_Q].tolist(),
        strict=True,
    )
    changes = [QueryChange(query, texts[query], *figures) for query, *figures in columns]
    return sorted(changes, key=lambda one: -one.change)


def write_results(out: Path, subjects: Sequence[Subject]) -> None:
    """Leave what was measured of each model, and TREC's files."""
    first = subjects[0].collection
    out.mkdir(parents=True, exist_ok=True)
    for name in OF_A_COMPARISON:
        # Of an earlier one, which had other results.
        (out / name).unlink(missing_ok=True)
    write_qrels(out / "qrels.txt", first.query_ids, first.document_ids, first.relevant)
    for subject in subjects:
        collection, best = subject.collection, subject.qualities[0]
        facts = {key: value for key, value in collection.facts.items() if key not in ("format", "dim", "precision")}
        folder = out / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        rows = [quality_as_plain(one) for one in subject.qualities]
        about = {**facts, "queries": len(collection.query_ids), "documents": len(collection.document_ids)}
        replace_text(
            folder / "results.json", json.dumps({"name": subject.name, **about, "results": rows}, indent=1) + "\n"
        )
        write_run(
            folder / "run.trec",
            collection.query_ids,
            collection.document_ids,
            best.score_Qk,
            best.page_Qk,
            f"{subject.name}-{best.dim}",
        )


def quality_as_plain(one: Quality) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "dim": one.dim,
        "precision": one.precision,
        **one.measures,
        "index_bytes": one.index_bytes,
        "search_seconds": one.search_seconds,
    }


def write_comparison(out: Path, subjects: Sequence[Subject], compared: Sequence[Compared], measure: str) -> None:
    """Leave the differences, and the table of queries."""
    baseline, *others = subjects
    about = {"baseline": baseline.name, "measure": measure, "differences": [asdict(one) for one in compared]}
    replace_text(out / OF_A_COMPARISON[0], json.dumps(about, indent=1) + "\n")
    changes = {other.name: {one.query: one for one in query_changes(baseline, other, measure)} for other in others}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    of_others = [f"{name} {what}" for name in changes for what in (measure, "rank", "change")]
    writer.writerow(["query", "text", f"{baseline.name} {measure}", f"{baseline.name} rank", *of_others])
    for query, one in changes[others[0].name].items():
        row = [query, " ".join(one.text.split()), f"{one.baseline:.6f}", one.baseline_rank or ""]
        for by_query in changes.values():
            other = by_query[query]
            row += [f"{other.value:.6f}", other.rank or "", f"{other.change:+.6f}"]
        writer.writerow(row)
    replace_text(out / OF_A_COMPARISON[1], text.getvalue())
