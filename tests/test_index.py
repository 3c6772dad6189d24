"""The index: scans laid end to end, pages found by their keys, what is left out, and the file it is kept in."""

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tar_makers import Members, image_bytes, index_of, pair_members, scanned, write_pairs, write_tar

from farnear.data import index as index_module
from farnear.data.faults import fault_table
from farnear.data.index import Index, open_index, write_index
from farnear.data.join import Source, join_scans
from farnear.data.sample import hash_bytes
from farnear.data.shard_names import expand_shards
from farnear.errors import UserError


def reference(key: str, **record: Any) -> tuple[str, bytes]:
    return f"{key}.json", json.dumps({"query": f"query of {key}", **record}).encode()


def page_hashes(index: Index, rows: np.ndarray) -> list[int]:
    return index.input_hash_I[rows].tolist()


def hashes(*pages: int) -> list[int]:
    return [hash_bytes(image_bytes(page)) for page in pages]


CORPUS: Members = [(f"doc{number}.png", image_bytes(number)) for number in range(6)]


def referenced(path: Path, *members: tuple[str, bytes], corpus: Members = CORPUS, **keys: Any) -> Index:
    return index_of([write_tar(path / "a.tar", list(members))], corpus=[write_tar(path / "corpus.tar", corpus)], **keys)


def test_pairs_name_pages_of_corpus_shards(tmp_path: Path) -> None:
    index = referenced(
        tmp_path,
        reference("one", pos_id="doc1", neg_ids=["doc3", "doc2", "doc3"]),
        reference("several", pos_ids=["doc4", "./doc1"], neg_ids=None),
        reference("both", pos_id="doc0", pos_ids=["doc5", "doc0"]),
        reference("with_own", pos_id="doc2", neg_ids="doc0"),
        ("with_own.png", image_bytes(9)),
        ("with_own.neg4.png", image_bytes(8)),
    )
    assert not index.faults
    assert list(index.pair_key) == ["one", "several", "both", "with_own"]
    positives = [page_hashes(index, index.positives_of(pair)) for pair in range(4)]
    assert positives == [hashes(1), hashes(4, 1), hashes(0, 5), hashes(9, 2)]
    negatives = [page_hashes(index, index.negatives_of(pair)) for pair in range(4)]
    assert negatives == [hashes(3, 2), [], [], hashes(8, 0)]
    # A page is stored once: both pairs have the same row.
    assert index.positives_of(0)[0] == index.positives_of(1)[1]
    assert page_hashes(index, index.corpus_C) == hashes(*range(6))
    assert [index.shard_name(shard) for shard in index.pair_shard_N] == ["a.tar"] * 4


def test_the_same_page_inline_and_by_reference_is_one_page(tmp_path: Path) -> None:
    index = referenced(tmp_path, reference("k", pos_id="doc1"), ("k.png", image_bytes(1)))
    assert page_hashes(index, index.positives_of(0)) == hashes(1, 1)
    assert index.positive_hashes_of_query(0).tolist() == hashes(1)


def test_a_missing_page_is_a_fault_and_costs_what_needs_it(tmp_path: Path) -> None:
    index = referenced(
        tmp_path,
        reference("whole", pos_id="doc1"),
        reference("less", pos_ids=["doc1", "gone"], neg_ids=["doc2", "gone", "lost"]),
        reference("lost", pos_id="gone"),
        reference("list", query=["a", "b"], pos_id="gone"),
    )
    assert list(index.pair_key) == ["whole", "less"]
    assert page_hashes(index, index.positives_of(1)) == hashes(1)
    assert page_hashes(index, index.negatives_of(1)) == hashes(2)
    (fault,) = index.faults
    assert (fault.kind, fault.pairs_lost, Path(fault.shard).name) == ("missing_page", 3, "a.tar")
    assert "4 pairs name 6 pages that stand in no corpus shard, 'gone' of 'lost' for one" in fault.detail
    assert "name the corpus shards" not in fault.detail


