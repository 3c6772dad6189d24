"""Damages tars by chance, and counts what farnear makes of them without a word.

A case is a number, which decides everything: a set of whole tars (every writer and format, samples inline, or pairs
that name pages of a corpus shard) and what happens to one of them: cut anywhere, bytes flipped in headers, names or
payloads, blocks zeroed, doubled, removed, overwritten, everything moved by some bytes, garbage or a second tar behind
the end, names, sizes and types that lie under a right checksum.

*What the tar said.* After each step an independent reader, Python's ``tarfile``, is asked whether the result is a whole
tar again: every header right, zeros and nothing else at the end. If it is, nobody can tell it from one that was meant
to be so, whether a payload has other bytes or a member another name, and it is what the tar says from now on. Else the
tar said what it did before that step. Samples are put together from tarfile's members by a few lines of ``tar_oracle``.

*First check: the damaged tar is indexed.* These are silent:

- a pair that is offered and is not one that the tar said: another key, a query, page or hard negative more or less or
  in another place, other bytes. Bytes alone may differ where they stand in their old place: a payload has no checksum
  in a tar, so that a first index cannot know. Pages that a pair names may be missing if a fault ``missing_page`` counts
  them.
- a pair that the tar said, that is not offered and is in no report. It is in a report where a fault names its key, and
  where it lies in a hole beside a fault of the archive itself (``cut_short``, ``damaged_header``, ``bytes_after_end``,
  ``bad_name``): between the two stands nothing that is offered. The same for pages of a corpus.
- in a tar that is whole: fewer ignored members counted than there are members without a meaning.
- what the reader gives for an input that is offered, if it is not what its bytes say by a decoder of this module.

*Second check: the tar is damaged under its index.* The index is made before, and the damaged bytes are read with it, in
their own length and brought to the old one. Silent is whatever is read and is not what it was before.

Crashes are exceptions other than ``UserError``, hangs are cases of more than ``SECONDS_A_CASE``.
"""

import io
import json
import random
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tar_damage import LATE_STEPS, STEPS, State, join_tar, whole_sets, whole_state
from tar_makers import STORE, index_of
from tar_oracle import TarMember, TarSample, count_ignored, samples_of, tar_members

from farnear.data.index import Index
from farnear.data.read import InputReader
from farnear.errors import UserError

SECONDS_A_CASE = 20
_OF_THE_ARCHIVE = ("cut_short", "damaged_header", "bytes_after_end", "bad_name")
_OF_THE_FILE = ("empty", "compressed", "not_a_tar")


@dataclass
class Counts:
    """What happened. ``failures`` says more of each case that is silent, a crash or a hang."""

    cases: int = 0
    silent: int = 0
    crashes: int = 0
    hangs: int = 0
    pairs: int = 0  # of what the tars said
    offered: int = 0
    failures: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The counts as one JSON object."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "failures"})


class SilentError(Exception):
    """Something wrong without a report."""


class HangError(BaseException):
    """A case took too long."""


