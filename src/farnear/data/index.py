"""The index: what the scans of all shards found, as columns that are never loaded.

Training asks for any pair at any time, so it needs to know where each query and page lies without walking a tar again.
``join`` makes an index of the scans. ``write_index`` stores it as one uncompressed Arrow IPC file; ``open_index`` maps
that file into memory and hands out numpy views of it, so that all ranks and workers of a node share one copy in the
page cache and opening costs nothing at any size.

The fingerprint covers the shards' names and content and what was left out, but no folder: a set of shards that was
moved or copied to a node's own disk keeps its order of training, one that was changed does not.

Shapes: S shards, M parts (members), I inputs of the model (queries and documents), C documents of corpus shards,
N pairs, K sources.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farnear.data.columns import ArrowStrings, DamagedFileError, open_columns, write_columns
from farnear.data.faults import Fault
from farnear.data.ranges import ranges
from farnear.data.remote import short_name, shown
from farnear.data.scan_rows import MODALITY_BITS
from farnear.errors import UserError
from farnear.wording import printable

__all__ = ["FORMAT", "MODALITY_BITS", "Index", "modality_name", "open_index", "write_index"]

FORMAT = "farnear index 5"

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Index:
    """Where every pair and page of a set of shards lies. Arrays are read-only views when they come from a file.

    An input is what goes into the model as one: a query or a document, made of one or several parts (members of a tar).
    Two samples with the same picture have two inputs with equal hashes. ``input_hash_I`` tells documents apart,
    ``query_hash_N`` queries: texts by their words, without regard to white space and case. Lists of rows belong to pair
    ``i`` from ``start[i]`` to ``start[i + 1]``.
    """

    shards: tuple[str, ...]  # absolute paths or URLs; those of pairs first, source by source, then those of documents
    etags: tuple[str, ...]  # of shards behind URLs, "" for files
    sources: tuple[str, ...]  # their names
    fingerprint: str  # hex
    faults: tuple[Fault, ...]
    excluded: int  # pairs left out because data.exclude names them
    ignored_members: int  # members that belong to no pair or page, not counting directories
    ignored_examples: tuple[str, ...]  # a few of them, "shard name/member name"
    shard_size_S: Int64  # bytes
    shard_source_S: Int32  # -1 for shards of documents
    shard_pairs_S: Int64  # pairs that the scan met, be they usable, faulty or excluded
    part_shard_M: Int32
    part_offset_M: Int64
    part_size_M: Int64
    part_hash_M: Int64
    part_kind_M: UInt8  # see farnear.data.sample
    part_entry_M: Int32  # place in the JSON's list of queries, -1 where it is no list
    part_width_M: Int32  # pixels of an image, else 0
    part_height_M: Int32
    part_name: ArrowStrings  # [M] names of the members
    part_start_I1: Int64
    input_hash_I: Int64
    input_modality_I: UInt8  # bits of MODALITY_BITS
    corpus_C: Int64  # input rows
    pair_key: ArrowStrings  # [N] keys, unique within a source
    pair_shard_N: Int32
    source_start_K1: Int64  # pairs of source k: source_start_K1[k] : source_start_K1[k + 1]
    query_N: Int64  # input rows
    query_hash_N: Int64
    by_query_hash_N: Int64  # pair rows, sorted by query_hash_N
    positive_start_N1: Int64
    positives: Int64  # input rows; every pair has at least one
    negative_start_N1: Int64
    negatives: Int64  # input rows
    path: Path | None = None  # of the file it was opened from

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process is sent: the file's name where there is a file, for it can map it too.

        A file that someone deleted is still mapped here, so then the columns themselves are sent.
        """
        return {"path": self.path} if self.path and self.path.exists() else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state if len(state) > 1 else vars(open_index(state["path"])))

    def __len__(self) -> int:
        """The number of pairs N (0 for corpus shards)."""
        return len(self.pair_key)

    def pair_id(self, pair: int) -> str:
        """How a pair is named to people: ``"train-000.tar/KEY"``."""
        return printable(f"{self.shard_name(int(self.pair_shard_N[pair]))}/{self.pair_key[pair]}")

    def input_id(self, row: int) -> str:
        """How a query or document is named to people, by its first part: ``"train-000.tar/KEY.png"``."""
        part = int(self.part_start_I1[row])
        return printable(f"{self.shard_name(int(self.part_shard_M[part]))}/{self.part_name[part]}")

    def shard_name(self, shard: int) -> str:
        """The last part of a shard's path or URL; all of it where another shard ends alike."""
        name = short_name(self.shards[shard])
        alike = {other for other in self.shards if name in other and short_name(other) == name}
        return name if len(alike) == 1 else shown(self.shards[shard])

    def parts(self, row: int) -> range:
        """Part rows of an input."""
        return range(int(self.part_start_I1[row]), int(self.part_start_I1[row + 1]))

    def documents(self) -> Int64:
        """Input rows of every document, of pairs and of corpus shards, each once and rising."""
        return np.unique(np.concatenate([self.positives, self.negatives, self.corpus_C]))

    def is_part_of(self, rows: Int64) -> npt.NDArray[np.bool_]:
        """Which parts the inputs ``rows`` are made of. [M]"""
        is_asked_I = np.zeros(len(self.input_hash_I), np.bool_)
        is_asked_I[rows] = True
        return np.repeat(is_asked_I, np.diff(self.part_start_I1))

    def positives_of(self, pair: int) -> Int64:
        """Input rows of a pair's positive documents."""
        return self.positives[self.positive_start_N1[pair] : self.positive_start_N1[pair + 1]]

    def negatives_of(self, pair: int) -> Int64:
        """Input rows of a pair's hard negatives."""
        return self.negatives[self.negative_start_N1[pair] : self.negative_start_N1[pair + 1]]

    def positive_hashes_of_query(self, pair: int) -> Int64:
        """Content hashes of every document that answers the pair's query: its own and those of pairs that ask alike."""
        wanted, by_query = self.query_hash_N[pair], self.by_query_hash_N
        first, last = (np.searchsorted(self.query_hash_N, wanted, side, sorter=by_query) for side in ("left", "right"))
        alike = by_query[first:last]  # a query may be asked of a hundred thousand pages
        start, size = self.positive_start_N1[alike], np.diff(self.positive_start_N1)[alike]
        return np.unique(self.input_hash_I[self.positives[ranges(start, size)]])


