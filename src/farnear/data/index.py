"""The index: what a scan of the shards found, as columns that are never loaded.

Training asks for any pair at any time, so it needs to know where each query and page lies without walking a tar again.
``build_index`` scans every shard once (see ``scan``), in parallel where that pays, and lays the results of all shards
end to end. ``write_index`` stores them as one uncompressed Arrow IPC file; ``open_index`` maps that file into memory
and hands out numpy views of it, so that all ranks and workers of a node share one copy in the page cache and opening
costs nothing at any size.

The fingerprint covers the shards' names and sizes and every column, but no folder: a set of shards that was moved or
copied to a node's own disk keeps its order of training, one that was changed does not.

Shapes: S shards, P pages (stored images), N pairs, K hard negatives of all pairs.
"""

import glob
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from farnear.data.scan import EXAMPLES_OF_IGNORED, ShardScan, scan_shard
from farnear.errors import UserError
from farnear.processes import main_module_hidden

FORMAT_VERSION = 1
_FORMAT_KEY = b"farnear.index"
_BYTES_WORTH_A_PROCESS = 512 << 20

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class ArrowStrings(Sequence[str]):
    """A column of strings that stays in its Arrow buffer; items become ``str`` one by one when they are asked for."""

    def __init__(self, column: pa.LargeStringArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> "ArrowStrings": ...
    def __getitem__(self, item: int | slice) -> "str | ArrowStrings":
        if isinstance(item, slice):
            return ArrowStrings(self.column[item])
        text: str = self.column[int(item)].as_py()
        return text


@dataclass(frozen=True, eq=False)
class Index:
    """Where every pair and page of a set of shards lies. Arrays are read-only views when they come from a file.

    A page is a stored image: two samples with the same picture have two pages with equal hashes. Hashes are the 64 bits
    of BLAKE2b-8 as a signed integer, of a page's stored bytes and of a query's text with white space and case folded.
    The hard negatives of pair ``i`` are ``negatives[negative_start_N1[i] : negative_start_N1[i + 1]]``.
    """

    shards: tuple[str, ...]  # absolute paths
    fingerprint: str  # hex
    ignored_members: int  # members that belong to no pair or page, not counting directories
    ignored_examples: tuple[str, ...]  # a few of them, "shard name/member name"
    shard_size_S: Int64  # bytes
    page_shard_P: Int32
    page_offset_P: Int64
    page_size_P: Int64
    page_hash_P: Int64
    page_name: ArrowStrings  # [P] names of the members
    pair_key: ArrowStrings  # [N] keys, unique over all shards
    query_shard_N: Int32
    query_offset_N: Int64
    query_size_N: Int64
    query_is_json_N: Bool
    query_hash_N: Int64
    positive_N: Int64  # page rows
    negative_start_N1: Int64  # [N + 1]
    negatives: Int64  # [K] page rows
    path: Path | None = None  # of the file it was opened from

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process is sent: the file's name where there is a file, for it can map it too."""
        return {"path": self.path} if self.path else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(open_index(state["path"])) if state["path"] else state)

    def __len__(self) -> int:
        """The number of pairs N (0 for page shards)."""
        return len(self.pair_key)

    def pair_id(self, pair: int) -> str:
        """How a pair is named to people: ``"train-000.tar/KEY"``."""
        return f"{Path(self.shards[self.query_shard_N[pair]]).name}/{self.pair_key[pair]}"

    def page_id(self, page: int) -> str:
        """How a page is named to people: ``"train-000.tar/KEY.png"``."""
        return f"{Path(self.shards[self.page_shard_P[page]]).name}/{self.page_name[page]}"


_HEADER_FIELDS = ("shards", "fingerprint", "ignored_members", "ignored_examples")
_COLUMNS = tuple(column.name for column in fields(Index) if column.name not in (*_HEADER_FIELDS, "path"))