def fuzz(cases: Iterable[int], folder: Path) -> Counts:
    """Run the cases, in ``folder``, and print the counts as one JSON line."""
    counts = Counts()
    for case in cases:
        counts.cases += 1
        try:
            with _limited(SECONDS_A_CASE):
                run_case(case, folder, counts)
        except SilentError as error:
            counts.silent += 1
            counts.failures.append(f"case {case}: silent: {error}")
        except HangError:
            counts.hangs += 1
            counts.failures.append(f"case {case}: hangs: {traceback.format_exc()}")
        except Exception:
            counts.crashes += 1
            counts.failures.append(f"case {case}: crash: {traceback.format_exc()}")
    print(counts.line())
    return counts


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def hang(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_case(case: int, folder: Path, counts: Counts) -> None:
    """One case. Raises ``SilentError``, and whatever the code under test raises."""
    chance = random.Random(case)
    tars = dict(chance.choice(whole_sets()))
    victim = chance.choice(sorted(tars))
    said, damaged = _damage(tars[victim], chance)
    before, after = tars | {victim: said.data}, tars | {victim: damaged.data}
    says = {name: samples_of(tar_members(data) or []) for name, data in before.items()}
    counts.pairs += len(says["pairs.tar"])
    try:
        index = _index(folder, after)
        counts.offered += len(index)
    except UserError:
        index = None  # two shards or pages cannot be told apart: a report for all
    if index is not None:
        origin = {name: np.arange(len(data)) for name, data in after.items()} | {victim: damaged.origin}
        _check_offered(index, after, origin, before, says)
        if damaged is said and not any(fault.kind in _OF_THE_ARCHIVE for fault in index.faults):
            ignored = sum(count_ignored(tar_members(after[name]) or [], name) for name in after)
            if index.ignored_members < ignored:
                raise SilentError(f"{index.ignored_members} ignored members counted of {ignored}")
        _check_missing(index, after, origin, before, says)
    _check_under_index(folder, before, victim, damaged.data, chance)


def _damage(data: bytes, chance: random.Random) -> tuple[State, State]:
    """(what the tar said, the damaged tar): the same object where the damaged tar is whole."""
    said = now = whole_state(data)
    steps = chance.choices([1, 2, 3], [70, 20, 10])[0]
    for _ in range(steps):
        # Once the tar is broken, what has no checksum is left alone, and no members are added: tarfile could not say
        # any more what the tar says.
        step = chance.choice(STEPS if now is said else LATE_STEPS)
        now = step(now, chance)
        if now.data != said.data and tar_members(now.data) is not None:
            said = now = whole_state(now.data)
        if step is join_tar:
            break  # what is said twice would be said once when one of both is lost
    return said, now


def _index(folder: Path, tars: dict[str, bytes]) -> Index:
    paths = {name: folder / name for name in tars}
    for name, data in tars.items():
        paths[name].write_bytes(data)
    return index_of([paths["pairs.tar"]], corpus=[path for name, path in paths.items() if name == "corpus.tar"])


Tars = dict[str, bytes]
Origins = dict[str, np.ndarray]
Samples = dict[str, dict[str, TarSample]]


def _check_offered(index: Index, after: Tars, origin: Origins, before: Tars, says: Samples) -> None:
    reader = InputReader(index, STORE)
    there = {_document_key(index, row) for row in index.corpus_C.tolist()}
    missed = 0
    for pair, key in enumerate(index.pair_key):
        base, _, entry = key.partition("#")
        sample = says["pairs.tar"].get(base)
        if sample is None or any(not member.is_file or member.slot == "broken" for member in sample.members):
            raise SilentError(f"the pair {key!r} is offered and is none")
        query = sample.parts("query") or sample.parts("json")
        _check_input(index, reader, int(index.query_N[pair]), query, sample.query(entry), after, origin, before)
        for rows, own, ids in (
            (index.positives_of(pair), [sample.parts("positive")], sample.ids("pos_id", "pos_ids")),
            (index.negatives_of(pair), sample.negatives, sample.ids("neg_ids")),
        ):
            missed += len(set(ids) - there)
            documents = [says["corpus.tar"][one].parts("positive") for one in ids if one in there]
            expected = [parts for parts in own if parts] + documents
            if len(rows) != len(expected):
                raise SilentError(f"{key!r} has {len(rows)} pages of {len(expected)}")
            for row, parts in zip(rows.tolist(), expected, strict=True):
                _check_input(index, reader, row, parts, None, after, origin, before)
    counted = [re.search(r"name (\d+) pages", fault.detail) for fault in index.faults if fault.kind == "missing_page"]
    if missed > sum(int(match[1]) for match in counted if match):
        raise SilentError(f"{missed} pages are missing and not counted")


def _document_key(index: Index, row: int) -> str:
    part = int(index.part_start_I1[row])
    name = index.part_name[part]
    return TarMember(name, True, 0, 0, b"").key_and_suffix[0]


def _check_input(
    index: Index,
    reader: InputReader,
    row: int,
    expected: list[bytes],
    text: str | None,
    after: Tars,
    origin: Origins,
    before: Tars,
) -> None:
    found = []
    in_place = True
    for part in index.parts(row):
        name = index.shard_name(int(index.part_shard_M[part]))
        start, size = int(index.part_offset_M[part]), int(index.part_size_M[part])
        found.append(after[name][start : start + size])
        places = origin[name][start : start + size]
        whole = len(places) == size and (size == 0 or (places[0] >= 0 and (np.diff(places) == 1).all()))
        in_place &= whole and (not size or before[name][places[0] : places[0] + size] in expected)
    if sorted(found) != sorted(expected):
        if in_place:
            return  # bytes that were overwritten where they stand
        raise SilentError(f"{index.input_id(row)} has other bytes than the tar said")
    try:
        value = reader[row]
    except UserError:
        return
    if text is not None:
        if value != text:
            raise SilentError(f"{index.input_id(row)} is read as {value!r} and says {text!r}")
    elif _as_value(value) != _values(tuple(sorted(expected))):
        raise SilentError(f"{index.input_id(row)} is read as something else")


def _as_value(value: Any) -> list[Any]:
    parts = value.values() if isinstance(value, dict) else [value]
    return sorted(str(part) if isinstance(part, str) else part.tobytes().hex() for part in parts)


@cache
def _values(parts: tuple[bytes, ...]) -> list[Any]:
    values = []
    for data in parts:
        try:
            values.append(Image.open(io.BytesIO(data)).convert("RGB").tobytes().hex())
        except Exception:
            values.append(data.decode("utf-8-sig", "replace").strip())
    return sorted(values)


def _check_missing(index: Index, after: Tars, origin: Origins, before: Tars, says: Samples) -> None:
    offered = {key.partition("#")[0] for key in index.pair_key}
    documents = {_document_key(index, row) for row in index.corpus_C.tolist()}
    for name, samples in says.items():
        of_archive = [fault for fault in index.faults if Path(fault.shard).name == name]
        if any(fault.kind in _OF_THE_FILE for fault in of_archive):
            continue
        breaks = [fault.offset for fault in of_archive if fault.kind in _OF_THE_ARCHIVE]
        used = _offsets_used(index, name)
        for key, sample in samples.items():
            if key in (documents if name == "corpus.tar" else offered):
                continue
            if name == "corpus.tar" and not sample.parts("positive"):
                continue  # nothing a corpus is asked for
            if any(repr(key)[1:-1] in fault.detail for fault in of_archive):
                continue
            ids = sample.ids("pos_id", "pos_ids") if name == "pairs.tar" else []
            if ids and not documents & set(ids) and any(fault.kind == "missing_page" for fault in index.faults):
                continue
            for member in sample.members:
                place = _place(origin[name], member.start)
                if any(not _between(used, place, one) for one in breaks):
                    break
            else:
                raise SilentError(f"{key!r} of {name} is neither offered nor in a report")


def _offsets_used(index: Index, name: str) -> np.ndarray:
    rows = [*index.query_N.tolist(), *index.positives.tolist(), *index.negatives.tolist(), *index.corpus_C.tolist()]
    parts = [part for row in set(rows) for part in index.parts(row)]
    return np.array([index.part_offset_M[part] for part in parts if index.shard_name(index.part_shard_M[part]) == name])


def _place(origin: np.ndarray, start: int) -> int:
    """Where byte ``start`` is now, or the bytes behind it are."""
    behind = np.flatnonzero(origin >= start)
    return int(behind[0]) if len(behind) else len(origin)


def _between(used: np.ndarray, one: int, other: int) -> bool:
    low, high = sorted((one, other))
    return bool(((used > low) & (used < high)).any())


def _check_under_index(folder: Path, before: Tars, victim: str, damaged: bytes, chance: random.Random) -> None:
    try:
        index = _index(folder, before)
    except UserError:
        return
    size = len(before[victim])
    rows = sorted({*index.query_N.tolist(), *index.positives.tolist(), *index.negatives.tolist()})
    expected = {row: _read(InputReader(index, STORE), row) for row in rows}
    for data in {damaged, damaged[:size] + chance.randbytes(max(0, size - len(damaged)))}:
        (folder / victim).write_bytes(data)
        reader = InputReader(index, STORE)
        for row in rows:
            value = _read(reader, row)
            if value is not None and value != expected[row]:
                raise SilentError(f"{index.input_id(row)} changed under its index")


def _read(reader: InputReader, row: int) -> list[Any] | None:
    try:
        return _as_value(reader[row])
    except UserError:
        return None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        first, last = (int(word) for word in sys.argv[1:3])
        result = fuzz(range(first, last), Path(name))
        sys.stderr.write("\n".join(result.failures[:20]) + "\n")