_HEADER_FIELDS = (
    "shards",
    "etags",
    "sources",
    "fingerprint",
    "faults",
    "excluded",
    "ignored_members",
    "ignored_examples",
)
_COLUMNS = tuple(column.name for column in fields(Index) if column.name not in (*_HEADER_FIELDS, "path"))


def modality_name(bits: int) -> str:
    """``"image"``, ``"image+text"``, for chat messages with an image ``"image+message"``: of ``input_modality_I``."""
    return "+".join(sorted(name for name, bit in MODALITY_BITS.items() if bits & bit))


def write_index(index: Index, path: Path) -> None:
    """Store ``index``; whoever looks at ``path`` sees the old file or the whole new one."""
    header = {name: getattr(index, name) for name in _HEADER_FIELDS}
    header["faults"] = [asdict(fault) for fault in index.faults]
    write_columns(path, {name: getattr(index, name) for name in _COLUMNS}, header, FORMAT)


def open_index(path: Path, *, check: bool = False) -> Index:
    """Map the file that ``write_index`` wrote; its arrays are views of the map, nothing is read until it is used.

    With ``check`` all of it is read once and compared with its digest. Raises ``UserError`` for a file that is missing,
    damaged, no index, or of another format version.
    """
    try:
        columns, header = open_columns(path, FORMAT, check=check)
    except FileNotFoundError:
        raise UserError(
            f"index {path} does not exist, so the pairs cannot be found; build it from the shards"
        ) from None
    except DamagedFileError as error:
        raise UserError(
            f"index {path} is damaged or not an index ({error}); delete it and let it be built again from the shards"
        ) from None
    header["faults"] = [Fault(**fault) for fault in header["faults"]]
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in header.items()}
    return Index(**lists, **columns, path=path)  # type: ignore[arg-type]
