"""Small shards for the tests of the data package: tiny images, and tars from a list of (name, bytes)."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from farnear.data.index import Index
from farnear.data.join import Source, join_scans
from farnear.data.scan import scan_shard
from farnear.data.scan_rows import ShardScan
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import ShardStore

Members = list[tuple[str, bytes]]


def image_bytes(number: int, format: str = "PNG", size: tuple[int, int] = (6, 4)) -> bytes:
    """A picture of one colour, another for each number; ``number_of_image`` reads a lossless one back."""
    image = Image.new("RGB", size, (number % 256, number // 256 % 256, 77))
    buffer = io.BytesIO()
    image.save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    return buffer.getvalue()


def number_of_image(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def pair_members(key: str, query: str, page: int, negatives: Iterable[int] = ()) -> Members:
    hard = [(f"{key}.neg{i}.png", image_bytes(number)) for i, number in enumerate(negatives)]
    return [(f"{key}.json", json.dumps({"query": query}).encode()), (f"{key}.png", image_bytes(page)), *hard]


def write_tar(path: Path, members: Members, tar_format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(shards: Iterable[Path]) -> dict[str, bytes]:
    """The members of some tars by name, read by tarfile."""
    members: dict[str, bytes] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    return members


def write_pairs(
    folder: Path, pairs: int, shards: int, *, negatives_of_pair: int = 0, copies_of_page: int = 1
) -> list[Path]:
    """``pairs`` pairs in ``shards`` tars: pair i has the query "query i" and the page i // copies_of_page.

    It has i % (negatives_of_pair + 1) hard negatives; negative j of pair i is page 10000 + 10 i + j.
    """
    folder.mkdir(parents=True, exist_ok=True)
    members: list[Members] = [[] for _ in range(shards)]
    for pair in range(pairs):
        negatives = [10_000 + pair * 10 + number for number in range(pair % (negatives_of_pair + 1))]
        members[pair * shards // pairs] += pair_members(
            f"k{pair:05d}", f"query {pair}", pair // copies_of_page, negatives
        )
    return [write_tar(folder / f"part-{shard:03d}.tar", members[shard]) for shard in range(shards)]


STORE = ShardStore(ShardCache(Path("unused")))
"""Reads local shards, which need no cache."""


def index_of(*sources: Iterable[Path], corpus: Iterable[Path] = (), **keys: Any) -> Index:
    """The index of some sources' shards, in memory."""
    joined = [Source(f"s{number}", tuple(map(scanned, shards))) for number, shards in enumerate(sources)]
    return join_scans(joined, [scanned(shard, corpus=True) for shard in corpus], **keys)


def scanned(shard: Path, corpus: bool = False) -> ShardScan:
    with open(shard, "rb") as file:
        return scan_shard(file, str(shard), corpus)
