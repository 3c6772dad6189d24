"""Lines of JSON in a run folder, read so that a wrong value is named with its file, its line and its key."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TypeVar

from farnear.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Record:
    """A line's object with its place, so that a wrong value can be named."""

    place: str
    value: dict[str, object]

    def refuse(self, problem: str) -> UserError:
        return UserError(
            f"{self.place}: {problem}, so the report would be wrong: remove the line or restore the file from a copy"
        )

    def number(self, key: str) -> float:
        if key not in self.value:
            raise self.refuse(f"{key!r} is missing")
        value = self.value[key]
        if value is None:
            return nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(f"{key!r} is {value!r}, not a number")
        return float(value)

    def count(self, key: str) -> int:
        number = self.number(key)
        if not number.is_integer() or number < 0:
            raise self.refuse(f"{key!r} is {self.value[key]!r}, not a whole number of 0 or more")
        return int(number)

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str):
            raise self.refuse(f"{key!r} is {'missing' if key not in self.value else f'{value!r}, not a text'}")
        return value

    def inner(self, key: str) -> "Record":
        value = self.value.get(key)
        if not isinstance(value, dict):
            raise self.refuse(f"{key!r} is {'missing' if key not in self.value else 'not an object'}")
        return Record(self.place, value)

    def items(self, key: str, kind: type[Item]) -> list[Item]:
        """A list of values of one kind; whole numbers are floats too."""
        values = self.value.get(key)
        kinds: tuple[type, ...] = (float, int) if kind is float else (kind,)
        if not isinstance(values, list) or not all(
            isinstance(value, kinds) and not isinstance(value, bool) for value in values
        ):
            raise self.refuse(f"{key!r} is {'missing' if key not in self.value else f'no list of {kind.__name__}'}")
        return values


def records_of(path: Path) -> Iterator[Record]:
    """The objects of a file of JSON lines; none where there is no file. Raises UserError.

    A last line without its end is being written, or a kill came in the middle of it: a resume cuts it off.
    """
    if not path.exists():
        return
    *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines if not _is_whole(rest) else [*lines, rest], start=1):
        yield _record(line, f"{path} line {number}")


def record_of(path: Path) -> Record:
    """The object that is all of a file. Raises UserError."""
    return _record(path.read_bytes(), str(path))


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _record(text: bytes, place: str) -> Record:
    try:
        value = json.loads(text)
    except ValueError:
        raise Record(place, {}).refuse("this is not a complete JSON object") from None
    if not isinstance(value, dict):
        raise Record(place, {}).refuse("this is not a JSON object")
    return Record(place, value)