def expand_shards(patterns: Sequence[str], what: str) -> list[Path]:
    """Absolute paths of the shards that ``patterns`` name, in the order of the patterns, sorted within a glob.

    Patterns may hold ``~``, ``{000..007}`` and ``{a,b}`` (expanded first, each must exist) and ``*``, ``?``, ``[...]``
    (at least one match each). ``what`` is how messages call the list. Raises ``UserError``.
    """
    paths = list(chain.from_iterable(_expand_one(pattern, what) for pattern in patterns))
    if not paths:
        raise UserError(f"{what}: no shard is named, so there is nothing to read; name at least one .tar")
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise UserError(f"{what}: {path} is named twice, so its pairs would count twice; name each shard once")
        seen.add(path)
    return paths


def _expand_one(pattern: str, what: str) -> list[Path]:
    paths: list[Path] = []
    for name in _expand_braces(os.path.expanduser(pattern), what):
        if not Path(name).exists() and glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise UserError(
                    f"{what}: {name!r} matches no file, so there is nothing to read; paths are taken from the working "
                    f"folder, {os.getcwd()}"
                )
        else:
            matches = [name]
        paths += [Path(os.path.abspath(match)) for match in matches]
    for path in paths:
        if not path.is_file():
            wrong = "is a folder and not a tar" if path.is_dir() else "does not exist"
            raise UserError(f"{what}: {path} {wrong}, so its pairs would be missing; check {pattern!r}")
    return paths


def _expand_braces(pattern: str, what: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    from braceexpand import braceexpand  # only patterns with braces need the package

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"{what}: the braces of {pattern!r} do not match; write them like {{000..007}}") from None


def build_index(shards: Sequence[Path], *, pairs: bool = True) -> Index:
    """Scan ``shards`` and index what they hold: pairs, or with ``pairs=False`` pages only (distractors).

    More than one shard and more than 512 MB are scanned by as many processes as this process may use cores. Raises
    ``UserError`` naming shard and offset or key for a damaged tar, an incomplete sample, an unusable query or a key
    that is used twice.
    """
    names = [os.path.abspath(shard) for shard in shards]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(len(names), cores)
    total_bytes = sum(os.path.getsize(name) for name in names if os.path.exists(name))
    if processes > 1 and total_bytes > _BYTES_WORTH_A_PROCESS:
        with main_module_hidden(), ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            scans = list(pool.map(partial(scan_shard, pairs=pairs), names))
    else:
        scans = [scan_shard(name, pairs) for name in names]
    return _join(scans)


def _join(scans: Sequence[ShardScan]) -> Index:
    """Lay the scans end to end: page rows that counted from 0 within a shard now count over all shards."""

    def numbers(field: str, dtype: npt.DTypeLike = np.int64) -> npt.NDArray[Any]:
        return np.fromiter(chain.from_iterable(getattr(scan, field) for scan in scans), dtype)

    def strings(field: str) -> ArrowStrings:
        return ArrowStrings(pa.array(chain.from_iterable(getattr(scan, field) for scan in scans), pa.large_string()))

    def shard_of_row(field: str) -> Int32:
        return np.repeat(np.arange(len(scans), dtype=np.int32), [len(getattr(scan, field)) for scan in scans])

    first_page_S = np.cumsum([0] + [len(scan.page_offset) for scan in scans[:-1]], dtype=np.int64)
    columns: dict[str, Any] = {
        "shard_size_S": np.array([scan.size for scan in scans], np.int64),
        "page_shard_P": shard_of_row("page_offset"),
        "page_offset_P": numbers("page_offset"),
        "page_size_P": numbers("page_size"),
        "page_hash_P": numbers("page_hash"),
        "page_name": strings("page_name"),
        "pair_key": strings("pair_key"),
        "query_shard_N": shard_of_row("pair_key"),
        "query_offset_N": numbers("query_offset"),
        "query_size_N": numbers("query_size"),
        "query_is_json_N": numbers("query_is_json", np.bool_),
        "query_hash_N": numbers("query_hash"),
        "positive_N": numbers("positive") + first_page_S[shard_of_row("positive")],
        "negative_start_N1": np.cumsum(np.append(0, numbers("negatives_of_pair")), dtype=np.int64),
        "negatives": numbers("negatives") + first_page_S[shard_of_row("negatives")],
    }
    shards = tuple(scan.shard for scan in scans)
    _refuse_shared_keys(columns["pair_key"], columns["query_shard_N"], shards)
    examples = [f"{Path(scan.shard).name}/{name}" for scan in scans for name in scan.ignored_examples]
    return Index(
        shards=shards,
        fingerprint=_fingerprint(shards, columns),
        ignored_members=sum(scan.ignored_members for scan in scans),
        ignored_examples=tuple(examples[:EXAMPLES_OF_IGNORED]),
        **columns,
    )