def test_pairs_without_any_corpus(tmp_path: Path) -> None:
    index = index_of([write_tar(tmp_path / "a.tar", [*pair_members("k", "q", 1), reference("l", pos_id="k")])])
    assert list(index.pair_key) == ["k"]
    assert [(fault.kind, fault.pairs_lost) for fault in index.faults] == [("missing_page", 1)]
    assert "'k' of 'l' for one" in index.faults[0].detail and "name the corpus shards" in index.faults[0].detail


def test_a_page_that_stands_twice_cannot_be_named(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "c0.tar", CORPUS[:3])
    second = write_tar(tmp_path / "c1.tar", CORPUS[2:])
    fine = write_tar(tmp_path / "a.tar", [reference("k", pos_id="doc1")])
    assert len(index_of([fine], corpus=[first, second])) == 1
    unclear = write_tar(tmp_path / "b.tar", [reference("k", pos_id="doc1", neg_ids=["doc2"])])
    with pytest.raises(UserError, match="the page 'doc2' stands in the corpus shards twice"):
        index_of([unclear], corpus=[first, second])


def test_a_shard_of_pairs_can_be_the_corpus_of_its_own_pairs(tmp_path: Path) -> None:
    members = [*pair_members("k", "q", 1, [5]), reference("l", pos_id="k", neg_ids=["k.neg0"])]
    path = write_tar(tmp_path / "a.tar", members)
    index = index_of([path], corpus=[path])
    assert not index.faults and list(index.pair_key) == ["k", "l"]
    assert [index.input_id(row) for row in index.query_N] == ["a.tar/k.json", "a.tar/l.json"]
    assert [index.input_id(row) for row in index.positives_of(0)] == ["a.tar/k.png"]
    assert page_hashes(index, index.positives_of(1)) == hashes(1)
    assert page_hashes(index, index.negatives_of(1)) == hashes(5)
    assert page_hashes(index, index.corpus_C) == hashes(1, 5)


def test_hard_negatives_of_a_corpus_are_documents_of_their_own(tmp_path: Path) -> None:
    corpus = [*CORPUS, ("doc9.neg0.png", image_bytes(9)), ("doc9.png", image_bytes(8))]
    index = referenced(tmp_path, reference("k", pos_id="doc9", neg_ids=["doc9.neg0"]), corpus=corpus)
    assert page_hashes(index, index.positives_of(0)) == hashes(8)
    assert page_hashes(index, index.negatives_of(0)) == hashes(9)


LARGE = image_bytes(7, "PNG", (100, 60))


def large_faults(index: Index) -> list[tuple[str, int]]:
    return [(fault.detail.split()[0], fault.pairs_lost) for fault in index.faults if fault.kind == "too_many_pixels"]


def test_images_with_too_many_pixels_are_not_used(tmp_path: Path) -> None:
    members = [
        *pair_members("fine", "q", 1),
        ("inline.json", b'{"query": ["a", "b"]}'),
        ("inline.png", LARGE),
        ("ask.txt", b"the page"),
        ("ask.query.png", LARGE),
        *pair_members("negative", "q", 2, [3]),
        ("negative.neg1.png", LARGE),
        reference("named", pos_id="large", neg_ids=["doc1"]),
        reference("another", pos_ids=["doc2", "large"], neg_ids=["large", "doc1"]),
    ]
    corpus = [*CORPUS, ("large.png", LARGE)]
    everything = referenced(tmp_path, *members, corpus=corpus, max_image_pixels=6000)
    assert not everything.faults and len(everything) == 7
    index = referenced(tmp_path, *members, corpus=corpus, max_image_pixels=5999)
    assert list(index.pair_key) == ["fine", "negative", "another"]
    assert page_hashes(index, index.negatives_of(1)) == hashes(3)
    assert page_hashes(index, index.positives_of(2)) == hashes(2)
    assert page_hashes(index, index.negatives_of(2)) == hashes(1)
    assert page_hashes(index, index.corpus_C) == hashes(*range(6))
    assert sorted(large_faults(index)) == [
        ("'ask.query.png'", 1),
        ("'inline.png'", 2),
        ("'large.png'", 1),
        ("'negative.neg1.png'", 0),
    ]
    assert "6,000 pixels, above 5,999" in index.faults[0].detail
    assert index.fingerprint != everything.fingerprint


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    """An image header may say anything: 40,000 x 40,000 pixels in 60 bytes."""
    data = bytearray(image_bytes(1))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    members = [*pair_members("a", "q", 1), ("b.json", b'{"query": "q"}'), ("b.png", bytes(data))]
    index = index_of([write_tar(tmp_path / "a.tar", members)])
    assert list(index.pair_key) == ["a"]
    assert [(fault.kind, fault.pairs_lost) for fault in index.faults] == [("too_many_pixels", 1)]


