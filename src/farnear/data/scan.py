"""Scan one shard: which samples it holds, where their bytes lie, and what they hash to.

A shard follows the WebDataset convention: the members of one sample stand together and share a key, the path up to the
first dot of the file's name. A sample of a pair shard is

    KEY.json with a string under "query", or KEY.query.txt        the query
    KEY.png, .jpg, .jpeg or .webp                                 the positive page
    KEY.neg0.png, KEY.neg1.jpg, ...                               hard negative pages, in the order of their numbers

A page shard (distractors of an evaluation) holds images only, and each image is a page. Members that are none of these
are counted, so that a wrong file name is seen and not just missed.

The shard is read once from front to back: queries are parsed because a missing one must be known now and not in the
middle of a night, pages are hashed so that the plan can keep copies of one page out of a batch. Images are not decoded.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import BinaryIO

from farnear.data.tarwalk import Member, walk_members
from farnear.errors import UserError

_READ_BUFFER_BYTES = 1 << 20
EXAMPLES_OF_IGNORED = 5
_IMAGE = re.compile(r"(?:neg(?P<number>\d+)\.)?(?:png|jpg|jpeg|webp)", re.IGNORECASE)


@dataclass
class ShardScan:
    """What one shard holds, as columns: page_ has a row a page, negatives a row a hard negative, the rest a row a pair.

    ``positive`` and ``negatives`` are page rows that count from 0 within the shard. Hashes are signed 64-bit.
    """

    shard: str
    size: int
    page_offset: list[int] = field(default_factory=list)
    page_size: list[int] = field(default_factory=list)
    page_hash: list[int] = field(default_factory=list)
    page_name: list[str] = field(default_factory=list)
    pair_key: list[str] = field(default_factory=list)
    query_offset: list[int] = field(default_factory=list)
    query_size: list[int] = field(default_factory=list)
    query_is_json: list[bool] = field(default_factory=list)
    query_hash: list[int] = field(default_factory=list)
    positive: list[int] = field(default_factory=list)
    negatives_of_pair: list[int] = field(default_factory=list)
    negatives: list[int] = field(default_factory=list)
    ignored_members: int = 0
    ignored_examples: list[str] = field(default_factory=list)


def scan_shard(shard: str, pairs: bool) -> ShardScan:
    """Scan a pair shard (``pairs``) or a page shard. Raises ``UserError`` naming the shard and the offset or key."""
    try:
        with open(shard, "rb", buffering=_READ_BUFFER_BYTES) as file:
            scan = ShardScan(shard, os.fstat(file.fileno()).st_size)
            members = walk_members(file, shard)
            if pairs:
                _scan_pairs(file, members, scan)
            else:
                _scan_pages(file, members, scan)
    except OSError as error:
        raise UserError(
            f"shard {shard} cannot be read ({error.strerror or error}); check its path and permissions"
        ) from None
    if not scan.page_offset:
        wanted = "KEY.json or KEY.query.txt with KEY.png, .jpg, .jpeg or .webp" if pairs else ".png, .jpg or .webp"
        raise UserError(f"shard {shard} holds no {'pair' if pairs else 'page'}; its members must be named {wanted}")
    return scan


def parse_query(data: bytes, is_json: bool) -> str | None:
    """The query in a ``KEY.json`` or ``KEY.query.txt``, stripped; None if the JSON object has no ``query``.

    Raises ``ValueError`` with the reason when there is no usable query in it.
    """
    query: object
    if is_json:
        record = json.loads(data)
        if not isinstance(record, dict):
            raise ValueError("the JSON is not an object")
        if "query" not in record:
            return None
        query = record["query"]
    else:
        query = data.decode("utf-8-sig")
    if not isinstance(query, str):
        raise ValueError(f"'query' is {json.dumps(query)[:40]} and not a string")
    if not query.strip():
        raise ValueError("the query is empty")
    query.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer accepts
    return query.strip()


def hash_bytes(data: bytes) -> int:
    """BLAKE2b of 8 bytes as a signed integer, so that it fits an int64 column."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def hash_query(query: str) -> int:
    """The hash by which two queries count as the same: white space and case do not matter."""
    return hash_bytes(" ".join(query.split()).casefold().encode("utf-8"))


def _scan_pages(file: BinaryIO, members: Iterable[Member], scan: ShardScan) -> None:
    for member in members:
        key, suffix = _split_name(member.name)
        if key and _IMAGE.fullmatch(suffix.rpartition(".")[2]):
            _add_page(file, member, scan)
        else:
            _ignore(member, scan)


