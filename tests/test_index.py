"""The index: what a scan of tars finds, what it refuses, and the file it is kept in."""

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tar_makers import image_bytes, pair_members, write_pairs, write_tar
from webdataset import TarWriter

from farnear.data import index as index_module
from farnear.data.index import Index, build_index, expand_shards, open_index, write_index
from farnear.data.scan import hash_bytes, hash_query
from farnear.errors import UserError

FOLDER = "a-folder-with-a-name-that-is-rather-long-" + "x" * 30
LONG = f"{FOLDER}/{'k' * 90}"
SAMPLES = [
    ("plain", "what is it?", image_bytes(1), [image_bytes(2), image_bytes(3)]),
    (LONG, "a long name", image_bytes(4), []),
    ("ümlaut/日本", "straße", image_bytes(5), [image_bytes(6)]),
]


def stored(index: Index, shard: int, offset: int, size: int) -> bytes:
    return Path(index.shards[shard]).read_bytes()[offset : offset + size]


def page_bytes(index: Index, page: int) -> bytes:
    return stored(index, index.page_shard_P[page], index.page_offset_P[page], index.page_size_P[page])


def assert_one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value)


def sample_members() -> list[tuple[str, bytes]]:
    members = []
    for key, query, page, negatives in SAMPLES:
        members += [(f"{key}.json", json.dumps({"query": query}).encode()), (f"{key}.png", page)]
        members += [(f"{key}.neg{i}.png", negative) for i, negative in enumerate(negatives)]
    return members


def write_webdataset(path: Path) -> None:
    with TarWriter(str(path)) as writer:
        for key, query, page, negatives in SAMPLES:
            hard = {f"neg{i}.png": negative for i, negative in enumerate(negatives)}
            writer.write({"__key__": key, "json": {"query": query}, "png": page, **hard})


