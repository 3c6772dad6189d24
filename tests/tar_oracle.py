"""What a tar says, by Python's ``tarfile`` and a few lines that put samples together; for ``tar_fuzz``."""

import io
import json
import re
import tarfile
from dataclasses import dataclass, field
from typing import Any

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class TarMember:
    name: str
    is_file: bool
    start: int  # of its first header
    offset: int
    data: bytes

    @property
    def key_and_suffix(self) -> tuple[str, str]:
        folder, slash, last = self.name.removeprefix("./").rpartition("/")
        stem, dot, suffix = last.partition(".")
        return (folder + slash + stem, suffix.lower()) if stem and dot else ("", "")

    @property
    def slot(self) -> str | None:
        """json, query, positive, neg0, ...; None for a member without a meaning."""
        key, suffix = self.key_and_suffix
        if not key:
            return None
        if suffix == "json":
            return "json"
        match = re.fullmatch(r"(?:(query|neg\d+)\.)?(?:png|jpe?g|webp|txt)", suffix)
        if match:
            return match[1] or "positive"
        return "broken" if re.fullmatch(r"neg\d+\..*", suffix) else None


def tar_members(data: bytes) -> list[TarMember] | None:
    """The members of a whole tar; None where it is not whole."""
    members = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
            for info in tar:
                is_file = info.isreg() and not info.issparse()
                stored = data[info.offset_data : info.offset_data + info.size] if is_file else b""
                if is_file and len(stored) < info.size:
                    return None
                if not _is_written_so(data, info):
                    return None
                if not info.isdir():
                    members.append(TarMember(info.name, is_file, info.offset, info.offset_data, stored))
            end = data[tar.offset :]
            if {"path", "size"} & tar.pax_headers.keys():
                return None  # one name for all members
    except (tarfile.TarError, ValueError, EOFError, OSError, IndexError):
        return None
    return members if len(end) >= _BLOCK and not any(end) else None


def _is_written_so(data: bytes, info: tarfile.TarInfo) -> bool:
    """Whether each of the headers before a member is there once and about it, which tarfile does not ask."""
    kinds = []
    position, long_name = info.offset, b""
    while position < info.offset_data - tarfile.BLOCKSIZE:
        header = tarfile.TarInfo.frombuf(data[position : position + _BLOCK], "utf-8", "surrogateescape")
        kinds.append(header.type)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = data[position + _BLOCK : position + _BLOCK + header.size].partition(b"\0")[0]
        position += _BLOCK + -(-header.size // _BLOCK) * _BLOCK
    if tarfile.GNUTYPE_LONGLINK in kinds and not (info.islnk() or info.issym()):
        return False
    own_name = tarfile.TarInfo.frombuf(data[position : position + _BLOCK], "utf-8", "surrogateescape").name
    is_about_it = tarfile.GNUTYPE_LONGNAME not in kinds or long_name.startswith(
        own_name.encode(errors="surrogateescape")
    )
    return len(set(kinds)) == len(kinds) and is_about_it


@dataclass
class TarSample:
    members: list[TarMember] = field(default_factory=list)

    def parts(self, slot: str) -> list[bytes]:
        return sorted(member.data for member in self.members if member.slot == slot)

    @property
    def negatives(self) -> list[list[bytes]]:
        slots = {member.slot for member in self.members if str(member.slot).startswith("neg")}
        return [self.parts(str(slot)) for slot in sorted(slots, key=lambda slot: int(str(slot)[3:]))]

    @property
    def record(self) -> dict[str, Any]:
        found = self.parts("json")
        try:
            record = json.loads(found[0]) if found else {}
        except ValueError:
            record = {}
        return record if isinstance(record, dict) else {}

    def ids(self, *names: str) -> list[str]:
        found: list[str] = []
        for name in names:
            value = self.record.get(name) or []
            found += [value] if isinstance(value, str) else value
        return list(dict.fromkeys(found))

    def query(self, entry: str) -> str:
        """The text of a pair, whose key ends with # and ``entry`` where there are several; "" where there is none."""
        texts = self.parts("query") or [b""]
        found = self.record.get("query") if "query" in self.record else texts[0].decode("utf-8-sig")
        return str(found[int(entry)] if isinstance(found, list) else found).strip()


def samples_of(members: list[TarMember]) -> dict[str, TarSample]:
    """The samples by their keys, whole or not."""
    samples: dict[str, TarSample] = {}
    for member in members:
        key, _ = member.key_and_suffix
        if member.slot is not None and key.isprintable():
            samples.setdefault(key, TarSample()).members.append(member)
    return samples


def count_ignored(members: list[TarMember], name: str) -> int:
    """How many members of pairs.tar or corpus.tar have no meaning."""
    meaningless = (None, "broken", "json", "query") if name == "corpus.tar" else (None,)
    return sum(member.slot in meaningless for member in members if _is_utf8(member.name) or not member.is_file)


def _is_utf8(name: str) -> bool:
    return name.encode("utf-8", "replace") == name.encode("utf-8", "surrogateescape")
