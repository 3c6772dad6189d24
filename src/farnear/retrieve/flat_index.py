"""Pages of one dimension in one precision, searched exactly: what a flat index of a vector database does.

Queries have length 1 and come as they are. Against int8 pages a score is the inner product with the values that the
codes stand for. Against binary pages a query's signs are compared, which is what makes such a search fast (Hamming
distance); the pages found so can be put in order once more by the query itself, as sentence-transformers does with its
``rescore_multiplier``.

A search for many queries at once is one product of matrices and says nothing about one that comes alone, so `alone` is
the search of one, written for that.

Shapes: Q queries, P pages, d components, k results, c candidates, b bytes.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.retrieve.codes import (
    BLOCK,
    BinaryRows,
    Float32,
    Int8Rows,
    Precision,
    binary_codes,
    int8_codes,
    unit_prefix,
    value_ranges,
)
from farnear.retrieve.search import Rows, top_k

Int64 = npt.NDArray[np.int64]


class FlatIndex(Protocol):
    """Pages that can be searched."""

    @property
    def nbytes(self) -> int:
        """Of the pages."""

    def search(self, query_Qd: Float32, k: int) -> tuple[Tensor, Tensor]:
        """Scores [Q, k] and pages [Q, k], best first, equal scores by the lower page."""

    def alone(self, query_d: Float32, k: int) -> Int64:
        """The pages [k] nearest to one query."""


def flat_index(documents: Rows, dim: int, precision: Precision, rescore_multiplier: int = 1) -> FlatIndex:
    """Pages at a dimension in a precision; ``documents`` that have codes already stay as they are.

    Args:
        rescore_multiplier: Of binary pages so many times as many are found by their signs and put in order by the query
            itself; 1 leaves them in the order of the signs.
    """
    if isinstance(documents, Int8Rows):
        return _Int8(documents)
    if isinstance(documents, BinaryRows):
        return _Binary(documents, rescore_multiplier)
    unit_Pd = unit_prefix(documents[:], dim)
    if precision == "float32":
        return _Float32(unit_Pd)
    if precision == "int8":
        ranges = value_ranges(documents, dim)
        return _Int8(Int8Rows(int8_codes(unit_Pd, ranges), ranges))
    return _Binary(BinaryRows(binary_codes(unit_Pd), dim), rescore_multiplier)


@dataclass(frozen=True, eq=False)
class _Float32:
    unit_Pd: Float32

    @property
    def nbytes(self) -> int:
        return self.unit_Pd.nbytes

    def search(self, query_Qd: Float32, k: int) -> tuple[Tensor, Tensor]:
        return top_k(query_Qd, self.unit_Pd, k, normalize=False)

    def alone(self, query_d: Float32, k: int) -> Int64:
        return _largest(self.unit_Pd @ query_d, k)


@dataclass(frozen=True, eq=False)
class _Int8:
    rows: Int8Rows

    @property
    def nbytes(self) -> int:
        return int(self.rows.code_Pd.nbytes)

    def search(self, query_Qd: Float32, k: int) -> tuple[Tensor, Tensor]:
        return top_k(query_Qd, self.rows, k, normalize=False)

    def alone(self, query_d: Float32, k: int) -> Int64:
        starts = range(0, len(self.rows), BLOCK)
        score_P = [self.rows[start : start + BLOCK] @ query_d for start in starts]
        return _largest(np.concatenate(score_P), k)


@dataclass(frozen=True, eq=False)
class _Binary:
    rows: BinaryRows
    rescore_multiplier: int

    @property
    def nbytes(self) -> int:
        return int(self.rows.code_Pb.nbytes)

    def search(self, query_Qd: Float32, k: int) -> tuple[Tensor, Tensor]:
        sign_Qd = np.where(query_Qd > 0, np.float32(1), np.float32(-1))
        # Sums of 1 and -1 are whole numbers, exact in fp32, so that equal distances are equal scores.
        score_Qc, page_Qc = top_k(sign_Qd, self.rows, k * self.rescore_multiplier, normalize=False)
        if self.rescore_multiplier == 1:
            return score_Qc, page_Qc
        page_Qc = page_Qc.sort(dim=1).values
        score_Qc = torch.stack([torch.from_numpy(self._scores(*one)) for one in zip(query_Qd, page_Qc, strict=True)])
        # Equal scores by the lower page: they stand by their pages, and the sort leaves that be.
        score_Qc, place_Qc = score_Qc.sort(dim=1, descending=True, stable=True)
        return score_Qc[:, :k], page_Qc.gather(1, place_Qc)[:, :k]

    def alone(self, query_d: Float32, k: int) -> Int64:
        code_b = binary_codes(query_d[None])
        differing_P = np.bitwise_count(_words(self.rows.code_Pb) ^ _words(code_b)).sum(axis=1, dtype=np.int32)
        page_c = _largest(-differing_P, k * self.rescore_multiplier)
        if self.rescore_multiplier == 1:
            return page_c
        return page_c[_largest(self._scores(query_d, torch.from_numpy(page_c)), k)]

    def _scores(self, query_d: Float32, page_c: Tensor) -> Float32:
        score_c: Float32 = self.rows[page_c.numpy()] @ query_d
        return score_c


def _words(code_Pb: npt.NDArray[np.int8]) -> npt.NDArray[np.unsignedinteger]:
    """Bytes as words of 64 bits, where they fill some."""
    code_Pb = np.ascontiguousarray(code_Pb)
    return code_Pb.view(np.uint64 if code_Pb.shape[1] % 8 == 0 else np.uint8)


def _largest(score_P: npt.NDArray[np.float32] | npt.NDArray[np.int32], k: int) -> Int64:
    """Places of the k largest, largest first."""
    k = min(k, len(score_P))
    place_k = np.argpartition(score_P, len(score_P) - k)[len(score_P) - k :]
    return place_k[np.argsort(-score_P[place_k], kind="stable")]
