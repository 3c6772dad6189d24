"""Columns of different lengths in one uncompressed Arrow IPC file, mapped into memory instead of read.

The file holds a table of one row whose cells are lists, each a whole column, and a JSON header in the schema's
metadata. Opening one costs the same at any size: numpy views are handed out, and all processes of a node share the
pages that they touch. A digest of all that it holds stands beside the header, for whoever wants to know that it is what
was written: offsets that a disk has changed would point at other bytes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from farnear.files import published

_FORMAT_KEY = b"farnear.format"
_HEADER_KEY = b"farnear.header"
_DIGEST_KEY = b"farnear.digest"


class ArrowStrings(Sequence[str]):
    """A column of strings that stays in its Arrow buffer; items become ``str`` one by one when they are asked for."""

    def __init__(self, column: pa.LargeStringArray) -> None:
        self.column = column

    @classmethod
    def of(cls, texts: Iterable[str]) -> "ArrowStrings":
        """A column made of ``texts``."""
        return cls(pa.array(texts, pa.large_string()))

    @classmethod
    def joined(cls, columns: Sequence["ArrowStrings"]) -> "ArrowStrings":
        """All of ``columns`` end to end."""
        parts = [column.column for column in columns]
        return cls(pa.concat_arrays(parts) if parts else pa.array([], pa.large_string()))

    def take(self, rows: npt.NDArray[np.int64]) -> "ArrowStrings":
        """The items at ``rows``."""
        return ArrowStrings(self.column.take(pa.array(rows)))

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """What the texts are made of, as views: where each ends, and the bytes of all."""
        if not len(self.column):
            return ()
        _, ends, texts = self.column.buffers()
        first = self.column.offset
        ends_n1 = np.frombuffer(ends, np.int64)[first : first + len(self.column) + 1]
        data = np.frombuffer(texts or b"", np.uint8)[ends_n1[0] : ends_n1[-1]]
        return ends_n1 - ends_n1[0], data

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


Column = npt.NDArray[Any] | ArrowStrings


class DamagedFileError(ValueError):
    """The file is no such file, or of another format; the message says which."""


def write_columns(path: Path, columns: Mapping[str, Column], header: Mapping[str, Any], format_name: str) -> None:
    """Store ``columns`` and ``header``; whoever looks at ``path`` sees the old file or the whole new one."""
    cells = []
    for column in columns.values():
        values = column.column if isinstance(column, ArrowStrings) else pa.array(column)
        cells.append(pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values))
    row = pa.record_batch(cells, names=list(columns))
    text = json.dumps(header)
    metadata = {_FORMAT_KEY: format_name, _HEADER_KEY: text, _DIGEST_KEY: _digest_of(columns, text.encode())}
    with published(path) as file, pa.ipc.new_file(file, row.schema.with_metadata(metadata)) as writer:
        writer.write_batch(row)


def open_columns(path: Path, format_name: str, *, check: bool) -> tuple[dict[str, Column], dict[str, Any]]:
    """Map a file that ``write_columns`` wrote; arrays are read-only views of the map.

    To ``check`` the digest the whole file is read, at several GB/s. Raises FileNotFoundError, and ``DamagedFileError``
    for what is no such file, has another format, or has another digest.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        metadata = reader.schema.metadata or {}
        found = metadata.get(_FORMAT_KEY, b"none").decode()
        if found != format_name:
            raise DamagedFileError(f"its format is {found} and not {format_name}")
        header = json.loads(metadata[_HEADER_KEY])
        row = reader.get_batch(0)
        row.validate()
        names = row.schema.names  # which are not decoded before
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise DamagedFileError(" ".join(str(error).split())) from None
    columns: dict[str, Column] = {}
    for name in names:
        values = row.column(name).values
        is_text = pa.types.is_large_string(values.type)
        columns[name] = ArrowStrings(values) if is_text else values.to_numpy(zero_copy_only=True)
    if check and _digest_of(columns, metadata[_HEADER_KEY]).encode() != metadata.get(_DIGEST_KEY):
        raise DamagedFileError("its digest is another one")
    return columns, header


def _digest_of(columns: Mapping[str, Column], header: bytes) -> str:
    digest = xxhash.xxh3_128(header)
    for name, column in columns.items():
        digest.update(f"\n{name}:{len(column)}\n".encode())
        for array in column.arrays() if isinstance(column, ArrowStrings) else (column,):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return str(digest.hexdigest())
