"""Walk the members of one tar, and accept nothing that is not whole.

The index needs the byte offset of every member, and it needs to know that the whole archive was seen. ``tarfile``'s own
iteration gives the first and not the second: after a damaged header it stops as if the archive ended there, and the
pairs behind it are lost without a word. So this module walks the headers itself (``tarfile.TarInfo.frombuf`` still
checks and parses each 512-byte block) and turns everything that would lose bytes into an error:

- a header whose checksum is wrong, a member that ends behind the end of the file;
- a missing end-of-archive block, which is how a broken upload or a full disk looks;
- bytes after the end of the archive, which is how ``cat a.tar b.tar`` looks;
- members whose bytes are not there in one piece (sparse files, links) and compressed archives, which have no offsets.

Long names are read in both dialects: GNU (a member of type L before the real one) and POSIX/PAX (a member of type x
with ``path`` and ``size`` records).
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from farnear.errors import UserError

_MAGIC_OF_COMPRESSION = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18",
}
_REFUSED_TYPES = {
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
}
_WRITE_AGAIN = "write the shard again or take it out of the list"


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: ``size`` bytes at byte ``offset`` of the archive."""

    name: str
    offset: int
    size: int


def walk_members(file: BinaryIO, shard: str) -> Iterator[Member]:
    """Yield the regular files of the tar ``file`` in stored order; directories are skipped.

    The walker moves the file's position before each header, so the caller may read a member's bytes between two
    ``next`` calls. ``shard`` is the name used in messages. Raises ``UserError`` for anything that is not a whole,
    uncompressed tar; the end of the archive is checked only when the iterator is exhausted.
    """
    shard_size = os.fstat(file.fileno()).st_size
    _refuse_compressed(file, shard)
    position = 0
    gnu_name: str | None = None
    pax: dict[str, str] = {}
    while (header := _read_header(file, shard, position)) is not None:
        offset = position + tarfile.BLOCKSIZE
        size = 0 if header.isdir() else _pax_size(pax, header.size, shard, position)
        if size < 0 or offset + size > shard_size:
            raise UserError(
                f"shard {shard}: the member {header.name!r} at byte {position} needs {size} bytes but the file ends at "
                f"byte {shard_size}, so the shard was cut short; copy it or write it again"
            )
        if header.type == tarfile.GNUTYPE_LONGNAME:
            gnu_name = file.read(size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            pax = _pax_records(file.read(size), shard, position)
        elif header.type == tarfile.XGLTYPE:
            _refuse_global_overrides(_pax_records(file.read(size), shard, position), shard, position)
        elif header.type != tarfile.GNUTYPE_LONGLINK:
            name = pax.get("path") or gnu_name or header.name
            _refuse_unreadable(header, pax, name, shard, position)
            if not header.isdir():
                yield Member(name, offset, size)
            gnu_name, pax = None, {}
        position = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if gnu_name is not None or pax:
        raise UserError(
            f"shard {shard}: the archive ends at byte {position} after a name without its member; {_WRITE_AGAIN}"
        )
    _require_zeros(file, shard, position)


def _read_header(file: BinaryIO, shard: str, position: int) -> tarfile.TarInfo | None:
    """The header at ``position``, or None where the end-of-archive block stands."""
    file.seek(position)
    block = file.read(tarfile.BLOCKSIZE)
    if position == 0 and not block:
        raise UserError(f"shard {shard} is an empty file, so it holds no pairs; {_WRITE_AGAIN}")
    if len(block) < tarfile.BLOCKSIZE and position > 0:
        raise UserError(
            f"shard {shard}: no end-of-archive block at byte {position}, so the shard was cut short and members may be "
            f"missing; copy it or write it again"
        )
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed leaves tarfile's header errors out
        return None
    except tarfile.HeaderError as error:
        if position == 0:
            raise UserError(f"shard {shard} is not a tar file ({error} at byte 0); {_WRITE_AGAIN}") from None
        raise UserError(
            f"shard {shard}: damaged tar header at byte {position} ({error}), so the members behind it cannot be read; "
            f"{_WRITE_AGAIN}"
        ) from None


def _refuse_compressed(file: BinaryIO, shard: str) -> None:
    head = file.read(8)
    for compression, magic in _MAGIC_OF_COMPRESSION.items():
        if head.startswith(magic):
            raise UserError(
                f"shard {shard} is compressed with {compression}, so its members have no place to be read from; "
                f"decompress it to a plain .tar"
            )


def _pax_records(data: bytes, shard: str, position: int) -> dict[str, str]:
    """The records ``"<length> <keyword>=<value>\\n"`` of a PAX header (POSIX.1-2008, pax, "Extended Header")."""
    records = {}
    start = 0
    while start < len(data):
        try:
            length_digits, _, _ = data[start:].partition(b" ")
            length = int(length_digits)
            keyword, equals, value = data[start + len(length_digits) + 1 : start + length].partition(b"=")
            if length <= 0 or not equals or not value.endswith(b"\n"):
                raise ValueError
        except ValueError:
            raise UserError(f"shard {shard}: damaged PAX header at byte {position}; {_WRITE_AGAIN}") from None
        records[keyword.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        start += length
    return records


def _pax_size(pax: dict[str, str], header_size: int, shard: str, position: int) -> int:
    try:
        return int(pax.get("size", header_size))
    except ValueError:
        raise UserError(f"shard {shard}: damaged PAX size before byte {position}; {_WRITE_AGAIN}") from None


def _refuse_global_overrides(records: dict[str, str], shard: str, position: int) -> None:
    overrides = sorted({"path", "size"} & records.keys())
    if overrides:
        raise UserError(
            f"shard {shard}: the global PAX header at byte {position} sets {overrides[0]!r} for every member, which "
            f"cannot be told apart; {_WRITE_AGAIN}"
        )


def _refuse_unreadable(header: tarfile.TarInfo, pax: dict[str, str], name: str, shard: str, position: int) -> None:
    kind = _REFUSED_TYPES.get(header.type)
    if any(keyword.startswith("GNU.sparse.") for keyword in pax):
        kind = _REFUSED_TYPES[tarfile.GNUTYPE_SPARSE]
    elif kind is None and not header.isreg() and not header.isdir():
        kind = f"of the unknown type {header.type!r}"
    if kind is not None:
        raise UserError(
            f"shard {shard}: the member {name!r} at byte {position} is {kind}, so its bytes are not in one place; "
            f"write the shard with plain files (tar --dereference --hard-dereference, without --sparse)"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"shard {shard}: the name of the member at byte {position} ({name!r}) is not UTF-8, so it cannot be shown "
            f"or stored; write the shard again with UTF-8 names"
        ) from None


def _require_zeros(file: BinaryIO, shard: str, position: int) -> None:
    file.seek(position)
    while chunk := file.read(1 << 20):
        if any(chunk):
            raise UserError(
                f"shard {shard}: the archive ends at byte {position} but more bytes follow, so members would be lost "
                f"(two tars joined, or a damaged header); write the samples into one archive or name the tars apart"
            )