def write_with_pax_sizes(path: Path) -> None:
    """The real size in the PAX header only, as for members over 8 GB."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sample_members():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {"size": str(len(data)), "comment": "ü"}
            tar.addfile(info, io.BytesIO(data))


WRITERS: dict[str, Callable[[Path], object]] = {
    "ustar": lambda path: write_tar(path, sample_members(), tarfile.USTAR_FORMAT),
    "gnu": lambda path: write_tar(path, sample_members(), tarfile.GNU_FORMAT),
    "pax": lambda path: write_tar(path, sample_members(), tarfile.PAX_FORMAT),
    "pax sizes": write_with_pax_sizes,
    "webdataset": write_webdataset,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_tar_dialect_reads_the_same(tmp_path: Path, writer: str) -> None:
    WRITERS[writer](tmp_path / "a.tar")
    index = build_index([tmp_path / "a.tar"])
    assert list(index.pair_key) == [key for key, *_ in SAMPLES]
    assert len(index) == 3 and index.ignored_members == 0
    for pair, (key, query, page, negatives) in enumerate(SAMPLES):
        data = stored(index, 0, index.query_offset_N[pair], index.query_size_N[pair])
        assert json.loads(data) == {"query": query}
        assert index.query_hash_N[pair] == hash_query(query)
        positive = index.positive_N[pair]
        assert page_bytes(index, positive) == page
        assert index.page_hash_P[positive] == hash_bytes(page)
        assert index.page_name[positive] == f"{key}.png"
        hard = index.negatives[index.negative_start_N1[pair] : index.negative_start_N1[pair + 1]]
        assert [page_bytes(index, row) for row in hard] == negatives
    assert index.pair_id(0) == "a.tar/plain"
    assert index.page_id(index.positive_N[0]) == "a.tar/plain.png"


def test_gnu_and_pax_names_beyond_ustar(tmp_path: Path) -> None:
    key = "/".join(["y" * 80] * 5)
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / "a.tar", pair_members(key, "q", 1), tar_format)
        assert build_index([tmp_path / "a.tar"]).pair_key[0] == key


def test_negatives_in_the_order_of_their_numbers_and_any_case(tmp_path: Path) -> None:
    images = {f"k.NEG{number}.JPG": image_bytes(number, "JPEG") for number in (10, 2, 0)}
    members = [*images.items(), ("k.query.txt", b"\xef\xbb\xbf what\n"), ("k.WebP", image_bytes(1, "WEBP"))]
    index = build_index([write_tar(tmp_path / "a.tar", members)])
    assert [index.page_name[row] for row in index.negatives] == ["k.NEG0.JPG", "k.NEG2.JPG", "k.NEG10.JPG"]
    assert not index.query_is_json_N[0]
    assert index.query_hash_N[0] == hash_query("what")


def test_query_hash_folds_space_and_case_only() -> None:
    assert hash_query(" What  is\tIT ") == hash_query("what is it")
    assert hash_query("what is it?") != hash_query("what is it")


def test_unknown_members_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    members = pair_members("k", "q", 1)
    write_tar(path, [("README", b"x"), (".png", b"x"), *members, ("k.npy", b"x"), ("other.cls", b"1")])
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    index = build_index([path])
    assert len(index) == 1 and len(index.page_name) == 1
    assert index.ignored_members == 4
    assert index.ignored_examples == ("a.tar/README", "a.tar/.png", "a.tar/k.npy", "a.tar/other.cls")


def test_page_shards_hold_pages_only(tmp_path: Path) -> None:
    members = [
        ("a.png", image_bytes(1)),
        ("b.page.jpg", image_bytes(2, "JPEG")),
        ("b.json", b"{}"),
        ("._a.png", b"x"),
        ("a.png", b"x"),
    ]
    index = build_index([write_tar(tmp_path / "a.tar", members)], pairs=False)
    assert len(index) == 0 and index.ignored_members == 2
    assert list(index.page_name) == ["a.png", "b.page.jpg", "a.png"]
    write_tar(tmp_path / "none.tar", [("a.json", b"{}")])
    with pytest.raises(UserError, match="holds no page"):
        build_index([tmp_path / "none.tar"], pairs=False)


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


TWO_PAIRS = pair_members("a", "first", 1) + pair_members("b", "second", 2)
# In TWO_PAIRS the headers stand at bytes 0, 1024, 2048 and 3072 and the archive ends at 4096.
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "header checksum": (flip(2048 + 5), r"damaged tar header at byte 2048 .*members behind it"),
    "zeroed header": (lambda data: data[:2048] + bytes(512) + data[2560:], r"ends at byte 2048 but more bytes follow"),
    "cut in a member": (lambda data: data[: 3072 + 520], r"'b.png' at byte 3072 needs \d+ bytes .* cut short"),
    "cut in a header": (lambda data: data[: 3072 + 100], r"no end-of-archive block at byte 3072"),
    "no end of archive": (lambda data: data[:4096], r"no end-of-archive block at byte 4096"),
    "joined tars": (lambda data: data + data, r"ends at byte 4096 but more bytes follow"),
    "empty file": (lambda data: b"", r"is an empty file"),
    "empty tar": (lambda data: bytes(10240), r"holds no pair"),
    "text": (lambda data: b"version https://git-lfs", r"is not a tar file"),
    "gzip": (gzip.compress, r"is compressed with gzip.*decompress"),
    "zstd": (lambda data: b"\x28\xb5\x2f\xfd" + data, r"is compressed with zstd"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tars_are_refused(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "whole.tar", TWO_PAIRS)
    assert len(build_index([path])) == 2
    change, message = DAMAGES[damage]
    broken = tmp_path / "broken.tar"
    broken.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"broken.tar.* {message}") as error:
        build_index([path, broken])
    assert_one_line(error)


def with_member(change: Callable[[tarfile.TarInfo], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_tar(path, TWO_PAIRS)
        with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("c.png")
            change(info)
            tar.addfile(info)

    return write


def set_type(kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    return lambda info: setattr(info, "type", kind)


def write_latin_name(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("\xe9.png"))


def write_orphan_long_name(path: Path) -> None:
    write_tar(path, [("z" * 120 + ".png", b"x")])
    data = path.read_bytes()
    path.write_bytes(data[:1024] + bytes(1024))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "sparse": (with_member(set_type(tarfile.GNUTYPE_SPARSE)), "'c.png' at byte 4096 is a sparse file"),
    "PAX sparse": (with_member(lambda info: info.pax_headers.update({"GNU.sparse.major": "1"})), "is a sparse file"),
    "hard link": (with_member(set_type(tarfile.LNKTYPE)), "is a hard link"),
    "symbolic link": (with_member(set_type(tarfile.SYMTYPE)), "is a symbolic link"),
    "fifo": (with_member(set_type(tarfile.FIFOTYPE)), "is of the unknown type b'6'"),
    "negative PAX size": (with_member(lambda info: info.pax_headers.update(size="-5")), "needs -5 bytes"),
    "PAX size no number": (with_member(lambda info: info.pax_headers.update(size="x")), "damaged PAX size"),
    "name not UTF-8": (write_latin_name, "not UTF-8"),
    "name without member": (write_orphan_long_name, "after a name without its member"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_members_without_bytes_in_one_place_are_refused(tmp_path: Path, kind: str) -> None:
    write, message = REFUSED[kind]
    write(tmp_path / "a.tar")
    with pytest.raises(UserError, match=message) as error:
        build_index([tmp_path / "a.tar"])
    assert_one_line(error)


PAGE = ("k.png", image_bytes(1))
QUERY = ("k.json", b'{"query": "q"}')
SAMPLE_FAULTS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no query": ([PAGE], "'k' has no query .no KEY.json and no KEY.query.txt"),
    "JSON without query": ([("k.json", b'{"text": "q"}'), PAGE], "'k' has no query .no 'query' in its KEY.json"),
    "no page": ([QUERY, ("k.neg0.png", image_bytes(1))], "'k' has no positive page"),
    "empty query": ([("k.json", b'{"query": " "}'), PAGE], "'k' .*'k.json' .the query is empty"),
    "number": ([("k.json", b'{"query": 7}'), PAGE], "'query' is 7 and not a string"),
    "null": ([("k.json", b'{"query": null}'), PAGE], "'query' is null and not a string"),
    "list": ([("k.json", b'["q"]'), PAGE], "the JSON is not an object"),
    "no JSON": ([("k.json", b'{"query":\n'), PAGE], "'k' has no usable query"),
    "no UTF-8": ([("k.query.txt", b"\xe9"), PAGE], "'k' has no usable query"),
    "half a character": ([("k.json", b'{"query": "\\ud800"}'), PAGE], "surrogates not allowed"),
    "two queries": ([QUERY, ("k.query.txt", b"q"), PAGE], "'k' has its query twice"),
    "two pages": ([QUERY, PAGE, ("k.jpg", image_bytes(1, "JPEG"))], "'k' has two positive pages"),
    "negative twice": ([QUERY, PAGE, ("k.neg0.png", b"x"), ("k.neg0.jpg", b"x")], "two hard negatives numbered 0"),
    "empty page": ([QUERY, ("k.png", b"")], "the page 'k.png' at byte 1536 is empty"),
    "torn apart": ([QUERY, *pair_members("l", "q", 2), PAGE], "'k' has no positive page.*keep the members.*together"),
    "key twice": (
        [QUERY, PAGE, *pair_members("l", "q", 2), QUERY, PAGE],
        "'k' is used at byte 512 and again at byte 4608",
    ),
}


@pytest.mark.parametrize("fault", SAMPLE_FAULTS)
def test_incomplete_samples_are_refused(tmp_path: Path, fault: str) -> None:
    members, message = SAMPLE_FAULTS[fault]
    with pytest.raises(UserError, match=f"a.tar.*{message}") as error:
        build_index([write_tar(tmp_path / "a.tar", members)])
    assert_one_line(error)


def test_a_json_without_query_beside_a_query_txt_is_fine(tmp_path: Path) -> None:
    members = [("k.json", b'{"source": "x"}'), ("k.query.txt", b"q"), PAGE]
    assert len(build_index([write_tar(tmp_path / "a.tar", members)])) == 1


def test_a_key_in_two_shards_names_both(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", TWO_PAIRS)
    second = write_tar(tmp_path / "b.tar", pair_members("c", "q", 3) + pair_members("b", "q", 4))
    with pytest.raises(UserError, match=r"key 'b' is used in shard .*a\.tar and again in shard .*b\.tar"):
        build_index([first, second])


def columns_of(index: Index) -> dict[str, list[object]]:
    return {name: list(getattr(index, name)) for name in index_module._COLUMNS}


def test_processes_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_pairs(tmp_path, 20, 3, negatives_of_pair=2)
    alone = build_index(shards)
    monkeypatch.setattr(index_module, "_BYTES_WORTH_A_PROCESS", 0)
    monkeypatch.setattr(index_module.os, "sched_getaffinity", lambda pid: {0, 1})
    together = build_index(shards)
    assert columns_of(together) == columns_of(alone)
    assert together.fingerprint == alone.fingerprint
    shards[1].write_bytes(shards[1].read_bytes()[:-10240])
    with pytest.raises(UserError, match=r"part-001.tar: no end-of-archive"):
        build_index(shards)


def test_file_gives_back_the_index_as_views(tmp_path: Path) -> None:
    index = build_index(write_pairs(tmp_path / "shards", 9, 2, negatives_of_pair=3))
    write_index(index, tmp_path / "index.arrow")
    opened = open_index(tmp_path / "index.arrow")
    assert columns_of(opened) == columns_of(index)
    assert (opened.shards, opened.fingerprint) == (index.shards, index.fingerprint)
    assert opened.ignored_examples == index.ignored_examples
    for name in index_module._COLUMNS:
        before, after = getattr(index, name), getattr(opened, name)
        if isinstance(after, np.ndarray):
            assert after.dtype == before.dtype
            assert not after.flags.owndata and not after.flags.writeable
    assert sorted(os.listdir(tmp_path)) == ["index.arrow", "shards"]


def test_mapping_a_big_index_costs_no_memory(tmp_path: Path) -> None:
    index = build_index(write_pairs(tmp_path / "shards", 4, 1))
    write_index(index, tmp_path / "index.arrow")
    before = pa.total_allocated_bytes()
    opened = open_index(tmp_path / "index.arrow")
    assert opened.page_hash_P.sum() == index.page_hash_P.sum()
    assert pa.total_allocated_bytes() == before


def test_file_of_page_shards(tmp_path: Path) -> None:
    index = build_index([write_tar(tmp_path / "a.tar", [PAGE])], pairs=False)
    write_index(index, tmp_path / "index.arrow")
    assert columns_of(open_index(tmp_path / "index.arrow")) == columns_of(index)


def test_a_new_file_replaces_the_old_under_an_open_index(tmp_path: Path) -> None:
    write_index(build_index(write_pairs(tmp_path / "old", 5, 1)), tmp_path / "index.arrow")
    old = open_index(tmp_path / "index.arrow")
    write_index(build_index(write_pairs(tmp_path / "new", 3, 1)), tmp_path / "index.arrow")
    assert len(old) == 5 and old.pair_key[4] == "k00004"
    assert len(open_index(tmp_path / "index.arrow")) == 3


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.arrow"
    with pytest.raises(UserError, match="does not exist"):
        open_index(path)
    index = build_index(write_pairs(tmp_path / "shards", 2, 1))
    write_index(index, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"damaged or not an index.*delete it"):
        open_index(path)
    monkeypatch.setattr(index_module, "FORMAT_VERSION", 2)
    write_index(index, path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format version 2 and this farnear reads version 1"):
        open_index(path)
    row = pa.record_batch([[1]], names=["x"])
    with pa.ipc.new_file(str(path), row.schema) as writer:
        writer.write_batch(row)
    with pytest.raises(UserError, match="format version none"):
        open_index(path)


def test_fingerprint_follows_the_content_and_not_the_folder(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path / "here", 6, 2)
    fingerprint = build_index(shards).fingerprint
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert build_index(sorted((tmp_path / "there").iterdir())).fingerprint == fingerprint
    assert build_index(shards[::-1]).fingerprint != fingerprint
    write_tar(shards[0], pair_members("k00000", "another", 0) + pair_members("k00001", "query 1", 1))
    assert build_index(shards).fingerprint != fingerprint


def test_expand_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b-000.tar", "b-001.tar", "a.tar", "[odd].tar"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = lambda *patterns: [path.name for path in expand_shards(patterns, "train shards")]  # noqa: E731
    assert names("b-{000..001}.tar", str(tmp_path / "a.tar")) == ["b-000.tar", "b-001.tar", "a.tar"]
    assert names("~/b-*.tar") == ["b-000.tar", "b-001.tar"]
    assert names("[odd].tar") == ["[odd].tar"]
    assert all(path.is_absolute() for path in expand_shards(["a.tar"], "train shards"))
    for patterns, message in [
        ([], "train shards: no shard is named"),
        (["c-*.tar"], r"train shards: 'c-\*.tar' matches no file"),
        (["c.tar"], "train shards: .*c.tar does not exist"),
        (["b-{000..002}.tar"], "b-002.tar does not exist"),
        (["b-{000.tar"], "braces"),
        ([str(tmp_path)], "is a folder"),
        (["*.tar", "a.tar"], "a.tar is named twice"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            expand_shards(patterns, "train shards")
        assert_one_line(error)


def test_a_missing_shard_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.tar cannot be read \(No such file"):
        build_index([tmp_path / "gone.tar"])