def test_exclusions(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path, 9, 3)
    first, second, third = map(str, shards)
    whole = index_of(shards)
    exclude = [(first, "k00001"), (third, "k00008"), (third, "k00008")]
    index = index_of(shards, exclude=exclude)
    assert index.excluded == 2 and not index.faults
    assert list(index.pair_key) == [f"k0000{number}" for number in (0, 2, 3, 4, 5, 6, 7)]
    assert index.fingerprint != whole.fingerprint == index_of(shards, exclude=[]).fingerprint
    unknown = index_of(shards, exclude=[(second, "k00001"), ("other.tar", "k"), *exclude])
    assert unknown.excluded == 2 and unknown.fingerprint == index.fingerprint
    assert [(fault.shard, fault.kind, fault.pairs_lost) for fault in unknown.faults] == [
        (second, "unknown_key", 0),
        ("other.tar", "unknown_key", 0),
    ]
    # What is excluded is no fault any more.
    lost = str(tmp_path / "a.tar")
    assert not referenced(tmp_path, reference("k", pos_id="gone"), exclude=[(lost, "k")]).faults


def test_two_shards_that_are_called_alike_are_told_apart(tmp_path: Path) -> None:
    shards, others = write_pairs(tmp_path / "a", 9, 3), write_pairs(tmp_path / "b", 9, 3)
    both = index_of(shards, others)
    assert both.pair_id(1) == f"{shards[0]}/k00001" and both.pair_id(10) == f"{others[0]}/k00001"
    one = index_of(shards, others, exclude=[(str(others[0]), "k00001")])
    assert one.excluded == 1 and not one.faults and one.source_start_K1.tolist() == [0, 9, 17]


def test_sources_may_use_the_same_keys(tmp_path: Path) -> None:
    first, second = write_pairs(tmp_path / "one", 4, 2), write_pairs(tmp_path / "two", 3, 1)
    index = index_of(first, second)
    assert index.sources == ("s0", "s1")
    assert index.source_start_K1.tolist() == [0, 4, 7]
    assert list(index.pair_key) == [f"k0000{number}" for number in (0, 1, 2, 3, 0, 1, 2)]
    some = index_of(first, second, exclude=[(str(first[1]), "k00003")])
    assert some.source_start_K1.tolist() == [0, 3, 6]


def test_each_source_has_a_corpus_of_its_own(tmp_path: Path) -> None:
    def source(name: str, page: int) -> Source:
        pairs = write_tar(tmp_path / f"{name}.tar", [reference(name, pos_id="doc", neg_ids=["shared"])])
        corpus = write_tar(tmp_path / f"{name}-corpus.tar", [("doc.png", image_bytes(page))])
        return Source(name, (scanned(pairs),), (scanned(corpus, corpus=True),))

    shared = scanned(write_tar(tmp_path / "shared.tar", [("shared.png", image_bytes(3))]), corpus=True)
    index = join_scans([source("one", 1), source("two", 2)], [shared])
    assert not index.faults
    assert [page_hashes(index, index.positives_of(pair)) for pair in (0, 1)] == [hashes(1), hashes(2)]
    assert [page_hashes(index, index.negatives_of(pair)) for pair in (0, 1)] == [hashes(3), hashes(3)]


