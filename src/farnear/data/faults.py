"""What is wrong with shards: one row a place, with the pairs that it costs.

A fault never disappears: the scan lists it, the index carries it, ``farnear shards verify`` prints the table, and a run
counts the lost pairs against ``data.max_bad_fraction`` before its first step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from farnear.data.remote import short_name
from farnear.wording import printable

KINDS = {
    "empty": "an empty file",
    "compressed": "a compressed archive, whose members have no place to be read from",
    "not_a_tar": "no tar file",
    "cut_short": "the file ends too early; what stood behind is not known",
    "damaged_header": "a tar header that cannot be read",
    "bytes_after_end": "bytes behind the end of the archive",
    "sparse": "a sparse file",
    "not_a_file": "a link or a device",
    "bad_name": "a name that is not UTF-8",
    "next_to_damage": "a sample beside a damaged place, which may miss members",
    "split_sample": "a key that is used twice, or whose members do not stand together",
    "incomplete": "a sample without its query, its page or one of its parts",
    "bad_json": "JSON that is no sample",
    "bad_query": "a query that cannot be used",
    "bad_image": "an image whose header cannot be read",
    "too_many_pixels": "an image above data.max_image_pixels",
    "missing_page": "a page that is named but stands in no corpus shard",
    "unknown_key": "an exclusion that names no pair",
    "changed": "bytes that are not those that were indexed",
    "undecodable": "an image that cannot be decoded",
}
"""Every kind of fault, explained."""

WHOLE_SHARD = frozenset({"empty", "compressed", "not_a_tar"})
_LOST_UNKNOWN = WHOLE_SHARD | {"cut_short", "damaged_header", "bad_name"}


@dataclass(frozen=True)
class Fault:
    """Something wrong at byte ``offset`` of ``shard``; ``pairs_lost`` pairs at least cannot be used because of it."""

    shard: str
    offset: int
    kind: str
    detail: str
    pairs_lost: int


def fault_table(faults: Sequence[Fault]) -> str:
    """The faults as lines of text: shard, offset, kind, pairs lost, detail."""
    names = [short_name(fault.shard) for fault in faults]
    shard_width = max([len("shard"), *map(len, names)])
    kind_width = max([len("kind"), *(len(fault.kind) for fault in faults)])
    lines = [f"{'shard':<{shard_width}}  {'offset':>12}  {'kind':<{kind_width}}  {'pairs lost':>10}  detail"]
    for name, fault in zip(names, faults, strict=True):
        lost = "unknown" if fault.kind in _LOST_UNKNOWN else fault.pairs_lost
        lines.append(
            f"{name:<{shard_width}}  {fault.offset:>12}  {fault.kind:<{kind_width}}  {lost:>10}  {fault.detail}"
        )
    return "\n".join(map(printable, lines))


def pairs_lost(faults: Iterable[Fault]) -> int:
    """Pairs lost by all faults together, at least."""
    return sum(fault.pairs_lost for fault in faults)
