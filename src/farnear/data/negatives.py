"""Hard negatives of training pairs: those that the shards hold, or those that a file of `farnear mine` names.

Whatever they come from, a page that answers the query is none of them: not by its row, nor by its key, nor by its
content, nor because another pair asks the same and has it for an answer. Here that is made sure once for all readers.

Shapes: N pairs, L positives of all pairs, K negatives of all pairs, n any rows or items.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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

    def teacher_of(self, pair: int) -> Float32:
        """The teacher's scores of a pair's negatives."""
        return self.teacher[self.start_N1[pair] : self.start_N1[pair + 1]]

    def counts(self, most: int | None = None) -> Int64:
        """How many each pair has, ``most`` at most. [N]"""
        counts_N = np.diff(self.start_N1)
        return counts_N if most is None else np.minimum(counts_N, most)


class AnswersOfQueries:
    """Which documents answer which queries, for many at once: `Index.positive_hashes_of_query` as a table.

    A query and a content stand in it as one number of 64 bits made of both hashes. Two that chance gives one number
    would cost a negative, and never let an answer pass.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._query_hash_n = np.repeat(index.query_hash_N, np.diff(index.positive_start_N1))
        self._known_n = _together(self._query_hash_n, index.input_hash_I[index.positives])
        self._value_set = pa.array(self._known_n)

    def answers(self, pair_n: Int64, row_n: Int64) -> Bool:
        """Whether document ``row_n``, or another with its content, answers the query of pair ``pair_n``."""
        return self.of_hashes(self._index.query_hash_N[pair_n], self._index.input_hash_I[row_n])

    def of_hashes(self, query_hash_n: Int64, hash_n: Int64) -> Bool:
        """The same of queries and documents by their hashes."""
        is_answer = pc.is_in(pa.array(_together(query_hash_n, hash_n)), value_set=self._value_set)
        is_answer_n: Bool = is_answer.to_numpy(zero_copy_only=False)
        return is_answer_n

    def counts(self) -> Int64:
        """How many contents answer each pair's query. [N]"""
        _, first_n = np.unique(self._known_n, return_index=True)
        hashes, counts = np.unique(self._query_hash_n[first_n], return_counts=True)
        counts_N: Int64 = counts[np.searchsorted(hashes, self._index.query_hash_N)].astype(np.int64)
        return counts_N


def first_of_content(owner_n: Int64, hash_n: Int64) -> Bool:
    """Which items are the first with their content in the list of their owner; items of an owner may lie anywhere."""
    _, first = np.unique(_together(owner_n, hash_n), return_index=True)
    is_first_n = np.zeros(len(owner_n), np.bool_)
    is_first_n[first] = True
    return is_first_n


def _together(one_n: Int64, hash_n: Int64) -> npt.NDArray[np.uint64]:
    """One number of two of which the second is a hash."""
    return one_n.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ hash_n.astype(np.uint64)


def _unknown(n: int) -> Float32:
    return np.full(n, np.nan, np.float32)
