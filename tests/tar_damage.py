"""Whole tars of all writers, formats and layouts, and steps that damage them by chance; for ``tar_fuzz``."""

import io
import json
import os
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tar_makers import Members, write_tar
from webdataset import TarWriter

_BLOCK = tarfile.BLOCKSIZE
_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
_WRITERS = ("ustar", "gnu", "pax", "webdataset", "tar gnu", "tar posix", "tar v7")


@cache
def whole_sets() -> list[dict[str, bytes]]:
    """Sets of tars by name, pairs.tar and for some corpus.tar."""
    chance = random.Random("whole")
    return [
        {name: _write(members, writer) for name, members in layout(chance, writer == "tar v7").items()}
        for writer in _WRITERS
        for layout in (_inline, _inline, _referenced)
    ]


def _inline(chance: random.Random, short: bool) -> dict[str, Members]:
    members: Members = [("README.md", b"words")]
    for number in range(6):
        key = _key(chance, number, short)
        if number % 3 == 2:
            members.append((f"{key}.query.txt", f"query {number}".encode()))
        else:
            query = [f"query {number}", "another"] if number == 4 else f"query {number}"
            members.append((f"{key}.json", json.dumps({"query": query}).encode()))
        pages = [_picture(chance) for _ in range(1 + chance.randrange(4))]
        parts = [(f"{key}.{pages[0][0]}", pages[0][1])]
        parts += [(f"{key}.neg{place}.{suffix}", data) for place, (suffix, data) in enumerate(pages[1:])]
        if chance.random() < 0.2:
            parts.append((f"{key}.txt", b"words of the page"))
        if chance.random() < 0.2:
            parts.append((f"{key}.cls", b"7"))
        members += sorted(parts) if chance.random() < 0.5 else parts
    return {"pairs.tar": members}


def _referenced(chance: random.Random, short: bool) -> dict[str, Members]:
    keys = [_key(chance, 20 + number, short) for number in range(8)]
    corpus: Members = []
    for key in keys:
        suffix, data = _picture(chance)
        corpus.append((f"{key}.{suffix}", data))
        if chance.random() < 0.3:
            corpus.append((f"{key}.txt", b"words of the page"))
    pairs: Members = []
    for number in range(6):
        ids = chance.sample(keys, 4)
        record: dict[str, Any] = {"query": f"query {number}", "neg_ids": ids[: chance.randrange(3)]}
        record |= {"pos_ids": ids[2:]} if chance.random() < 0.3 else {"pos_id": ids[3]}
        pairs.append((f"{_key(chance, number, short)}.json", json.dumps(record).encode()))
    return {"pairs.tar": pairs, "corpus.tar": corpus}


def _key(chance: random.Random, number: int, short: bool) -> str:
    name = f"k{number:02d}x"
    forms = [name, f"folder/{name}", name + "y" * 110, f"{'f' * 90}/{'g' * 40}/{name}", f"seite-ü-{name}"]
    return forms[0 if short else chance.randrange(len(forms))]