def _scan_pairs(file: BinaryIO, members: Iterable[Member], scan: ShardScan) -> None:
    offset_of_key: dict[str, int] = {}
    for key, group in groupby(members, key=lambda member: _split_name(member.name)[0]):
        sample = _Sample(key)
        for member in group:
            _add_member(file, member, sample, scan)
        if sample.first_offset is None:
            continue
        if key in offset_of_key:
            raise UserError(
                f"shard {scan.shard}: the key {key!r} is used at byte {offset_of_key[key]} and again at byte "
                f"{sample.first_offset}, so its pairs cannot be told apart; give each sample one key and keep its "
                f"members together"
            )
        offset_of_key[key] = sample.first_offset
        _close_sample(sample, scan)


@dataclass
class _Sample:
    """A sample while its members pass by. ``first_offset`` is set by the first member that belongs to a pair."""

    key: str
    first_offset: int | None = None
    query: str | None = None
    query_member: Member | None = None
    query_is_json: bool = False
    json_without_query: bool = False
    positive: int | None = None
    negatives: dict[int, int] = field(default_factory=dict)


def _add_member(file: BinaryIO, member: Member, sample: _Sample, scan: ShardScan) -> None:
    _, suffix = _split_name(member.name)
    image = _IMAGE.fullmatch(suffix)
    if not sample.key:
        _ignore(member, scan)
        return
    if suffix.lower() in ("json", "query.txt"):
        _add_query(file, member, sample, scan)
    elif image and image["number"] is None:
        if sample.positive is not None:
            raise _fault(scan, sample.key, "has two positive pages, so it is not clear which to train on; keep one")
        sample.positive = _add_page(file, member, scan)
    elif image:
        number = int(image["number"])
        if number in sample.negatives:
            raise _fault(scan, sample.key, f"has two hard negatives numbered {number}; number them apart")
        sample.negatives[number] = _add_page(file, member, scan)
    else:
        _ignore(member, scan)
        return
    if sample.first_offset is None:
        sample.first_offset = member.offset


def _add_query(file: BinaryIO, member: Member, sample: _Sample, scan: ShardScan) -> None:
    is_json = member.name.lower().endswith(".json")
    try:
        query = parse_query(file.read(member.size), is_json)
    except (ValueError, RecursionError) as error:
        reason = f"has no usable query in {member.name!r} ({' '.join(str(error).split())})"
        raise _fault(scan, sample.key, f"{reason}, so it cannot be trained on; give it a text or drop it") from None
    if query is None:
        sample.json_without_query = True
        return
    if sample.query is not None:
        raise _fault(scan, sample.key, "has its query twice (KEY.json, KEY.query.txt); keep one of them")
    sample.query, sample.query_member, sample.query_is_json = query, member, is_json


def _add_page(file: BinaryIO, member: Member, scan: ShardScan) -> int:
    """Append a page and return its row within the shard."""
    if member.size == 0:
        raise UserError(
            f"shard {scan.shard}: the page {member.name!r} at byte {member.offset} is empty, so there is nothing to "
            f"train on; write its sample again or drop it"
        )
    scan.page_offset.append(member.offset)
    scan.page_size.append(member.size)
    scan.page_hash.append(hash_bytes(file.read(member.size)))
    scan.page_name.append(member.name)
    return len(scan.page_name) - 1


def _close_sample(sample: _Sample, scan: ShardScan) -> None:
    together = "and keep the members of a sample together in the tar"
    if sample.query is None or sample.query_member is None:
        where = "no 'query' in its KEY.json" if sample.json_without_query else "no KEY.json and no KEY.query.txt"
        raise _fault(scan, sample.key, f"has no query ({where}), so it is not a pair; add one or drop it, {together}")
    if sample.positive is None:
        wanted = "KEY.png, .jpg, .jpeg or .webp"
        raise _fault(
            scan, sample.key, f"has no positive page ({wanted}), so it is not a pair; add one or drop it, {together}"
        )
    scan.pair_key.append(sample.key)
    scan.query_offset.append(sample.query_member.offset)
    scan.query_size.append(sample.query_member.size)
    scan.query_is_json.append(sample.query_is_json)
    scan.query_hash.append(hash_query(sample.query))
    scan.positive.append(sample.positive)
    scan.negatives_of_pair.append(len(sample.negatives))
    scan.negatives.extend(sample.negatives[number] for number in sorted(sample.negatives))


def _split_name(name: str) -> tuple[str, str]:
    """``"a/b.neg0.png"`` -> ``("a/b", "neg0.png")``; the key is empty where a file's name has nothing before a dot."""
    folder, slash, basename = name.rpartition("/")
    stem, dot, suffix = basename.partition(".")
    return (folder + slash + stem, suffix) if stem and dot else ("", suffix)


def _ignore(member: Member, scan: ShardScan) -> None:
    scan.ignored_members += 1
    if len(scan.ignored_examples) < EXAMPLES_OF_IGNORED:
        scan.ignored_examples.append(member.name)


def _fault(scan: ShardScan, key: str, what: str) -> UserError:
    return UserError(f"shard {scan.shard}: the sample {key!r} {what}")
