"""Scan one shard: which samples it holds, where their bytes lie, and what they hash to.

The shard is read once from front to back (``tarwalk`` finds the members, ``sample`` says what they mean). Queries are
parsed because a missing one must be known now and not in the middle of a night; every part is hashed, so that the plan
can keep copies of one page out of a batch and the reader can tell that bytes have changed; of images the header is
read, for their size decides what they cost. Nothing is decoded.

A sample that is not whole is left out and stands among the faults. So is one beside a damaged place: a member of it may
be what was lost, and a pair that silently misses a hard negative is worse than one pair less. Members that are no parts
of a sample are counted, so that a wrong file name is seen and not just missed.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from farnear.data.faults import Fault
from farnear.data.media import TooManyPixelsError, image_size
from farnear.data.remote import shown
from farnear.data.sample import (
    IMAGE,
    JSON_MESSAGES,
    JSON_TEXT,
    MESSAGES,
    TEXT,
    Query,
    check_messages,
    check_text,
    hash_bytes,
    hash_parts,
    hash_query,
    ids_of,
    media_of,
    parse_json,
    part_of,
    queries_of,
    split_name,
)
from farnear.data.scan_rows import Part, Rows, ShardScan, digest_of
from farnear.data.tarwalk import Break, Member, NotATarError, Refused, walk_members

EXAMPLES_OF_IGNORED = 5


@dataclass
class _Sample:
    """A sample while its members pass by; ``fault`` (kind, detail) is the first thing that was wrong with it."""

    name: str  # of the sample in the tar
    key: str  # the same, but for hard negatives of a shard of pairs that is used as a corpus
    offset: int
    members: int = 1
    asked: int = 0  # queries, usable or not
    asked_before: int = 0  # in the places where its key began before: none, if all is well
    parts: dict[str, list[Part]] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)  # of media, in a slot's messages
    json_part: Part | None = None
    json_queries: list[Query] = field(default_factory=list)
    several: bool = False
    part_queries: list[Query] = field(default_factory=list)
    positive_ids: list[str] = field(default_factory=list)
    negative_ids: list[str] = field(default_factory=list)
    fault: tuple[str, str] | None = None

    @property
    def queries(self) -> list[Query]:
        return self.json_queries + self.part_queries

    @property
    def has_query(self) -> bool:
        return bool(self.queries or self.parts.get("query"))

    @property
    def has_positive(self) -> bool:
        return bool(self.parts.get("positive") or self.positive_ids)

    def fail(self, kind: str, detail: str) -> None:
        self.fault = self.fault or (kind, detail)


def scan_shard(file: BinaryIO, shard: str, corpus: bool) -> ShardScan:
    """Scan a shard of pairs, or a ``corpus`` shard of documents only. ``file`` must have a descriptor (``fileno``)."""
    scanner = _Scanner(file, shard, corpus)
    try:
        scanner.read_members()
    except NotATarError as error:
        scanner.faults.append(Fault(shard, 0, error.kind, f"{shown(shard)} {error}", 0))
    return scanner.finish()


class _Scanner:
    def __init__(self, file: BinaryIO, shard: str, corpus: bool) -> None:
        self.file = file
        self.shard = shard
        self.corpus = corpus
        self.samples: dict[str, _Sample] = {}
        self.current: list[_Sample] = []  # those whose members are passing by; several in a corpus shard only
        self.is_suspect = False  # whether those may have lost members to a damaged place before them
        self.suspects = 0  # how many samples to come may have
        self.faults: list[Fault] = []
        self.ignored: list[str] = []
        self.ignored_count = 0

    def read_members(self) -> None:
        members = walk_members(self.file)
        for found in members:
            if isinstance(found, Break) or (isinstance(found, Refused) and found.kind == "bad_name"):
                for sample in self.current:
                    sample.fail("next_to_damage", f"{sample.key!r} stands beside a damaged place")
                # What comes next may be a member of the sample behind it, under half its name: a long name may be what
                # was lost. But of one member only.
                self.current, self.suspects = [], 2
                behind_end = found.kind == "bytes_after_end"
                lost = _count_pairs(members) if behind_end else 0  # which takes all members that are left
                lost = 0 if self.corpus else lost
                self.faults.append(Fault(self.shard, found.offset, found.kind, found.detail, lost))
            else:
                self._add(found)

    def _add(self, found: Member | Refused) -> None:
        name, suffix = split_name(found.name)
        try:
            part = part_of(suffix) if name else None
        except ValueError as error:
            if not self.corpus:
                return self._sample(name, name, found.offset).fail("incomplete", f"{name!r} has {error}")
            part = None
        is_json = bool(name) and suffix.lower() == "json" and not self.corpus
        if (part is None or (self.corpus and part[0] == "query")) and not is_json:
            self.ignored_count += 1
            if len(self.ignored) < EXAMPLES_OF_IGNORED:
                self.ignored.append(found.name)
            return None
        key = name
        if self.corpus and part is not None and part[0] != "positive":
            key, part = f"{name}.{part[0]}", ("positive", part[1])
        sample = self._sample(name, key, found.offset)
        if isinstance(found, Refused):
            sample.fail(found.kind, found.detail)
        elif part is not None:
            self._add_part(sample, found, *part)
        else:
            self._add_json(sample, found)
        return None

    def _sample(self, name: str, key: str, offset: int) -> _Sample:
        """The sample ``key`` that a member of the sample ``name`` belongs to."""
        for sample in self.current:
            if sample.key == key:
                sample.members += 1
                return sample
        known = self.samples.get(key)
        sample = known or _Sample(name, key, offset)
        if known is not None:
            known.asked_before, known.asked = known.asked_before + known.asked, 0
            detail = f"the key {key!r} is used at byte {known.offset} and again at byte {offset}"
            sample.fail("split_sample", f"{detail}; keep the members of a sample together, under a key of their own")
        if not self.current or self.current[0].name != name:
            if self.suspects == 1 and sum(one.members for one in self.current) > 1:
                self.suspects = 0
            self.current, self.is_suspect = [], self.suspects > 0
            self.suspects = max(0, self.suspects - 1)
        if self.is_suspect:
            sample.fail("next_to_damage", f"{key!r} stands beside a damaged place")
        self.samples[key] = sample
        self.current.append(sample)
        return sample

    def _add_json(self, sample: _Sample, member: Member) -> None:
        data = self.file.read(member.size)
        try:
            record = parse_json(data)
            sample.asked = max(sample.asked, _queries_in(record))
            if sample.json_part is not None:
                return sample.fail("incomplete", f"{sample.key!r} has two members {member.name!r}")
            sample.positive_ids = ids_of(record, "pos_id", "pos_ids")
            sample.negative_ids = ids_of(record, "neg_ids")
        except ValueError as error:
            return sample.fail("bad_json", f"{member.name!r}: {_one_line(error)}")
        try:
            sample.json_queries, sample.several = queries_of(record)
        except ValueError as error:
            return sample.fail("bad_query", f"{member.name!r}: {_one_line(error)}")
        is_messages = any(not isinstance(query, str) for query in sample.json_queries)
        for query in sample.json_queries:
            if not isinstance(query, str):
                sample.places["query"] = media_of(query)
        sample.json_part = Part(JSON_MESSAGES if is_messages else JSON_TEXT, member, hash_bytes(data))
        return None

    def _add_part(self, sample: _Sample, member: Member, slot: str, kind: int) -> None:
        data = self.file.read(member.size)
        if slot == "query":
            sample.asked = max(sample.asked, 1)
        parts = sample.parts.setdefault(slot, [])
        if any(part.kind == kind for part in parts):
            return sample.fail("incomplete", f"{sample.key!r} has two parts like {member.name!r}, and one must do")
        width = height = 0
        fault = "bad_image" if kind == IMAGE else "bad_query" if slot == "query" else "incomplete"
        try:
            if kind == IMAGE:
                width, height = image_size(data)
            elif kind == TEXT:
                text = check_text(data.decode("utf-8-sig"))
                if slot == "query":
                    sample.part_queries.append(text)
            elif kind == MESSAGES:
                messages = check_messages(json.loads(data))
                sample.places[slot] = media_of(messages)
                if slot == "query":
                    sample.part_queries.append(messages)
            elif not data:
                raise ValueError("it is empty")
        except (ValueError, RecursionError) as error:
            fault = "too_many_pixels" if isinstance(error, TooManyPixelsError) else fault
            return sample.fail(fault, f"{member.name!r}: {_one_line(error)}")
        parts.append(Part(kind, member, hash_bytes(data), width, height))
        return None

    def finish(self) -> ShardScan:
        rows = Rows()
        for sample in self.samples.values():
            if sample.fault is None:
                _require_whole(sample, self.corpus)
            if sample.fault is not None:
                lost = 0 if self.corpus else max(1, sample.asked_before + sample.asked)
                self.faults.append(Fault(self.shard, sample.offset, *sample.fault, lost))
            elif self.corpus:
                rows.add_document(sample.key, sample.parts["positive"])
            else:
                _add_pairs(sample, rows)
        columns = rows.columns()
        return ShardScan(
            shard=self.shard,
            corpus=self.corpus,
            size=os.fstat(self.file.fileno()).st_size,
            columns=columns,
            faults=tuple(sorted(self.faults, key=lambda fault: fault.offset)),
            ignored_members=self.ignored_count,
            ignored_examples=tuple(self.ignored),
            digest=digest_of(columns),
        )


def _count_pairs(members: Iterable[Member | Refused | Break]) -> int:
    """How many samples with a query there are among ``members``, by their names alone."""
    keys = set()
    for member in members:
        if not isinstance(member, Break):
            key, suffix = split_name(member.name)
            if key and (suffix.lower() == "json" or suffix.lower().startswith("query.")):
                keys.add(key)
    return len(keys)


def _require_whole(sample: _Sample, corpus: bool) -> None:
    together = "and keep the members of a sample together in the tar"
    for slot, places in sample.places.items():
        media = [part.modality for part in sample.parts.get(slot, []) if part.kind not in (TEXT, MESSAGES)]
        texts = [part for part in sample.parts.get(slot, []) if part.kind == TEXT]
        if sorted(places) != sorted(media) or texts:
            wanted = ", ".join(places) or "nothing"
            detail = f"the messages of {sample.key!r} have places for {wanted}, and beside them there is"
            there = ", ".join(media + ["text"] * len(texts)) or "nothing"
            return sample.fail("incomplete", f"{detail} {there}; give each medium one place")
    if corpus:
        return None
    if bool(sample.json_queries) + len(sample.part_queries) > 1:
        sample.fail("incomplete", f"{sample.key!r} has its query twice (KEY.json, KEY.query.txt); keep one of them")
    elif not sample.has_query:
        where = "no 'query' in its KEY.json" if sample.json_part else "no KEY.json and no KEY.query.txt"
        sample.fail("incomplete", f"{sample.key!r} has no query ({where}); add one or drop it, {together}")
    elif not sample.has_positive:
        wanted = "KEY.png, .jpg, .jpeg, .webp or another part, or pos_id in its KEY.json"
        sample.fail("incomplete", f"{sample.key!r} has no positive page ({wanted}); add one or drop it, {together}")
    return None


def _add_pairs(sample: _Sample, rows: Rows) -> None:
    positives = [rows.add_input(sample.parts["positive"])] if "positive" in sample.parts else []
    slots = sorted((slot for slot in sample.parts if slot.startswith("neg")), key=lambda slot: int(slot[3:]))
    negatives = [rows.add_input(sample.parts[slot]) for slot in slots]
    own_parts = sample.parts.get("query", [])
    media = [part.hash for part in own_parts if part.kind not in (TEXT, MESSAGES)]
    for entry, query in enumerate(sample.queries or [None]):
        parts = [*own_parts, sample.json_part] if sample.json_part and sample.json_queries else own_parts
        rows.add_pair(
            f"{sample.key}#{entry}" if sample.several else sample.key,
            rows.add_input(parts, entry if sample.several else -1),
            hash_parts(media if query is None else [hash_query(query), *media]),
            (positives, sample.positive_ids),
            (negatives, sample.negative_ids),
        )


def _queries_in(record: dict[str, Any]) -> int:
    """How many queries a KEY.json holds, be they usable or not."""
    if "query" not in record:
        return 0
    query = record["query"]
    if not isinstance(query, list) or all(isinstance(one, dict) for one in query):
        return 1
    return len(query)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
