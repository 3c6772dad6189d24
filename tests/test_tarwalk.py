"""The walk: every writer's tars read the same, and whatever is not whole is told with its place."""

import gzip
import io
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tar_makers import image_bytes, pair_members, write_tar
from webdataset import TarWriter

from farnear.data.tarwalk import Break, Member, NotATarError, Refused, walk_members

FOLDER = "a-folder-with-a-name-that-is-rather-long-" + "x" * 30
MEMBERS = [
    ("plain.json", b'{"query": "q"}'),
    ("plain.png", image_bytes(1)),
    (f"{FOLDER}/{'k' * 90}.json", b""),
    (f"{FOLDER}/{'k' * 90}.neg0.png", image_bytes(2)),
    ("ümlaut/日本.txt", "straße".encode()),
]


def walk(path: Path) -> list[Member | Refused | Break]:
    with open(path, "rb") as file:
        return list(walk_members(file))


def contents(path: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of the members; anything else fails."""
    data = path.read_bytes()
    members = [found for found in walk(path) if isinstance(found, Member)]
    assert len(members) == len(walk(path))
    return [(member.name, data[member.offset : member.offset + member.size]) for member in members]


def write_webdataset(path: Path, tar_format: str | None) -> None:
    with TarWriter(str(path), encoder=False, format=tar_format) as writer:
        for name, data in MEMBERS:
            key, _, suffix = name.partition(".")
            writer.write({"__key__": key, suffix: data})


def write_with_pax_sizes(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {"size": str(len(data)), "comment": "ü"}
            tar.addfile(info, io.BytesIO(data))


def gnu_tar(path: Path, *options: str) -> None:
    folder = path.with_suffix("")
    for name, data in MEMBERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    command = ["tar", "-C", str(folder), "-cf", str(path), *options, *(name for name, _ in MEMBERS)]
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})


WRITERS: dict[str, Callable[[Path], object]] = {
    "tarfile ustar": lambda path: write_tar(path, MEMBERS, tarfile.USTAR_FORMAT),
    "tarfile gnu": lambda path: write_tar(path, MEMBERS, tarfile.GNU_FORMAT),
    "tarfile pax": lambda path: write_tar(path, MEMBERS, tarfile.PAX_FORMAT),
    "tarfile pax sizes": write_with_pax_sizes,
    "webdataset": lambda path: write_webdataset(path, None),
    "webdataset gnu": lambda path: write_webdataset(path, "GNU_FORMAT"),
    "webdataset pax": lambda path: write_webdataset(path, "PAX_FORMAT"),
    "tar gnu": lambda path: gnu_tar(path, "--format=gnu"),
    "tar oldgnu": lambda path: gnu_tar(path, "--format=oldgnu"),
    "tar posix": lambda path: gnu_tar(path, "--format=posix"),
    "tar ustar": lambda path: gnu_tar(path, "--format=ustar"),
    "tar with a label": lambda path: gnu_tar(path, "--format=posix", "--label=pages"),
    "tar with large blocks": lambda path: gnu_tar(path, "--format=gnu", "-b", "128"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_reads_the_same(tmp_path: Path, writer: str) -> None:
    WRITERS[writer](tmp_path / "a.tar")
    assert contents(tmp_path / "a.tar") == MEMBERS


def test_v7_has_short_names_only(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in (("a.json", b"{}"), ("a.png", image_bytes(1)), ("b.txt", b"x")):
        (folder / name).write_bytes(data)
    subprocess.run(["tar", "-C", folder, "--format=v7", "--sort=name", "-cf", tmp_path / "a.tar", "."], check=True)
    found = contents(tmp_path / "a.tar")
    assert found == [("./a.json", b"{}"), ("./a.png", image_bytes(1)), ("./b.txt", b"x")]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    second = data.index(b"./a.png")
    data[second + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    assert [getattr(one, "name", None) for one in walk(tmp_path / "a.tar")] == ["./a.json", None, "./b.txt"]


def test_names_beyond_ustar(tmp_path: Path) -> None:
    name = "/".join(["y" * 80] * 5) + ".png"
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert contents(write_tar(tmp_path / "a.tar", [(name, b"x")], tar_format)) == [(name, b"x")]


def test_folders_are_no_members_whatever_their_names(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name in ("folder", "fold\xe9r"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            folder.size = 77  # which nothing follows: only files have bytes
            tar.addfile(folder)
            tar.addfile(tarfile.TarInfo("b.txt"))
    assert contents(path) == [("a.txt", b"x"), ("b.txt", b""), ("b.txt", b"")]


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


TWO_PAIRS = pair_members("a", "first", 1) + pair_members("b", "second", 2)
ALL = ["a.json", "a.png", "b.json", "b.png"]
# In TWO_PAIRS the headers stand at bytes 0, 1024, 2048 and 3072 and the archive ends at 4096.
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], tuple[str, int], int, int]] = {
    # what is done, the break, and how many of ALL are found before it and how many (the last ones) behind it
    "header checksum": (flip(2048 + 5), ("damaged_header", 2048), 2, 1),
    "first header": (flip(5), ("damaged_header", 0), 0, 3),
    "first header's magic": (flip(257), ("damaged_header", 0), 0, 3),
    "last header": (flip(3072), ("damaged_header", 3072), 3, 0),
    "zeroed header": (lambda data: data[:2048] + bytes(512) + data[2560:], ("bytes_after_end", 2048), 2, 1),
    "zeroed first header": (lambda data: bytes(512) + data[512:], ("bytes_after_end", 0), 0, 3),
    "cut in a member": (lambda data: data[: 3072 + 520], ("cut_short", 3072), 3, 0),
    "cut in a member's padding": (lambda data: data[:4090], ("cut_short", 4096), 4, 0),
    "cut in a header": (lambda data: data[: 3072 + 100], ("cut_short", 3072), 3, 0),
    "no end of archive": (lambda data: data[:4096], ("cut_short", 4096), 4, 0),
    "joined tars": (lambda data: data + data, ("bytes_after_end", 4096), 4, 4),
    "garbage": (lambda data: data + b"x" * 3000, ("bytes_after_end", 4096), 4, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_break_is_told_with_its_place(tmp_path: Path, damage: str) -> None:
    change, (kind, offset), before, behind = DAMAGES[damage]
    path = write_tar(tmp_path / "a.tar", TWO_PAIRS)
    assert [found.name for found in walk(path) if isinstance(found, Member)] == ALL
    path.write_bytes(change(path.read_bytes()))
    found = walk(path)
    (place,) = (place for place, one in enumerate(found) if isinstance(one, Break))
    assert (found[place].kind, found[place].offset) == (kind, offset)
    # What follows the end of the archive is shown too, so that it can be counted.
    assert [one.name for one in found[:place]] == ALL[:before]
    assert [one.name for one in found[place + 1 :]] == ALL[len(ALL) - behind :]


def test_an_end_that_was_passed_over_is_told(tmp_path: Path) -> None:
    """The last header is damaged, and the next one belongs to a second tar."""
    data = write_tar(tmp_path / "a.tar", TWO_PAIRS).read_bytes()
    (tmp_path / "a.tar").write_bytes(flip(3072)(data) + data)
    found = walk(tmp_path / "a.tar")
    breaks = [(place, one.kind, one.offset) for place, one in enumerate(found) if isinstance(one, Break)]
    assert breaks == [(3, "damaged_header", 3072), (4, "bytes_after_end", len(data) - 1024)]
    assert [one.name for one in found[5:]] == ALL


def test_a_cut_in_the_end_of_the_archive_loses_nothing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", TWO_PAIRS)
    data = path.read_bytes()
    path.write_bytes(data[: 4096 + 512])
    assert len(walk(path)) == 4
    path.write_bytes(data[: 4096 + 511])
    assert [one.kind for one in walk(path) if isinstance(one, Break)] == ["cut_short"]


NO_TARS: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "empty file": (lambda data: b"", "empty", "is an empty file"),
    "text": (lambda data: b"version https://git-lfs", "not_a_tar", "shorter than a header"),
    "long text": (lambda data: b"<html>" * 1000, "not_a_tar", "no tar header"),
    "gzip": (gzip.compress, "compressed", "compressed with gzip; decompress"),
    "zstd": (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed", "compressed with zstd"),
}


@pytest.mark.parametrize("kind", NO_TARS)
def test_no_tar_at_all(tmp_path: Path, kind: str) -> None:
    change, name, message = NO_TARS[kind]
    path = write_tar(tmp_path / "a.tar", TWO_PAIRS)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(NotATarError, match=message) as error:
        walk(path)
    assert error.value.kind == name


def test_a_name_like_a_compressed_file_is_no_compressed_file(tmp_path: Path) -> None:
    assert contents(write_tar(tmp_path / "a.tar", [("BZh.txt", b"x")])) == [("BZh.txt", b"x")]


def with_member(change: Callable[[tarfile.TarInfo], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_tar(path, TWO_PAIRS)
        with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("c.png")
            change(info)
            tar.addfile(info)
            tar.addfile(tarfile.TarInfo("last.txt"))

    return write


def set_type(kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    return lambda info: setattr(info, "type", kind)


def write_latin_name(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("\xe9.png"))
        tar.addfile(tarfile.TarInfo("last.txt"))


def sparse_file(*options: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        folder = path.with_suffix("")
        folder.mkdir()
        with open(folder / "c.png", "wb") as file:
            for block in range(40):  # more pieces than a header has room for
                file.seek(block << 16)
                file.write(b"x" * 4096)
            file.truncate(3 << 20)
        (folder / "last.txt").write_bytes(b"")
        command = ["tar", "-C", str(folder), "--sparse", *options, "-cf", str(path), "c.png", "last.txt"]
        subprocess.run(command, check=True)

    return write


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "sparse by GNU tar": (sparse_file("--format=gnu"), "sparse", "'c.png' is a sparse file"),
    "sparse by GNU tar, 0.0": (sparse_file("--format=posix", "--sparse-version=0.0"), "sparse", "'c.png'.* sparse"),
    "sparse by GNU tar, 0.1": (sparse_file("--format=posix", "--sparse-version=0.1"), "sparse", "'c.png'.* sparse"),
    "sparse by GNU tar, 1.0": (sparse_file("--format=posix", "--sparse-version=1.0"), "sparse", "'c.png'.* sparse"),
    "hard link": (with_member(set_type(tarfile.LNKTYPE)), "not_a_file", "is a hard link"),
    "symbolic link": (with_member(set_type(tarfile.SYMTYPE)), "not_a_file", "is a symbolic link"),
    "fifo": (with_member(set_type(tarfile.FIFOTYPE)), "not_a_file", "is of the unknown type b'6'"),
    "name not UTF-8": (write_latin_name, "bad_name", "not UTF-8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_members_without_bytes_in_one_place_are_refused(tmp_path: Path, kind: str) -> None:
    write, name, message = REFUSED[kind]
    write(tmp_path / "a.tar")
    refused, last = walk(tmp_path / "a.tar")[-2:]
    assert isinstance(refused, Refused) and refused.kind == name
    assert re.search(message, refused.detail), refused.detail
    assert isinstance(last, Member) and last.name == "last.txt"


def pax_size(text: str) -> Callable[[Path], None]:
    return with_member(lambda info: info.pax_headers.update(size=text))


def write_orphan_long_name(path: Path) -> None:
    write_tar(path, [("z" * 120 + ".png", b"x")])
    data = path.read_bytes()
    path.write_bytes(data[:1024] + bytes(1024))


def write_global_path(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "all.png"}) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))


def write_blocks(*blocks: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(b"".join(block.ljust(-(-len(block) // 512) * 512, b"\0") for block in blocks) + bytes(1024))

    return write


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


LONG = "y" * 120 + ".png"
LONG_NAME = (header("././@LongLink", tarfile.GNUTYPE_LONGNAME, len(LONG) + 1), LONG.encode() + b"\0")
PAX_RECORD = b"17 path=name.png\n"
PAX_NAME = (header("pax", tarfile.XHDTYPE, len(PAX_RECORD)), PAX_RECORD)
FILE = (header(LONG[:100], tarfile.REGTYPE, 1), b"x")

LYING: dict[str, tuple[Callable[[Path], None], str]] = {
    "negative PAX size": (pax_size("-5"), "its PAX header says -5 bytes"),
    "PAX size no number": (pax_size("x"), "invalid literal"),
    "PAX size of another file": (pax_size("512"), "its PAX header says 512 bytes and its own header 0"),
    "name without member": (write_orphan_long_name, "after a name without its member"),
    "two names in a row": (write_blocks(*LONG_NAME, *LONG_NAME, *FILE), "a name without its member, and another"),
    "two PAX headers": (write_blocks(*PAX_NAME, *PAX_NAME, *FILE), "a name without its member, and another"),
    "another's name": (write_blocks(*LONG_NAME, header("z.png", tarfile.REGTYPE, 0)), "another member's name before"),
    "a link's name before a file": (
        write_blocks(header("././@LongLink", tarfile.GNUTYPE_LONGLINK, 2), b"l", *FILE),
        "a link's name before something else",
    ),
    "a link's name at the end": (
        write_blocks(*FILE, header("././@LongLink", tarfile.GNUTYPE_LONGLINK, 2), b"l"),
        "after a name without its member",
    ),
    "a PAX record that is too long": (
        write_blocks(PAX_NAME[0], b"77" + PAX_RECORD[2:], *FILE),
        "damaged PAX records",
    ),
    "one name for all": (write_global_path, "a global PAX header sets 'path' for every member"),
}


@pytest.mark.parametrize("kind", LYING)
def test_headers_that_cannot_be_believed_are_breaks(tmp_path: Path, kind: str) -> None:
    write, message = LYING[kind]
    write(tmp_path / "a.tar")
    (found,) = [one for one in walk(tmp_path / "a.tar") if isinstance(one, Break)]
    assert found.kind == "damaged_header" and message in found.detail


def test_the_pieces_of_the_lies_are_right(tmp_path: Path) -> None:
    write_blocks(*LONG_NAME, *FILE, *PAX_NAME, *FILE)(tmp_path / "a.tar")
    assert contents(tmp_path / "a.tar") == [(LONG, b"x"), ("name.png", b"x")]


def test_many_joined_tars_take_no_time(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(write_tar(tmp_path / "one.tar", TWO_PAIRS).read_bytes() * 300)
    found = walk(tmp_path / "a.tar")
    assert len([one for one in found if isinstance(one, Break)]) == 1 and len(found) == 1201


def test_zeros_to_the_end_of_the_file_are_no_end_of_an_archive(tmp_path: Path) -> None:
    """What a preallocated download or a crash leaves. A tar fills up one record."""
    path = write_tar(tmp_path / "a.tar", pair_members("a", "q", 1))
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.truncate(size + 50_000)
    assert [type(found) for found in walk(path)] == [Member, Member]
    with open(path, "ab") as file:
        file.truncate(size + 100_000)
    (broken,) = (found for found in walk(path) if isinstance(found, Break))
    assert broken.kind == "cut_short" and "zero bytes to the end of the file" in broken.detail
    assert len(walk(path)) == 3
