"""What a collection is worth: every query searched among its pages, at every dimension and in every precision.

A dimension is a prefix of the embedding, brought to length 1. Beside the measures of the ranking stand what the index
would take, its bytes and the time of a search for one query that comes alone, since that is what a smaller dimension or
a precision is chosen for. Searches are exact, one core per thread that torch has; an approximate index is faster.

Shapes: Q queries, P pages, k results, d components.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from farnear.errors import UserError
from farnear.retrieve.alone import seconds_alone
from farnear.retrieve.codes import Float32, Precision, unit_prefix
from farnear.retrieve.collection import Collection
from farnear.retrieve.flat_index import flat_index
from farnear.retrieve.measure import OF_AN_EVALUATION, measures_by_query
from farnear.wording import counted

DEPTH = 100


@dataclass(frozen=True, eq=False)
class Quality:
    """Of one dimension in one precision.

    Attributes:
        by_query: Each measure of each query, float64 [Q].
        page_Qk, score_Qk: What was found, best first: rows of the collection's pages, and scores of that precision.
        index_bytes: Of the pages.
        search_seconds: Of one query, the pages in memory.
    """

    dim: int
    precision: Precision
    by_query: dict[str, npt.NDArray[np.float64]]
    page_Qk: npt.NDArray[np.int64]
    score_Qk: Float32
    index_bytes: int
    search_seconds: float

    @property
    def measures(self) -> dict[str, float]:
        """The means over the queries."""
        return {name: float(value_Q.mean()) for name, value_Q in self.by_query.items()}


def refuse_unmeasurable(collection: Collection) -> None:
    """Raise UserError for a collection without queries, or with some that no page answers."""
    if not collection.query_ids:
        raise UserError(
            f"{collection.folder} holds pages and no queries, so nothing can be measured; encode shards of pairs"
        )
    if unanswered := [one for one, pages in zip(collection.query_ids, collection.relevant, strict=True) if not pages]:
        raise UserError(
            f"{collection.folder} holds {counted(len(unanswered), 'query', 'queries')} without a page that answers "
            f"({unanswered[0]} first), which cannot be measured; complete qrels.txt, or take them out"
        )


def qualities(
    collection: Collection,
    dims: Sequence[int],
    precisions: Sequence[Precision] = ("float32",),
    rescore_multiplier: int = 1,
) -> list[Quality]:
    """Measure a collection, the largest dimension first.

    Args:
        dims: Prefixes to search with, of at most the collection's own dimension. A collection that is stored in int8 or
            binary is measured as it is, whatever dims and precisions are asked for.
        rescore_multiplier: As in `flat_index`.
    """
    if collection.precision != "float32":
        dims, precisions = (collection.dim,), (collection.precision,)
    return [
        _quality(collection, dim, precision, rescore_multiplier)
        for dim in sorted(set(dims), reverse=True)
        for precision in precisions
    ]


def _quality(collection: Collection, dim: int, precision: Precision, rescore_multiplier: int) -> Quality:
    index = flat_index(collection.documents, dim, precision, rescore_multiplier)
    query_Qd = unit_prefix(collection.queries, dim)
    score_Qk, page_Qk = index.search(query_Qd, DEPTH)
    seconds = seconds_alone(lambda query: index.alone(query_Qd[query], 10), len(query_Qd))
    by_query = measures_by_query(page_Qk, collection.relevant, OF_AN_EVALUATION)
    return Quality(dim, precision, by_query, page_Qk.numpy(), score_Qk.numpy(), index.nbytes, seconds)
