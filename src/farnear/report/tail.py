"""Files of JSON lines that grow, read as they grow.

A run of a million steps leaves gigabytes of `metrics.jsonl`, and whoever watches it looks every two seconds. So the
first look takes the end of the file alone, and each later one what has come since. The writer may be killed in the
middle of a line, which is left until its end is there; a resumed run cuts its files, or a new one replaces them, which
shows in that the bytes before the place that was reached are not what they were. Then reading begins anew.

Damage is passed over: who watches a run is not helped by an error, and the report names it (`farnear.report.records`).
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

FIRST_LOOK_BYTES = 2 * 1024**2
_SEAM = 64  # bytes by which a place is known again
_SAMPLE_BYTES = 8 * 1024

Record = dict[str, Any]


class Tail:
    """The end of a file of JSON lines, from the last so many bytes on."""

    def __init__(self, path: Path, first_look_bytes: int = FIRST_LOOK_BYTES) -> None:
        self._path, self._first_look_bytes = path, first_look_bytes
        self._place = 0
        self._seam: bytes | None = None

    def look(self) -> tuple[bool, list[Record]]:
        """(whether what came before no longer holds, the records that have come since)."""
        try:
            with open(self._path, "rb") as file:
                return self._read(file)
        except OSError:
            is_anew = self._seam is not None
            self._place, self._seam = 0, None
            return is_anew, []

    def _read(self, file: BinaryIO) -> tuple[bool, list[Record]]:
        is_anew = self._seam is not None and not self._is_the_same(file)
        if self._seam is None or is_anew:
            size = file.seek(0, os.SEEK_END)
            self._place = max(0, size - self._first_look_bytes)
            if self._place:
                file.seek(self._place - 1)
                self._place += len(file.readline()) - 1
        file.seek(self._place)
        lines, newline, _ = file.read().rpartition(b"\n")
        self._place += len(lines) + len(newline)
        self._seam = _before(file, self._place)
        return is_anew, _records(lines)

    def _is_the_same(self, file: BinaryIO) -> bool:
        return _before(file, self._place) == self._seam


def samples(path: Path, count: int) -> list[Record]:
    """Records from all over a file, some in a row at each of ``count`` places; the whole of it where it is small."""
    found: list[Record] = []
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= count * _SAMPLE_BYTES:
                file.seek(0)
                return _records(file.read())
            for place in range(count):
                file.seek(size * place // count)
                # Both its ends may be parts of a line.
                whole = file.read(_SAMPLE_BYTES).split(b"\n")[1 if place else 0 : -1]
                found += _records(b"\n".join(whole))
    except OSError:
        return []
    return found


def _before(file: BinaryIO, place: int) -> bytes:
    start = max(0, place - _SEAM)
    file.seek(start)
    return file.read(place - start)


def _records(lines: bytes) -> list[Record]:
    records = []
    for line in lines.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
