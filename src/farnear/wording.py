"""Numbers and foreign texts in the sentences that people read."""

import re
from collections.abc import Sequence
from datetime import datetime, timezone

# Control characters could move a terminal's cursor and hide what stands there, marks of direction turn text around.
_UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def counted(number: int, one: str, several: str | None = None) -> str:
    """``1 pair``, ``1,024 pairs``; ``several`` is for words that take more than an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def amount(count: float) -> str:
    """Bytes in the unit that suits: ``512 bytes``, ``1.2 GB``."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:,.0f} bytes" if units[0] == "bytes" else f"{count:,.1f} {units[0]}"


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words: ``1, 3-5, 9``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def printable(text: str) -> str:
    """A line from a shard, with control characters spelled as Python does."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def writable(text: str) -> str:
    """A text as a file of UTF-8 takes it: half a pair of surrogates, which JSON can hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def some_of(words: Sequence[str], most: int = 8) -> str:
    """The first of many words, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return " ".join(words[:most]) + more


def utc_now() -> str:
    """The time as records tell it: ``2026-11-22T01:00:00Z``."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
