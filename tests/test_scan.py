"""The scan: what the members of a sample mean, and what it says of samples that are not whole."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_makers import video_bytes, wav_bytes
from tar_makers import Members, image_bytes, index_of, pair_members, scanned, write_tar

from farnear.data.index import Index, modality_name
from farnear.data.sample import hash_bytes, hash_query, split_name
from farnear.data.scan_rows import ShardScan


def as_json(**record: Any) -> bytes:
    return json.dumps(record).encode()


def scan(path: Path, members: Members, corpus: bool = False) -> ShardScan:
    return scanned(write_tar(path / "a.tar", members), corpus)


def index_members(path: Path, members: Members) -> Index:
    index = index_of([write_tar(path / "a.tar", members)])
    assert not index.faults, index.faults
    return index


def names_of(index: Index, rows: np.ndarray) -> list[list[str]]:
    return [[index.part_name[part] for part in index.parts(int(row))] for row in rows]


PAGE = ("k.png", image_bytes(1))
QUERY = ("k.json", as_json(query="q"))
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
SIDES: dict[str, tuple[dict[str, bytes], str]] = {
    "text": ({"txt": b"a text"}, "text"),
    "image": ({"webp": image_bytes(2, "WEBP")}, "image"),
    "audio": ({"wav": wav_bytes()}, "audio"),
    "video": ({"mp4": video_bytes()}, "video"),
    "image and text": ({"jpg": image_bytes(3, "JPEG"), "txt": b"a caption"}, "image+text"),
    "all": ({"png": image_bytes(4), "txt": b"t", "flac": b"bytes", "mkv": b"bytes"}, "audio+image+text+video"),
    "messages": ({"messages.json": json.dumps([{"role": "user", "content": "hello"}]).encode()}, "message"),
    "messages with an image": ({"messages.json": json.dumps(CHAT).encode(), "png": image_bytes(5)}, "image+message"),
}


@pytest.mark.parametrize("side", SIDES)
def test_each_side_may_be_anything(tmp_path: Path, side: str) -> None:
    parts, modality = SIDES[side]
    of_query: Members = [(f"k.query.{extension}", data) for extension, data in parts.items()]
    of_page: Members = [(f"k.{extension}", data) for extension, data in parts.items()]
    of_negative: Members = [(f"k.neg0.{extension}", data) for extension, data in parts.items()]
    index = index_members(tmp_path, of_query + of_page + of_negative)
    rows = [index.query_N[0], *index.positives_of(0), *index.negatives_of(0)]
    assert [modality_name(int(index.input_modality_I[row])) for row in rows] == [modality] * 3
    expected = [sorted(name for name, _ in members) for members in (of_query, of_page, of_negative)]
    assert [sorted(names) for names in names_of(index, np.array(rows))] == expected
    # The identity of a page is in its bytes, not in its place.
    assert index.input_hash_I[rows[1]] == index.input_hash_I[rows[2]]
    if len(parts) == 1:
        assert index.input_hash_I[rows[1]] == hash_bytes(*parts.values())
    document = index_of(corpus=[write_tar(tmp_path / "corpus.tar", of_page)])
    assert document.input_hash_I[document.corpus_C].tolist() == [index.input_hash_I[rows[1]]]


def test_a_query_in_json_with_an_image_beside_it(tmp_path: Path) -> None:
    index = index_members(tmp_path, [QUERY, PAGE, ("k.query.png", image_bytes(9))])
    assert modality_name(int(index.input_modality_I[index.query_N[0]])) == "image+text"
    assert index.query_hash_N[0] != hash_query("q")
    index = index_members(tmp_path, [("k.json", as_json(query=CHAT)), PAGE, ("k.query.png", image_bytes(9))])
    assert modality_name(int(index.input_modality_I[index.query_N[0]])) == "image+message"


def test_sizes_offsets_and_hashes(tmp_path: Path) -> None:
    members = pair_members("k", "what is it?", 1, [2, 3])
    path = write_tar(tmp_path / "a.tar", members)
    index = index_of([path])
    stored = path.read_bytes()
    for part, (offset, size) in enumerate(zip(index.part_offset_M, index.part_size_M, strict=True)):
        data = dict(members)[index.part_name[part]]
        assert stored[offset : offset + size] == data
        assert index.part_hash_M[part] == hash_bytes(data)
    of_images = index.part_width_M > 0
    assert of_images.sum() == 3
    assert set(zip(index.part_width_M[of_images], index.part_height_M[of_images], strict=True)) == {(6, 4)}
    assert index.query_hash_N[0] == hash_query("what is it?")
    assert (index.pair_id(0), index.input_id(index.positives[0])) == ("a.tar/k", "a.tar/k.png")


def test_a_list_of_queries_is_a_pair_each(tmp_path: Path) -> None:
    index = index_members(tmp_path, [("k.json", as_json(query=["one", "two"])), PAGE, ("k.neg0.png", image_bytes(2))])
    assert list(index.pair_key) == ["k#0", "k#1"]
    assert index.query_hash_N.tolist() == [hash_query("one"), hash_query("two")]
    assert index.positives_of(0).tolist() == index.positives_of(1).tolist()
    assert index.negatives_of(0).tolist() == index.negatives_of(1).tolist()
    alone = index_members(tmp_path, [("k.json", as_json(query=["one"])), PAGE])
    assert list(alone.pair_key) == ["k#0"]


def test_negatives_in_the_order_of_their_numbers_and_any_case(tmp_path: Path) -> None:
    images = {f"k.NEG{number}.JPG": image_bytes(number, "JPEG") for number in (10, 2, 0)}
    members = [*images.items(), ("k.query.txt", b"\xef\xbb\xbf what\n"), ("k.WebP", image_bytes(1, "WEBP"))]
    index = index_members(tmp_path, members)
    assert names_of(index, index.negatives) == [["k.NEG0.JPG"], ["k.NEG2.JPG"], ["k.NEG10.JPG"]]
    assert index.query_hash_N[0] == hash_query("what")


def test_query_hash_folds_space_and_case_only() -> None:
    assert hash_query(" What  is\tIT ") == hash_query("what is it")
    assert hash_query("what is it?") != hash_query("what is it")


def test_keys_end_at_the_first_dot_of_the_files_name() -> None:
    assert split_name("a.b/c.neg0.png") == ("a.b/c", "neg0.png")
    assert split_name("./c.png") == ("c", "png")
    assert split_name("a/.png") == ("", "png")
    assert split_name("README") == ("", "")


def test_unknown_members_are_counted_and_named(tmp_path: Path) -> None:
    ignored: Members = [("README", b"x"), (".png", b"x"), ("k.npy", b"x"), ("other.cls", b"1"), ("k.json.bak", b"")]
    index = index_members(tmp_path, [*ignored[:2], *pair_members("k", "q", 1), *ignored[2:]])
    assert len(index) == 1 and len(index.part_name) == 2
    assert index.ignored_members == 5
    assert index.ignored_examples == tuple(f"a.tar/{name}" for name, _ in ignored)


def test_a_corpus_holds_documents_only(tmp_path: Path) -> None:
    members: Members = [
        ("a.png", image_bytes(1)),
        ("a.query.png", image_bytes(2)),
        ("b.json", b"{}"),
        ("._a.png", b"x"),
        ("b.jpg", image_bytes(3, "JPEG")),
        ("b.neg0.jpg", image_bytes(4, "JPEG")),  # an inline shard of pairs can be a corpus
        ("b.neg0.txt", b"words of the negative"),
        ("b.neg1.gif", b""),
        ("b.txt", b"words of the page"),
    ]
    found = scan(tmp_path, members, corpus=True)
    assert not found.faults
    assert found.ignored_members == 4
    assert list(found.columns["corpus_key"]) == ["a", "b", "b.neg0"]
    index = index_of(corpus=[tmp_path / "a.tar"])
    assert len(index) == 0
    assert names_of(index, index.corpus_C) == [["a.png"], ["b.txt", "b.jpg"], ["b.neg0.txt", "b.neg0.jpg"]]


GOOD = pair_members("before", "q", 7), pair_members("behind", "q", 8)
FAULTS: dict[str, tuple[Members, str, str]] = {
    "no query": ([PAGE], "incomplete", "'k' has no query .no KEY.json and no KEY.query.txt"),
    "JSON without query": ([("k.json", as_json(text="q")), PAGE], "incomplete", "'k' has no query .no 'query' in its"),
    "no page": ([QUERY, ("k.neg0.png", image_bytes(1))], "incomplete", "'k' has no positive page"),
    "empty query": ([("k.json", as_json(query=" ")), PAGE], "bad_query", "'k.json': the text is empty"),
    "number": ([("k.json", as_json(query=7)), PAGE], "bad_query", "7 is not a text"),
    "null": ([("k.json", as_json(query=None)), PAGE], "bad_query", "null is not a text"),
    "no queries": ([("k.json", as_json(query=[])), PAGE], "bad_query", "the list of queries is empty"),
    "one of several": ([("k.json", as_json(query=["q", ""])), PAGE], "bad_query", "the text is empty"),
    "list": ([("k.json", b'["q"]'), PAGE], "bad_json", "the JSON is not an object"),
    "no JSON": ([("k.json", b'{"query":\n'), PAGE], "bad_json", "'k.json': Expecting value"),
    "deep JSON": ([("k.json", b"[" * 100_000), PAGE], "bad_json", "nested too deeply"),
    "a long number": ([("k.json", b'{"x": ' + b"1" * 5000 + b"}"), PAGE], "bad_json", "4300 digits"),
    "no UTF-8": ([("k.query.txt", b"\xe9"), PAGE], "bad_query", "codec can't decode"),
    "half a character": ([("k.json", b'{"query": "\\ud800"}'), PAGE], "bad_query", "surrogates not allowed"),
    "half a character in a key": ([("k.json", b'{"query": "q", "pos_id": "\\ud800"}')], "bad_json", "surrogates"),
    "keys that are none": (
        [("k.json", as_json(query="q", neg_ids=[1])), PAGE],
        "bad_json",
        "'neg_ids' is not a page's",
    ),
    "two queries": ([QUERY, ("k.query.txt", b"q"), PAGE], "incomplete", "'k' has its query twice"),
    "JSON twice": ([QUERY, ("k.JSON", b"{}"), PAGE], "incomplete", "two members 'k.JSON'"),
    "two pages": ([QUERY, PAGE, ("k.jpg", image_bytes(1, "JPEG"))], "incomplete", "two parts like 'k.jpg'"),
    "negative twice": (
        [QUERY, PAGE, ("k.neg0.png", image_bytes(2)), ("k.neg00.jpg", image_bytes(3, "JPEG"))],
        "incomplete",
        "'k' has two parts like 'k.neg00.jpg'",
    ),
    "unknown negative": ([QUERY, PAGE, ("k.neg0.gif", b"x")], "incomplete", "hard negative of the unknown kind"),
    "empty page": ([QUERY, ("k.png", b"")], "bad_image", "'k.png': no PNG, JPEG or WebP"),
    "empty audio": ([QUERY, ("k.wav", b"")], "incomplete", "'k.wav': it is empty"),
    "empty text": ([QUERY, ("k.txt", b"\n")], "incomplete", "'k.txt': the text is empty"),
    "HTML for a page": ([QUERY, ("k.png", b"<html>")], "bad_image", "no PNG, JPEG or WebP"),
    "bad negative": ([QUERY, PAGE, ("k.neg0.png", b"x")], "bad_image", "'k.neg0.png'"),
    "messages of a path": (
        [("k.json", as_json(query=[{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}])), PAGE],
        "bad_query",
        "a content part is",
    ),
    "messages without a role": ([("k.json", as_json(query=[{"content": "x"}])), PAGE], "bad_query", "'role'"),
    "messages without words": (
        [("k.query.messages.json", b'[{"role": "user", "content": []}]'), PAGE],
        "bad_query",
        "a text or a list of parts",
    ),
    "messages that miss their image": ([("k.json", as_json(query=CHAT)), PAGE], "incomplete", "places for image, and"),
    "messages without place": (
        [QUERY, ("k.messages.json", b'[{"role": "user", "content": "x"}]'), PAGE],
        "incomplete",
        "places for nothing, and beside them there is image",
    ),
    "a text beside messages": (
        [QUERY, ("k.messages.json", b'[{"role": "user", "content": "x"}]'), ("k.txt", b"x")],
        "incomplete",
        "beside them there is text",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_samples_that_are_not_whole_are_left_out(tmp_path: Path, fault: str) -> None:
    members, kind, message = FAULTS[fault]
    found = scan(tmp_path, [*GOOD[0], *members, *GOOD[1]])
    assert list(found.columns["pair_key"]) == ["before", "behind"]
    (one,) = found.faults
    assert (one.kind, one.pairs_lost, one.offset) == (kind, 2 if fault == "one of several" else 1, 2048 + 512)
    assert re.search(message, one.detail), one.detail
    assert "\n" not in one.detail


def test_a_lost_sample_counts_its_queries(tmp_path: Path) -> None:
    found = scan(tmp_path, [("k.json", as_json(query=["a", "b", "c"])), ("k.png", b"")])
    assert [fault.pairs_lost for fault in found.faults] == [3]
    found = scan(tmp_path, [("k.json", as_json(query=[*"abcde", ""])), PAGE])
    assert [(fault.kind, fault.pairs_lost) for fault in found.faults] == [("bad_query", 6)]
    sample = [("k.query.txt", b"q"), PAGE]
    found = scan(tmp_path, [member for number in range(5) for member in (*sample, (f"l{number}.png", image_bytes(2)))])
    assert ("split_sample", 5) in [(fault.kind, fault.pairs_lost) for fault in found.faults]


def test_members_of_a_sample_stand_together(tmp_path: Path) -> None:
    page, other = ("k.png", image_bytes(1)), pair_members("l", "q", 2)
    found = scan(tmp_path, [QUERY, *other, page])
    (fault,) = found.faults
    assert fault.kind == "split_sample" and "'k' is used at byte 512 and again at byte 3584" in fault.detail
    assert list(found.columns["pair_key"]) == ["l"]
    found = scan(tmp_path, [QUERY, page, *other, QUERY, page])
    assert [(fault.kind, fault.pairs_lost) for fault in found.faults] == [("split_sample", 2)]
    found = scan(tmp_path, [page, *other, page], corpus=True)
    assert [fault.kind for fault in found.faults] == ["split_sample"]
    assert list(found.columns["corpus_key"]) == ["l"]


def test_a_json_without_query_beside_a_query_txt_is_fine(tmp_path: Path) -> None:
    members = [("k.json", as_json(source="x")), ("k.query.txt", b"q"), PAGE]
    assert index_members(tmp_path, members).query_hash_N.tolist() == [hash_query("q")]


def kinds(found: ShardScan) -> list[str]:
    return [fault.kind for fault in found.faults]


def break_header(path: Path, name: str, occurrence: int = 0) -> None:
    data = bytearray(path.read_bytes())
    place = -1
    for _ in range(occurrence + 1):
        place = data.index(name.encode(), place + 1)
    data[place] ^= 1
    path.write_bytes(data)


def test_neighbours_of_a_break_are_left_out(tmp_path: Path) -> None:
    members = [member for number in range(5) for member in pair_members(f"k{number}", "q", number, [number + 10])]
    path = write_tar(tmp_path / "a.tar", members)
    break_header(path, "k2.json")
    found = scanned(path)
    assert list(found.columns["pair_key"]) == ["k0", "k3", "k4"]
    assert sorted(kinds(found)) == ["damaged_header", "next_to_damage", "next_to_damage"]
    path = write_tar(tmp_path / "a.tar", members)
    break_header(path, "k2.neg0.png")
    assert list(scanned(path).columns["pair_key"]) == ["k0", "k1", "k4"]


@pytest.mark.parametrize(
    ("key", "tar_format"),
    [
        ("k", tarfile.USTAR_FORMAT),
        ("k" * 120, tarfile.GNU_FORMAT),
        ("k" * 120, tarfile.PAX_FORMAT),
        ("schöne seite", tarfile.PAX_FORMAT),  # its own header says sch?ne seite
    ],
)
def test_a_member_under_half_its_name_takes_its_sample_along(tmp_path: Path, key: str, tar_format: int) -> None:
    """The header of a long name is lost, and the first member of a sample comes under what its own header holds."""
    sample = [(f"{key}.neg0.png", image_bytes(3)), *pair_members(key, "q", 1)]
    members = [*pair_members("a", "q", 1), *sample, *pair_members("z", "q", 2)]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    data = bytearray(path.read_bytes())
    data[2048 + 10] ^= 1  # the header behind the first pair
    path.write_bytes(data)
    assert list(scanned(path).columns["pair_key"]) == ["z"]


def test_a_name_that_is_not_utf8_is_a_break(tmp_path: Path) -> None:
    members = [*pair_members("a", "q", 1), ("?.png", image_bytes(3)), *pair_members("b", "q", 2)]
    members += pair_members("c", "q", 3)
    path = write_tar(tmp_path / "a.tar", members)
    data = path.read_bytes()
    old = data[2048 : 2048 + 512]
    new = bytearray(b"\xe9" + old[1:])
    new[148:156] = b"%06o\0 " % (int(old[148:154], 8) + 0xE9 - ord("?"))
    path.write_bytes(data.replace(old, bytes(new)))
    found = scanned(path)
    assert sorted(kinds(found)) == ["bad_name", "next_to_damage", "next_to_damage"]
    assert list(found.columns["pair_key"]) == ["c"]


def test_what_stands_behind_the_end_is_counted(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", [*pair_members("a", "q", 1), *pair_members("b", "q", 1)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + one)
    found = scanned(tmp_path / "a.tar")
    assert list(found.columns["pair_key"]) == ["a"]
    assert [(fault.kind, fault.pairs_lost) for fault in found.faults] == [("next_to_damage", 1), ("bytes_after_end", 2)]
    corpus = scanned(tmp_path / "a.tar", corpus=True)
    assert sum(fault.pairs_lost for fault in corpus.faults) == 0 and "bytes_after_end" in kinds(corpus)


def test_a_link_costs_its_sample_only(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*GOOD[0], QUERY])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("k.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = scanned(path)
    assert list(found.columns["pair_key"]) == ["before"]
    assert kinds(found) == ["not_a_file"] and found.faults[0].pairs_lost == 1
