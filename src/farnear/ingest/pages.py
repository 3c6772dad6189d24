"""Finds the pages of corpus shards: where each one's bytes lie, and what is known about it.

Importers read corpora that they or others have written: to ask a model for queries, and to see which pages are stored
already. Only headers and what stands beside the pages are read; a page's bytes are fetched when they are wanted.

Python's `tarfile` takes the first header that it cannot read for the end of the archive, without a word. So the end is
looked at here: anything but the zeros that end a tar is a damaged shard, and its pages would have been lost.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from farnear.errors import UserError
from farnear.ingest.images import IMAGE_EXTENSIONS
from farnear.ingest.shards import ABOUT


@dataclass(frozen=True)
class StoredPage:
    """A page in a shard.

    Attributes:
        name: `SHARD.tar/KEY`, by which requests and answers name it.
        document, text: what the page is part of and the text on it, if `KEY.about.json` says so.
    """

    name: str
    shard: Path
    key: str
    extension: str
    offset: int
    size: int
    document: str | None = None
    text: str | None = None

    def read(self) -> bytes:
        """The bytes of its image file."""
        with self.shard.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def list_pages(shards: Sequence[Path]) -> list[StoredPage]:
    """The pages of corpus shards, in the order in which they are stored.

    Raises:
        UserError: a shard is missing, no tar, damaged, or without pages; or two pages have one name.
    """
    page_of_name: dict[str, StoredPage] = {}
    for shard in shards:
        pages = _pages_in(shard)
        if not pages:
            raise UserError(f"{shard} holds no page, a member that ends in {', '.join(IMAGE_EXTENSIONS)}; leave it out")
        for page in pages:
            if page.name in page_of_name:
                other = page_of_name[page.name].shard
                raise UserError(
                    f"the page {page.name} is in {other} and in {shard}, so its answers could not be told apart; "
                    "give each shard a name of its own and each page a key of its own"
                )
            page_of_name[page.name] = page
    return list(page_of_name.values())


def _pages_in(shard: Path) -> list[StoredPage]:
    pages: list[StoredPage] = []
    about_of_key: dict[str, dict[str, object]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = folder + slash + stem
                if not member.isfile() or not stem:
                    continue
                if extension == ABOUT:
                    about_of_key[key] = _about(shard, member, tar)
                elif extension.lower() in IMAGE_EXTENSIONS:
                    place = (member.offset_data, member.size)
                    pages.append(StoredPage(f"{shard.name}/{key}", shard, key, extension.lower(), *place))
            _refuse_damaged_end(shard, tar)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard} is no tar that can be read ({error}); write it again") from error
    except FileNotFoundError:
        raise UserError(f"{shard} does not exist, so there are no pages in it; check the path") from None
    return [_with_about(page, about_of_key.get(page.key, {})) for page in pages]


def _with_about(page: StoredPage, about: dict[str, object]) -> StoredPage:
    document, text = about.get("document"), about.get("text")
    return replace(
        page,
        document=document if isinstance(document, str) else None,
        text=text if isinstance(text, str) else None,
    )


def _about(shard: Path, member: tarfile.TarInfo, tar: tarfile.TarFile) -> dict[str, object]:
    stream = tar.extractfile(member)
    try:
        about = json.loads(stream.read() if stream else b"")
        if isinstance(about, dict):
            return about
        reason = "it is no object"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{shard}: {member.name} is not what is known about a page ({reason}); write the shard again")


def _refuse_damaged_end(shard: Path, tar: tarfile.TarFile) -> None:
    end = os.path.getsize(shard)
    with shard.open("rb") as stream:
        stream.seek(tar.offset)
        block = stream.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{shard} is damaged at byte {min(tar.offset, end)}, so pages behind it would be lost; write it again"
        )