def _refuse_shared_keys(pair_key: ArrowStrings, query_shard_N: Int32, shards: Sequence[str]) -> None:
    counts = pc.value_counts(pair_key.column)
    if len(counts) == len(pair_key):
        return
    key = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
    first, second = np.flatnonzero(pc.equal(pair_key.column, key).to_numpy(zero_copy_only=False))[:2]
    raise UserError(
        f"the key {key.as_py()!r} is used in shard {shards[query_shard_N[first]]} and again in shard "
        f"{shards[query_shard_N[second]]}, so its pairs cannot be told apart; give each sample a key of its own"
    )


def _fingerprint(shards: Sequence[str], columns: dict[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps([Path(shard).name for shard in shards]).encode(), digest_size=16)
    for name, column in columns.items():
        digest.update(f"\n{name}:{len(column)}\n".encode())
        if isinstance(column, ArrowStrings):
            digest.update("\0".join(column.column.to_pylist()).encode())
        else:
            digest.update(column.tobytes())
    return digest.hexdigest()


def write_index(index: Index, path: Path) -> None:
    """Store ``index`` as one Arrow IPC file; whoever looks at ``path`` sees the old file or the whole new one.

    The columns differ in length, so the file holds a table of one row whose cells are lists, each a whole column.
    """
    header = {name: getattr(index, name) for name in _HEADER_FIELDS}
    cells = []
    for name in _COLUMNS:
        column = getattr(index, name)
        values = column.column if isinstance(column, ArrowStrings) else pa.array(_as_integers(column))
        cells.append(pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values))
    row = pa.record_batch(cells, names=list(_COLUMNS))
    metadata = {_FORMAT_KEY: str(FORMAT_VERSION), b"header": json.dumps(header)}
    unpublished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(unpublished, "wb") as file:
            with pa.ipc.new_file(file, row.schema.with_metadata(metadata)) as writer:
                writer.write_batch(row)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unpublished, path)
    finally:
        unpublished.unlink(missing_ok=True)


def open_index(path: Path) -> Index:
    """Map the file that ``write_index`` wrote; its arrays are views of the map, nothing is read until it is used.

    Raises ``UserError`` for a file that is missing, is no index, or has another format version.
    """
    build_again = "delete it and let it be built again from the shards"
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        raise UserError(
            f"index {path} does not exist, so the pairs cannot be found; build it from the shards"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"index {path} is damaged or not an index ({_one_line(error)}); {build_again}") from None
    metadata = reader.schema.metadata or {}
    version = metadata.get(_FORMAT_KEY, b"none").decode()
    if version != str(FORMAT_VERSION):
        raise UserError(
            f"index {path} has format version {version} and this farnear reads version {FORMAT_VERSION}; {build_again}"
        )
    header = json.loads(metadata[b"header"])
    row = reader.get_batch(0)
    columns: dict[str, Any] = {}
    for name in _COLUMNS:
        values = row.column(name).values
        if pa.types.is_large_string(values.type):
            columns[name] = ArrowStrings(values)
        else:
            columns[name] = values.to_numpy(zero_copy_only=True)
    columns["query_is_json_N"] = columns["query_is_json_N"].view(np.bool_)
    return Index(
        shards=tuple(header["shards"]),
        fingerprint=header["fingerprint"],
        ignored_members=header["ignored_members"],
        ignored_examples=tuple(header["ignored_examples"]),
        path=path,
        **columns,
    )


def _as_integers(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Arrow packs booleans into bits, which no numpy view can show; as bytes they stay what they are."""
    return column.view(np.uint8) if column.dtype == np.bool_ else column


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