def test_a_key_in_two_shards_of_a_source_names_both(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", pair_members("b", "q", 1))
    second = write_tar(tmp_path / "b.tar", pair_members("c", "q", 3) + pair_members("b", "q", 4))
    with pytest.raises(UserError, match=r"key 'b' is used in shard .*a\.tar and again in shard .*b\.tar"):
        index_of([first, second])


def test_pages_of_queries_that_ask_alike(tmp_path: Path) -> None:
    members = [
        *pair_members("a", "What is it?", 1),
        *pair_members("b", "other", 2),
        *pair_members("c", "what IS it?", 3),
    ]
    index = index_of([write_tar(tmp_path / "a.tar", members)])
    for pair, pages in ((0, (1, 3)), (1, (2,)), (2, (1, 3))):
        assert set(index.positive_hashes_of_query(pair).tolist()) == set(hashes(*pages))


def columns_of(index: Index) -> dict[str, list[object]]:
    return {name: list(getattr(index, name)) for name in index_module._COLUMNS}


def stored(index: Index, folder: Path) -> Index:
    write_index(index, folder / "index.arrow")
    return open_index(folder / "index.arrow")


def test_file_gives_back_the_index_as_views(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path / "shards", 9, 2, negatives_of_pair=3)
    index = index_of(shards, exclude=[("part-000.tar", "nothing")], etags={str(shards[0]): "tag"})
    opened = stored(index, tmp_path)
    assert columns_of(opened) == columns_of(index)
    for name in index_module._HEADER_FIELDS:
        assert getattr(opened, name) == getattr(index, name), name
    assert opened.etags == ("tag", "") and opened.faults[0].kind == "unknown_key"
    for name in index_module._COLUMNS:
        before, after = getattr(index, name), getattr(opened, name)
        if isinstance(after, np.ndarray):
            assert after.dtype == before.dtype
            assert not after.flags.owndata and not after.flags.writeable
    assert sorted(os.listdir(tmp_path)) == ["index.arrow", "shards"]


def test_mapping_a_big_index_costs_no_memory(tmp_path: Path) -> None:
    index = index_of(write_pairs(tmp_path / "shards", 4, 1))
    write_index(index, tmp_path / "index.arrow")
    before = pa.total_allocated_bytes()
    opened = open_index(tmp_path / "index.arrow")
    assert opened.input_hash_I.sum() == index.input_hash_I.sum()
    assert pa.total_allocated_bytes() == before


def test_a_process_is_sent_the_files_name(tmp_path: Path) -> None:
    index = index_of(write_pairs(tmp_path / "shards", 30, 1))
    opened = stored(index, tmp_path)
    assert len(pickle.dumps(opened)) < 500 < len(pickle.dumps(index))
    for one in (index, opened):
        there = pickle.loads(pickle.dumps(one))
        assert columns_of(there) == columns_of(index) and there.fingerprint == index.fingerprint


def test_a_process_is_sent_an_index_whose_file_was_deleted(tmp_path: Path) -> None:
    index = index_of(write_pairs(tmp_path / "shards", 3, 1))
    opened = stored(index, tmp_path)
    assert opened.path is not None
    opened.path.unlink()
    there = pickle.loads(pickle.dumps(opened))
    assert columns_of(there) == columns_of(index) and there.fingerprint == index.fingerprint


def test_file_of_documents_only(tmp_path: Path) -> None:
    index = index_of(corpus=[write_tar(tmp_path / "a.tar", CORPUS)])
    assert columns_of(stored(index, tmp_path)) == columns_of(index)
    assert len(index) == 0 and len(index.corpus_C) == 6


def test_a_new_file_replaces_the_old_under_an_open_index(tmp_path: Path) -> None:
    old = stored(index_of(write_pairs(tmp_path / "old", 5, 1)), tmp_path)
    new = stored(index_of(write_pairs(tmp_path / "new", 3, 1)), tmp_path)
    assert len(old) == 5 and old.pair_key[4] == "k00004"
    assert len(new) == 3


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.arrow"
    with pytest.raises(UserError, match="does not exist"):
        open_index(path)
    index = index_of(write_pairs(tmp_path / "shards", 2, 1))
    write_index(index, path)
    data = path.read_bytes()
    for torn in (data[:-20], data[: len(data) // 2], b"", bytes(len(data)), b"ARROW1\0\0"):
        path.write_bytes(torn)
        with pytest.raises(UserError, match=r"damaged or not an index.*delete it") as error:
            open_index(path)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(index_module, "FORMAT", "farnear index 1")
    write_index(index, path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="its format is farnear index 1 and not farnear index"):
        open_index(path)
    row = pa.record_batch([[1]], names=["x"])
    with pa.ipc.new_file(str(path), row.schema) as writer:
        writer.write_batch(row)
    with pytest.raises(UserError, match="its format is none"):
        open_index(path)


def test_fingerprint_follows_the_content_and_not_the_folder(tmp_path: Path) -> None:
    shards = write_pairs(tmp_path / "here", 6, 2)
    fingerprint = index_of(shards).fingerprint
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert index_of(sorted((tmp_path / "there").iterdir())).fingerprint == fingerprint
    assert index_of(shards[::-1]).fingerprint != fingerprint
    assert index_of(shards[:1], shards[1:]).fingerprint != fingerprint
    assert index_of(shards, corpus=shards[:1]).fingerprint != fingerprint
    data = shards[0].read_bytes()
    shards[0].write_bytes(data.replace(b"query 1", b"query 7"))
    assert index_of(shards).fingerprint != fingerprint
    shards[0].write_bytes(data + bytes(512))
    assert index_of(shards).fingerprint != fingerprint
    shards[0].write_bytes(data)
    assert index_of(shards).fingerprint == fingerprint


def test_the_table_of_faults(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", pair_members("a", "q", 1) + pair_members("b", "q", 2)).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:3072])
    lines = fault_table(index_of([tmp_path / "a.tar"]).faults).splitlines()
    assert lines[0].split() == ["shard", "offset", "kind", "pairs", "lost", "detail"]
    assert lines[1].split()[:4] == ["a.tar", "2560", "next_to_damage", "1"]
    assert lines[2].split()[:4] == ["a.tar", "3072", "cut_short", "unknown"]


def test_expand_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b-000.tar", "b-001.tar", "a.tar", "[odd].tar"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def names(*patterns: str) -> list[str]:
        return [os.path.basename(shard) for shard in expand_shards(patterns, "train shards")]

    assert names("b-{000..001}.tar", str(tmp_path / "a.tar")) == ["b-000.tar", "b-001.tar", "a.tar"]
    assert names("~/b-*.tar") == ["b-000.tar", "b-001.tar"]
    assert names("[odd].tar") == ["[odd].tar"]
    assert expand_shards(["a.tar"], "train shards") == [str(tmp_path / "a.tar")]
    assert expand_shards([f"file://{tmp_path}/b-*.tar"], "x") == expand_shards(["b-*.tar"], "x")
    assert expand_shards(["https://host/a-{0..1}.tar"], "x") == ["https://host/a-0.tar", "https://host/a-1.tar"]
    for patterns, message in [
        ([], "train shards: no shard is named"),
        (["c-*.tar"], r"train shards: 'c-\*.tar' matches no file"),
        (["c.tar"], "train shards: .*c.tar does not exist"),
        (["b-{000..002}.tar"], "b-002.tar does not exist"),
        (["b-{000.tar"], "braces"),
        ([str(tmp_path)], "is a folder"),
        (["https://me:secret@[::1/x.tar?key=1"], r"^https://\[::1/x.tar is no url"),
        (["*.tar", "a.tar"], "a.tar is named twice"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            expand_shards(patterns, "train shards")
        assert "\n" not in str(error.value)
