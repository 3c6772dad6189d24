"""Walk the members of one tar, and say where it is not whole.

The index needs the byte offset of every member, and it needs to know that the whole archive was seen. ``tarfile``'s own
iteration gives the first and not the second: after a damaged header it stops as if the archive ended there, and the
pairs behind it are lost without a word. So this module walks the headers itself (``tarfile.TarInfo.frombuf`` still
checks and parses each 512-byte block) and yields, between the members, a ``Break`` wherever bytes were lost:

- a header whose checksum is wrong, a member that ends behind the end of the file;
- a missing end-of-archive block, which is how a broken upload or a full disk looks;
- bytes after the end of the archive, which is how ``cat a.tar b.tar`` looks, or a header that was overwritten by zeros.

Behind a damaged header the walk goes on at the next block that is a header again: its checksum and its magic are right,
which payloads do not show by chance. What a break lies between may be incomplete, which is for the caller to heed.
Members whose bytes are not there in one piece (sparse files, links) are yielded as ``Refused``.

Long names are read in both dialects: GNU (a member of type L before the real one) and POSIX/PAX (a member of type x
with ``path`` and ``size`` records). These stand outside of any checksum, so a PAX size is believed only where it agrees
with the header's own or the header has no room for it.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

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
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_NOT_A_MEMBER = (*_PAX_TYPES, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 20
_LARGEST_NAME_BYTES = 1 << 20
_LARGEST_END = 1 << 16  # bytes of zeros; tar fills up a record, of 10 kB unless it is told otherwise
_LARGEST_SIZE_IN_HEADER = 8**11 - 1
_MAGIC = (b"ustar", bytes(5))  # the second in v7's headers
_HeaderError = tarfile.HeaderError


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: ``size`` bytes at byte ``offset`` of the archive."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Refused:
    """A member that is there but cannot be used; ``kind`` as in ``farnear.data.faults``, ``detail`` for people."""

    name: str
    offset: int
    kind: str
    detail: str


@dataclass(frozen=True)
class Break:
    """A place where members were lost: of which samples is not known, and the neighbours may miss some of theirs."""

    offset: int
    kind: str
    detail: str


class NotATarError(ValueError):
    """The file is no uncompressed tar at all; ``kind`` as in ``farnear.data.faults``."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def walk_members(file: BinaryIO) -> Iterator[Member | Refused | Break]:
    """Yield what the tar ``file`` holds in stored order; directories are skipped.

    A break of the kind ``bytes_after_end`` is the last one. What follows it stands behind the end of the archive, and
    is yielded so that it can be counted.

    The walker moves the file's position before each header, so the caller may read a member's bytes between two
    ``next`` calls. Raises ``NotATarError`` before the first member.
    """
    shard_size = os.fstat(file.fileno()).st_size
    _check_start(file, shard_size)
    position, behind_end = 0, False
    long_name = _LongName()
    while True:
        broken = None
        file.seek(position)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            detail = f"no end-of-archive block at byte {position}, so the shard was cut short"
            broken = Break(position, "cut_short", detail)
        elif not any(block):
            if long_name.pending and not behind_end:
                yield Break(position, "damaged_header", "the archive ends after a name without its member")
                long_name = _LongName()
            if not _has_bytes(file, position, shard_size):
                if shard_size - position > _LARGEST_END and not behind_end:
                    zeros = shard_size - position
                    detail = f"{zeros} zero bytes to the end of the file, where an archive ends with a few thousand"
                    yield Break(position, "cut_short", detail)
                return
            detail = "the archive ends here but more bytes follow (two tars joined, or a damaged header)"
            broken = Break(position, "bytes_after_end", detail)
        else:
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                if long_name.is_repeated_by(header):
                    if not behind_end:
                        yield Break(position, "damaged_header", "a name without its member, and another name follows")
                    long_name = long_name.after_member()
                long_name.check(header)
                offset, size = position + _BLOCK, long_name.size_of(header)
                if header.type == tarfile.GNUTYPE_SPARSE:
                    offset += _bytes_of_sparse_map(file, block)
                if header.type in _NOT_A_MEMBER:
                    if size > _LARGEST_NAME_BYTES:
                        raise ValueError(f"a name of {size} bytes")
                    long_name.read(header, file.read(size))
            except (_HeaderError, ValueError) as error:
                broken = Break(position, "damaged_header", f"damaged tar header ({error})")
            else:
                if offset + size > shard_size:
                    name = long_name.name_of(header)
                    detail = f"the member {name!r} needs {size} bytes but the file ends at byte {shard_size}"
                    broken = Break(position, "cut_short", detail)
        if broken is not None:
            if not behind_end:
                yield broken
            behind_end = behind_end or broken.kind == "bytes_after_end"
            found = None if broken.kind == "cut_short" else _next_header(file, position + _BLOCK)
            if found is None:
                return
            # Zeros before a header are an end, or of a lost member: rather count what follows than offer a stale copy.
            if not behind_end and found - 2 * _BLOCK > position and not _has_bytes(file, found - 2 * _BLOCK, found):
                detail = "behind damage the archive seems to end here, but more members follow (two tars joined)"
                yield Break(found - 2 * _BLOCK, "bytes_after_end", detail)
                behind_end = True
            position, long_name = found, _LongName()
            continue
        if header.type not in _NOT_A_MEMBER:
            name = long_name.name_of(header)
            if refused := _why_refused(header, long_name, name):
                yield Refused(name, position, *refused)
            elif not header.isdir():
                yield Member(name, offset, size)
            long_name = long_name.after_member()
        position = offset + -(-size // _BLOCK) * _BLOCK


class _LongName:
    """What the members before a member say of its name and size."""

    def __init__(self, global_records: dict[str, str] | None = None) -> None:
        self.gnu_name: str | None = None
        self.gnu_link = False
        self.pax: dict[str, str] = {}
        self.global_records = global_records or {}

    @property
    def pending(self) -> bool:
        return self.gnu_name is not None or self.gnu_link or bool(self.pax)

    def is_repeated_by(self, header: tarfile.TarInfo) -> bool:
        """Whether the header says again what was said already: a member between them is lost."""
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return self.gnu_name is not None
        return header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and bool(self.pax)

    def after_member(self) -> "_LongName":
        return _LongName(self.global_records)

    def read(self, header: tarfile.TarInfo, data: bytes) -> None:
        if header.type == tarfile.GNUTYPE_LONGNAME:
            self.gnu_name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif header.type == tarfile.XGLTYPE:
            self.global_records = self.global_records | _pax_records(data)
            if overrides := sorted({"path", "size"} & self.global_records.keys()):
                raise ValueError(f"a global PAX header sets {overrides[0]!r} for every member")
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            self.gnu_link = True
        else:
            self.pax = _pax_records(data)

    def check(self, header: tarfile.TarInfo) -> None:
        """Raises ValueError where a name cannot be the one of the member ``header``: another stood between them."""
        if header.type in _NOT_A_MEMBER:
            return
        if self.gnu_link and not (header.islnk() or header.issym()):
            raise ValueError("a link's name before something else")
        half = header.name.encode("utf-8", "surrogateescape")
        if self.gnu_name is not None and not self.gnu_name.encode("utf-8", "surrogateescape").startswith(half):
            raise ValueError("another member's name before it")

    def name_of(self, header: tarfile.TarInfo) -> str:
        return self.pax.get("GNU.sparse.name") or self.pax.get("path") or self.gnu_name or header.name

    def size_of(self, header: tarfile.TarInfo) -> int:
        """Bytes that follow the header."""
        if header.type in _NOT_A_MEMBER:
            size = header.size
        elif header.type in tarfile.SUPPORTED_TYPES and not header.isreg():
            return 0  # folders, links and devices have no bytes, whatever their headers say
        else:
            size = int(self.pax.get("size", header.size))
            if "size" in self.pax and size != header.size and size <= _LARGEST_SIZE_IN_HEADER:
                raise ValueError(f"its PAX header says {size} bytes and its own header {header.size}")
        if size < 0:
            raise ValueError(f"a size of {size} bytes")
        return size


def _pax_records(data: bytes) -> dict[str, str]:
    """The records ``"<length> <keyword>=<value>\\n"`` of a PAX header (POSIX.1-2008, pax, "Extended Header")."""
    records = {}
    start = 0
    while start < len(data):
        digits, _, _ = data[start : start + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        keyword, equals, value = data[start + len(digits) + 1 : start + length].partition(b"=")
        if length <= 0 or start + length > len(data) or not equals or not value.endswith(b"\n"):
            raise ValueError("damaged PAX records")
        records[keyword.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        start += length
    return records


def _bytes_of_sparse_map(file: BinaryIO, block: bytes) -> int:
    """What lies between the header of GNU's older sparse format and the member's bytes."""
    size, continues = 0, block[482]
    while continues:
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise ValueError("a sparse map that is cut short")
        size, continues = size + _BLOCK, block[504]
    return size


def _check_start(file: BinaryIO, shard_size: int) -> None:
    """Raises ``NotATarError``."""
    block = file.read(_BLOCK)
    if shard_size == 0:
        raise NotATarError("empty", "is an empty file")
    if _is_header(block):
        return
    for compression, magic in _MAGIC_OF_COMPRESSION.items():
        if block.startswith(magic):
            raise NotATarError("compressed", f"is compressed with {compression}; decompress it to a plain .tar")
    if len(block) < _BLOCK:
        raise NotATarError("not_a_tar", "is not a tar file (it is shorter than a header)")
    if any(block) and _next_header(file, 0) is None:
        raise NotATarError("not_a_tar", "is not a tar file (it has no tar header)")


def _why_refused(header: tarfile.TarInfo, long_name: _LongName, name: str) -> tuple[str, str] | None:
    if header.isdir():
        return None
    what = _REFUSED_TYPES.get(header.type)
    if any(keyword.startswith("GNU.sparse.") for keyword in long_name.pax):
        what = _REFUSED_TYPES[tarfile.GNUTYPE_SPARSE]
    elif what is None and not header.isreg():
        what = f"of the unknown type {header.type!r}"
    if what is not None:
        kind = "sparse" if what == _REFUSED_TYPES[tarfile.GNUTYPE_SPARSE] else "not_a_file"
        detail = (
            f"{name!r} is {what}, so its bytes are not in one place; write plain files (tar --dereference "
            "--hard-dereference, without --sparse)"
        )
        return kind, detail
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "bad_name", f"the name {name!r} is not UTF-8, so it cannot be shown or stored"
    return None


def _next_header(file: BinaryIO, position: int) -> int | None:
    """Where the next block lies, at or behind ``position``, that is a header; None if none does."""
    file.seek(position)
    while chunk := file.read(_CHUNK_BYTES):
        for start in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
            if chunk[start + 257 : start + 262] in _MAGIC and _is_header(chunk[start : start + _BLOCK]):
                return position + start
        position += len(chunk)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (_HeaderError, ValueError):
        return False
    return True


def _has_bytes(file: BinaryIO, position: int, end: int) -> bool:
    """Whether anything but zeros stands from ``position`` to ``end``."""
    file.seek(position)
    while position < end and (chunk := file.read(min(_CHUNK_BYTES, end - position))):
        if chunk.count(0) < len(chunk):
            return True
        position += len(chunk)
    return False
