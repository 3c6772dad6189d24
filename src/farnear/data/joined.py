"""Columns of several scans end to end, and lists of rows: what ``join`` works with.

Shapes: S shards, M parts, I inputs, N pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from farnear.data.columns import ArrowStrings, Column
from farnear.data.scan_rows import ShardScan

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class JoinedScans:
    """The parts and inputs of all scans. A shard may be among them twice: as one of pairs, and as one of documents."""

    def __init__(self, scans: Sequence[ShardScan]) -> None:
        self.scans = scans
        self._number = {(scan.shard, scan.corpus): number for number, scan in enumerate(scans)}
        inputs_S = [len(scan.columns["input_hash"]) for scan in scans]
        self._first_input_S = np.cumsum([0, *inputs_S], dtype=np.int64)

    def number_of(self, scan: ShardScan) -> int:
        """The place of ``scan`` among all."""
        return self._number[scan.shard, scan.corpus]

    def first_input_of(self, scan: ShardScan) -> int:
        """The row of its first input."""
        return int(self._first_input_S[self.number_of(scan)])

    def documents_of(self, corpus: Sequence[ShardScan]) -> Int64:
        """The input rows of the documents of corpus shards."""
        first = [(self.first_input_of(scan), len(scan.columns["corpus_key"])) for scan in corpus]
        return joined_numbers([np.arange(start, start + count) for start, count in first])

    def shard_of_part_M(self) -> Int32:
        """Places of shards."""
        parts_S = [len(scan.columns["part_hash"]) for scan in self.scans]
        return np.repeat(np.arange(len(self.scans), dtype=np.int32), parts_S)

    def columns(self) -> dict[str, Any]:
        """Those of the index that are about shards, parts and inputs."""
        return {
            "shard_size_S": np.array([scan.size for scan in self.scans], np.int64),
            "part_shard_M": self.shard_of_part_M(),
            **{f"{name}_M": self.numbers(name) for name in _PART_COLUMNS},
            "part_name": self.strings("part_name"),
            "part_start_I1": starts_of(self.numbers("input_parts")),
            "input_hash_I": self.numbers("input_hash"),
            "input_modality_I": self.numbers("input_modality"),
        }

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column of all scans."""
        return np.concatenate([np.asarray(scan.columns[name]) for scan in self.scans])

    def strings(self, name: str) -> ArrowStrings:
        """A column of all scans."""
        return strings_of(self.scans, name)


_PART_COLUMNS = ("part_offset", "part_size", "part_hash", "part_kind", "part_entry", "part_width", "part_height")


def strings_of(scans: Sequence[ShardScan], name: str) -> ArrowStrings:
    """A column of some scans, end to end."""
    return ArrowStrings.joined([text_column(scan.columns[name]) for scan in scans])


def text_column(column: Column) -> ArrowStrings:
    """The column, which holds texts."""
    if not isinstance(column, ArrowStrings):
        raise TypeError("a column of numbers where texts belong")
    return column


def starts_of(counts: npt.NDArray[Any]) -> Int64:
    """Where each of some lists starts that are laid end to end, and where the last one ends. [lists + 1]"""
    return np.append(0, np.cumsum(counts, dtype=np.int64))


@dataclass
class RowLists:
    """A list of input rows for each pair."""

    start_N1: Int64
    rows: Int64

    def counts(self) -> Int64:
        """The length of each list."""
        return np.diff(self.start_N1)

    def missing(self) -> Int64:
        """How many items of each list were not found."""
        pair = np.repeat(np.arange(len(self.start_N1) - 1), self.counts())
        return np.bincount(pair[self.rows < 0], minlength=len(self.start_N1) - 1)

    def keep(self, keep: Bool) -> None:
        """Take rows out of their lists."""
        pair = np.repeat(np.arange(len(self.start_N1) - 1), self.counts())
        self.rows = self.rows[keep]
        self.start_N1 = starts_of(np.bincount(pair[keep], minlength=len(self.start_N1) - 1))

    def of(self, pairs: Int64) -> "RowLists":
        """The lists of some pairs."""
        keep_N = np.zeros(len(self.start_N1) - 1, np.bool_)
        keep_N[pairs] = True
        return RowLists(starts_of(self.counts()[pairs]), self.rows[np.repeat(keep_N, self.counts())])


def joined_numbers(columns: Sequence[npt.NDArray[Any]]) -> Int64:
    """The columns end to end, be there any or none."""
    return np.concatenate(columns).astype(np.int64, copy=False) if columns else np.zeros(0, np.int64)