def _picture(chance: random.Random) -> tuple[str, bytes]:
    suffix, name = chance.choice([("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
    size = chance.choice([(6, 4), (24, 18)])
    image = Image.frombytes("RGB", size, chance.randbytes(size[0] * size[1] * 3))
    buffer = io.BytesIO()
    image.save(buffer, name)
    return suffix, buffer.getvalue()


def _write(members: Members, writer: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        if writer in _FORMATS:
            fits = writer != "ustar" or all(len(name) < 100 for name, _ in members)
            write_tar(path, members, _FORMATS[writer] if fits else tarfile.GNU_FORMAT)
        elif writer == "webdataset":
            with TarWriter(str(path), encoder=False, format="PAX_FORMAT") as out:
                for name, data in members:
                    base, _, suffix = name.partition(".")
                    out.write({"__key__": base, suffix: data})
        else:
            for name, data in members:
                (Path(folder) / "in" / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / "in" / name).write_bytes(data)
            names = [name for name, _ in members]
            command = ["tar", f"--format={writer.split()[1]}", "-C", f"{folder}/in", "-cf", str(path), *names]
            subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
        return path.read_bytes()


@dataclass(frozen=True)
class State:
    """Bytes, and of each the place in what the tar said, -1 where it comes from elsewhere."""

    data: bytes
    origin: np.ndarray

    def replaced(self, start: int, data: bytes) -> "State":
        return State(self.data[:start] + data + self.data[start + len(data) :], self.origin)

    def spliced(self, start: int, end: int, data: bytes, origin: np.ndarray | None = None) -> "State":
        new = np.full(len(data), -1) if origin is None else origin
        return State(
            self.data[:start] + data + self.data[end:], np.concatenate([self.origin[:start], new, self.origin[end:]])
        )


def whole_state(data: bytes) -> State:
    """What a tar of ``data`` says is all that it holds."""
    return State(data, np.arange(len(data)))


def _headers(data: bytes) -> list[tuple[int, bytes, int]]:
    """(position, type, size) of the headers, as far as they can be followed."""
    found = []
    position = 0
    while position + _BLOCK <= len(data) and any(data[position : position + _BLOCK]):
        try:
            size = int(data[position + 124 : position + 135].strip(b" \0") or b"0", 8)
        except ValueError:
            break
        found.append((position, data[position + 156 : position + 157], size))
        position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return found


def _cut(now: State, chance: random.Random) -> State:
    end = chance.randrange(len(now.data) + 1)
    if chance.random() < 0.3:
        end -= end % _BLOCK
    return State(now.data[:end], now.origin[:end])


def _flip(now: State, start: int, end: int, chance: random.Random) -> State:
    for _ in range(chance.choice([1, 1, 2, 4, 8])):
        if start < min(end, len(now.data)):
            place = chance.randrange(start, min(end, len(now.data)))
            now = now.replaced(place, bytes([now.data[place] ^ (1 << chance.randrange(8))]))
    return now


def _flip_header(now: State, chance: random.Random) -> State:
    headers = _headers(now.data)
    for position, _, _ in chance.sample(headers, min(len(headers), chance.choice([1, 1, 2]))):
        flipped = _flip(now, position, position + _BLOCK, chance)
        try:
            tarfile.TarInfo.frombuf(flipped.data[position : position + _BLOCK], "utf-8", "surrogateescape")
        except tarfile.TarError:
            now = flipped  # else the flips cancel out in the checksum, and it is what the tar says
    return now


def _flip_behind(wanted: bytes) -> Callable[[State, random.Random], State]:
    def step(now: State, chance: random.Random) -> State:
        found = [one for one in _headers(now.data) if one[1] in wanted and one[2]]
        if not found:
            return now
        position, _, size = chance.choice(found)
        return _flip(now, position + _BLOCK, position + _BLOCK + size, chance)

    return step


def _range(now: State, chance: random.Random) -> tuple[int, int]:
    blocks = max(1, len(now.data) // _BLOCK)
    start = chance.randrange(blocks) * _BLOCK
    return start, min(len(now.data), start + chance.choice([1, 1, 2, 3, 4, 8]) * _BLOCK)


def _zero(now: State, chance: random.Random) -> State:
    start, end = _range(now, chance)
    return now.replaced(start, bytes(end - start))


def _overwrite(now: State, chance: random.Random) -> State:
    start, end = _range(now, chance)
    return now.replaced(start, chance.randbytes(end - start))


def _double(now: State, chance: random.Random) -> State:
    start, end = _range(now, chance)
    return now.spliced(end, end, now.data[start:end], now.origin[start:end])


def _remove(now: State, chance: random.Random) -> State:
    return now.spliced(*_range(now, chance), b"")


def _move(now: State, chance: random.Random) -> State:
    place, count = chance.randrange(len(now.data) + 1), chance.choice([1, 3, 100, 511, 513, 700])
    if chance.random() < 0.5:
        return now.spliced(place, min(len(now.data), place + count), b"")
    return now.spliced(place, place, chance.randbytes(count))


def _append_garbage(now: State, chance: random.Random) -> State:
    garbage = chance.choice([chance.randbytes(chance.randrange(1, 3000)), bytes(chance.randrange(2000)) + b"x"])
    return now.spliced(len(now.data), len(now.data), garbage)


def _append_tar(now: State, chance: random.Random) -> State:
    other = chance.choice([one for tars in whole_sets() for one in tars.values()])
    behind = chance.choice([now.data, other, other[: chance.randrange(len(other))], bytes(3000)])
    return now.spliced(len(now.data), len(now.data), behind)


def join_tar(now: State, chance: random.Random) -> State:
    """One whole tar made of two, with keys that are used twice."""
    headers = _headers(now.data)
    end = headers[-1][0] + _BLOCK + -(-headers[-1][2] // _BLOCK) * _BLOCK if headers else 0
    return now.spliced(end, len(now.data), chance.choice([one for tars in whole_sets() for one in tars.values()]))


def _with_checksum(now: State, position: int, place: int, field_bytes: bytes) -> State:
    header = bytearray(now.data[position : position + _BLOCK])
    header[place : place + len(field_bytes)] = field_bytes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return now.replaced(position, bytes(header))


def _rename(now: State, chance: random.Random) -> State:
    headers = _headers(now.data)
    if not headers:
        return now
    position, _, _ = chance.choice(headers)
    name = now.data[position : position + 100].rstrip(b"\0")
    stem, _, suffix = name.partition(b".")
    other = now.data[(start := chance.choice(headers)[0]) : start + 100].rstrip(b"\0")
    new = chance.choice(
        [
            other,
            other.partition(b".")[0] + b"." + suffix,
            stem + b"." + chance.choice([b"neg0.png", b"gif", b"json", b"neg1.gif", b"png", b"txt", b"query.txt"]),
            b"\xff" + name[1:],
            b"",
            b"." + suffix,
            name + b"x",
        ]
    )
    return _with_checksum(now, position, 0, new[:100].ljust(100, b"\0"))


def _lie(now: State, chance: random.Random) -> State:
    headers = _headers(now.data)
    if not headers:
        return now
    position, _, size = chance.choice(headers)
    if chance.random() < 0.5:
        return _with_checksum(now, position, 156, chance.choice([b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"Z"]))
    lies = [0, size + 1, max(0, size - 1), size + _BLOCK, max(0, size - _BLOCK), size * 2, len(now.data), 8**11 - 1]
    return _with_checksum(now, position, 124, b"%011o\0" % chance.choice(lies))


_FILES, _NAMES = b"0\0", b"LxK"
LATE_STEPS = [_cut, _append_garbage, _flip_header]
STEPS = [
    *LATE_STEPS,
    _append_tar,
    join_tar,
    _flip_header,
    _flip_behind(_FILES),
    _flip_behind(_NAMES),
    _zero,
    _overwrite,
    _double,
    _remove,
    _move,
    _rename,
    _lie,
]
