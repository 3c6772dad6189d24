"""Hard negatives of training pairs: those that the shards hold, or those that a file of `farnear mine` names.

Whatever they come from, a page that answers the query is none of them: not by its row, nor by its key, nor by its
content, nor because another pair asks the same and has it for an answer. Here that is made sure once for all readers.

Shapes: N pairs, L positives of all pairs, K negatives of all pairs, n any rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from farnear.data.index import Index
from farnear.data.joined import starts_of

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Negatives:
    """The hard negatives of every pair, best first. Arrays may be read-only views of a file.

    Attributes:
        start_N1: Those of pair i are ``start_N1[i] : start_N1[i + 1]``.
        rows: Input rows. [K]
        similarity: Cosines to the query by the embedder that mined them, NaN where nobody says. [K]
        teacher: A reranker's raw scores, NaN likewise. [K]
        positive_teacher: Its scores of the positives, as `Index.positives` has them. [L]
        origin: Where they come from, in words.
    """

    start_N1: Int64
    rows: Int64
    similarity: Float32
    teacher: Float32
    positive_teacher: Float32
    origin: str = "of the shards"

    @classmethod
    def of_index(cls, index: Index) -> "Negatives":
        """Those that the shards hold, without scores; a positive among them is left out."""
        start_N1, rows = index.negative_start_N1, index.negatives
        if len(rows):
            pair_n = np.repeat(np.arange(len(index)), np.diff(start_N1))
            keep_n = ~AnswersOfQueries(index).answers(pair_n, rows)
            if not keep_n.all():
                rows = rows[keep_n]
                start_N1 = starts_of(np.bincount(pair_n[keep_n], minlength=len(index)))
        return cls(start_N1, rows, _unknown(len(rows)), _unknown(len(rows)), _unknown(len(index.positives)))

    def of(self, pair: int) -> Int64:
        """Input rows of a pair's negatives."""
        return self.rows[self.start_N1[pair] : self.start_N1[pair + 1]]

    def counts(self, most: int | None = None) -> Int64:
        """How many each pair has, ``most`` at most. [N]"""
        counts_N = np.diff(self.start_N1)
        return counts_N if most is None else np.minimum(counts_N, most)


class AnswersOfQueries:
    """Which documents answer which queries, for many at once: `Index.positive_hashes_of_query` as a table."""

    def __init__(self, index: Index) -> None:
        self._hash_I = index.input_hash_I
        _, self.query_of_pair_N = np.unique(index.query_hash_N, return_inverse=True)
        hash_n = self._hash_I[index.positives]
        self._hashes = np.unique(hash_n)
        query_n = np.repeat(self.query_of_pair_N, np.diff(index.positive_start_N1))
        self._known = np.unique(query_n * len(self._hashes) + np.searchsorted(self._hashes, hash_n))

    def count_of_query(self, query_n: Int64) -> Int64:
        """How many contents answer each query."""
        start_n, stop_n = (np.searchsorted(self._known, (query_n + more) * len(self._hashes)) for more in (0, 1))
        counts: Int64 = stop_n - start_n
        return counts

    def answers(self, pair_n: Int64, row_n: Int64) -> Bool:
        """Whether document ``row_n``, or another with its content, answers the query of pair ``pair_n``."""
        return self.of_query(self.query_of_pair_N[pair_n], self._hash_I[row_n])

    def of_query(self, query_n: Int64, hash_n: Int64) -> Bool:
        """The same of queries by their place among the distinct ones in the order of their hashes, and of contents."""
        place_n = np.searchsorted(self._hashes, hash_n).clip(max=max(len(self._hashes) - 1, 0))
        asked_n = query_n * len(self._hashes) + place_n
        found_n = np.searchsorted(self._known, asked_n).clip(max=max(len(self._known) - 1, 0))
        is_answer_n: Bool = (self._hashes[place_n] == hash_n) & (self._known[found_n] == asked_n)
        return is_answer_n


def first_of_content(owner_n: Int64, hash_n: Int64) -> Bool:
    """Which items are the first with their content in the list of their owner; items of an owner may lie anywhere."""
    order_n = np.lexsort((np.arange(len(owner_n)), hash_n, owner_n))
    is_new_n = np.ones(len(owner_n), np.bool_)
    same = (np.diff(owner_n[order_n]) == 0) & (np.diff(hash_n[order_n]) == 0)
    is_new_n[order_n[1:]] = ~same
    return is_new_n


def _unknown(n: int) -> Float32:
    return np.full(n, np.nan, np.float32)
