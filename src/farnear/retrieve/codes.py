"""Pages in fewer bytes: a byte a component (int8) or a bit (binary), as sentence-transformers makes them.

    int8     255 steps between the least and the largest value that a component has among the pages; a quarter of fp32
    binary   the sign of each component, eight in a byte; a thirty-second

A page's embedding is first cut to its dimension and brought to length 1. The codes are bit for bit those of
`sentence_transformers.util.quantize_embeddings`, which a test compares; it takes seconds to import. How pages in such
codes are searched is in `farnear.retrieve.flat_index`.

Shapes: n rows, P pages, D components, d of them kept, b bytes.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from farnear.retrieve.search import Rows

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Precision = Literal["float32", "int8", "binary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

BLOCK = 4096


def unit_prefix(row_nD: npt.NDArray[Any], dim: int) -> Float32:
    """The first ``dim`` components [n, dim], scaled to length 1; a zero vector stays one."""
    prefix_nd = np.asarray(row_nD[:, :dim], dtype=np.float32)
    unit_nd: Float32 = prefix_nd / np.linalg.norm(prefix_nd, axis=1, keepdims=True).clip(min=1e-12)
    return unit_nd


def value_ranges(rows: Rows, dim: int) -> Float32:
    """The least and the largest value [2, dim] that each component of the unit prefixes has."""
    least, largest = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
    for start in range(0, len(rows), BLOCK):
        unit_nd = unit_prefix(rows[start : start + BLOCK], dim)
        least, largest = np.minimum(least, unit_nd.min(axis=0)), np.maximum(largest, unit_nd.max(axis=0))
    return np.stack([least, largest])


def int8_codes(unit_nd: Float32, ranges: Float32) -> Int8:
    """Codes [n, d] of unit rows; ``ranges`` [2, d] as `value_ranges` gives them."""
    code_nd = np.floor((unit_nd - ranges[0]) / _steps(ranges)).clip(0, 255) - 128
    return code_nd.astype(np.int8)


def binary_codes(unit_nd: Float32) -> Int8:
    """Signs of n rows, eight components in a byte [n, d / 8], shifted by 128 to fit a signed one."""
    return (np.packbits(unit_nd > 0, axis=-1) - 128).astype(np.int8)


def _steps(ranges: Float32) -> Float32:
    step_d = (ranges[1] - ranges[0]) / 255
    return np.where(step_d == 0, np.float32(1), step_d)


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """int8 codes as the rows that they stand for: what `top_k` searches. A value lies in the middle of its step."""

    code_Pd: Any
    ranges: Float32
    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        return self.code_Pd.shape[0], self.code_Pd.shape[1]

    def __len__(self) -> int:
        return len(self.code_Pd)

    def __getitem__(self, rows: Any) -> Float32:
        value_nd: Float32 = (self.code_Pd[rows].astype(np.float32) + 128.5) * _steps(self.ranges) + self.ranges[0]
        return value_nd


@dataclass(frozen=True, eq=False)
class BinaryRows:
    """Binary codes as rows of 1 and -1."""

    code_Pb: Any
    dim: int
    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        return self.code_Pb.shape[0], self.dim

    def __len__(self) -> int:
        return len(self.code_Pb)

    def __getitem__(self, rows: Any) -> Float32:
        byte_nb = (self.code_Pb[rows].astype(np.int16) + 128).astype(np.uint8)
        return np.unpackbits(byte_nb, axis=-1, count=self.dim).astype(np.float32) * 2 - 1
