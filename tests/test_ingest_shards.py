"""Shards are written whole, the same each time, and split without a document or query on both sides."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from tar_makers import image_bytes, index_of, members_of

from farnear.data.sample import hash_bytes
from farnear.errors import UserError
from farnear.ingest.images import PageFile
from farnear.ingest.pool import map_in_order
from farnear.ingest.shards import (
    CorpusPage,
    Pair,
    Reference,
    Sample,
    import_pairs,
    key_for,
    write_prefixes,
    write_shards,
)
from farnear.ingest.split import Record, split


def a_pair(number: int) -> Pair:
    return Pair(f"k{number:03d}", f"Qüery {number}", image_bytes(number), "png", f"doc {number}")


def a_record(document: int, query: str) -> Record:
    return Record(f"{document}-{query}".replace(".", ""), query, f"d{document}")


def square_and_pid(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def refuse_three(number: int) -> int:
    if number == 3:
        raise UserError("three is refused")
    return number


def test_shards_hold_every_pair_in_order_as_it_was(tmp_path: Path) -> None:
    shards = write_shards(map(a_pair, range(5)), tmp_path / "new", prefix="train", pairs_per_shard=2)
    assert [shard.name for shard in shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [shard.name for shard in shards]
    last = members_of([shards[2]])
    assert list(last) == ["k004.json", "k004.png"]
    assert json.loads(last["k004.json"]) == {"query": "Qüery 4", "document": "doc 4"}
    assert last["k004.png"] == image_bytes(4)


def test_a_sample_has_the_members_of_its_kind(tmp_path: Path) -> None:
    wrong = (PageFile(image_bytes(1, "WEBP"), "webp"), PageFile("größer".encode(), "txt"))
    samples = [
        Pair("a", ("first", "second"), b"a text", "txt", "doc", wrong),
        Reference("b", "query", "p1", "doc", ("p2", "p3")),
        CorpusPage("p1", image_bytes(0), "png", {"document": "doc", "page": 1}),
        CorpusPage("p2", image_bytes(2), "png"),
    ]
    [shard] = write_shards(samples, tmp_path, prefix="all")
    members = members_of([shard])
    texts = {name: json.loads(members.pop(name)) for name in list(members) if name.endswith("json")}
    assert texts == {
        "a.json": {"query": ["first", "second"], "document": "doc"},
        "b.json": {"query": "query", "pos_id": "p1", "neg_ids": ["p2", "p3"], "document": "doc"},
        "p1.about.json": {"document": "doc", "page": 1},
    }
    assert members == {
        "a.txt": b"a text",
        "a.neg0.webp": image_bytes(1, "WEBP"),
        "a.neg1.txt": "größer".encode(),
        "p1.png": image_bytes(0),
        "p2.png": image_bytes(2),
    }
    read = {
        f"{sample['__key__']}.{extension}": data
        for sample in webdataset.WebDataset([str(shard)], shardshuffle=False)
        for extension, data in sample.items()
        if not extension.startswith("__")
    }
    assert read == members_of([shard])


def test_the_index_reads_what_was_written(tmp_path: Path) -> None:
    index = index_of(write_shards(map(a_pair, range(7)), tmp_path, prefix="train", pairs_per_shard=3))
    assert len(index) == 7
    assert index.ignored_members == 0 and index.faults == ()


def test_the_index_finds_the_same_inline_and_by_reference(tmp_path: Path) -> None:
    pages = [image_bytes(number) for number in range(4)]
    inline = [
        Pair(f"k{n}", f"query {n}", pages[n], "png", "doc", (PageFile(pages[n + 1], "png"), PageFile(pages[0], "png")))
        for n in (1, 2)
    ]
    by_reference = [Reference(f"k{n}", f"query {n}", f"p{n}", "doc", (f"p{n + 1}", "p0")) for n in (1, 2)]
    corpus = [CorpusPage(f"p{n}", page, "png") for n, page in enumerate(pages)]
    first = index_of(write_shards(inline, tmp_path / "a", prefix="train"))
    stored = write_shards(corpus, tmp_path / "b", prefix="corpus")
    second = index_of(write_shards(by_reference, tmp_path / "b", prefix="train"), corpus=stored)
    for index in (first, second):
        assert index.faults == () and index.ignored_members == 0
        assert index.input_hash_I[index.positives].tolist() == [hash_bytes(pages[n]) for n in (1, 2)]
        expected = [hash_bytes(pages[n]) for n in (2, 0, 3, 0)]
        assert index.input_hash_I[index.negatives].tolist() == expected
    assert first.query_hash_N.tolist() == second.query_hash_N.tolist()


def test_equal_pairs_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_shards(map(a_pair, range(3)), tmp_path / name, prefix="train") for name in "ab")
    assert first[0].read_bytes() == second[0].read_bytes()


def test_pairs_are_not_held_in_memory(tmp_path: Path) -> None:
    stream = map(a_pair, range(4))
    sizes: list[int] = []

    def watched() -> Iterator[Pair]:
        for pair in stream:
            sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.tar")))
            yield pair

    write_shards(watched(), tmp_path, prefix="train", pairs_per_shard=1)
    assert sizes[-1] > sizes[1] > 0


def test_an_import_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Pair]:
        yield a_pair(0)
        yield a_pair(1)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_prefixes({"train": map(a_pair, range(2)), "eval": failing()}, tmp_path, pairs_per_shard=1)
    assert list(tmp_path.iterdir()) == []


def test_old_shards_are_never_mixed_with_new_ones(tmp_path: Path) -> None:
    write_shards([a_pair(0)], tmp_path, prefix="train")
    before = (tmp_path / "train-000000.tar").read_bytes()
    with pytest.raises(UserError, match=r"already holds 1 shard named train-\*\.tar.*another folder"):
        write_shards([a_pair(1)], tmp_path, prefix="train")
    assert (tmp_path / "train-000000.tar").read_bytes() == before
    write_shards([a_pair(1)], tmp_path, prefix="eval")


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([a_pair(0), a_pair(0)], "comes twice in train-000000.tar"),
        ([Pair("a.b", "q", b"x", "png", "d")], "holds a dot"),
        ([Pair("a", " ", b"x", "png", "d")], "empty query"),
        ([Pair("a", "q", b"x", "gif", "d")], "'gif'.*use one of png, jpg"),
        ([Pair("a", "q", b"x", "png", "d", (PageFile(b"x", "tiff"),))], "'tiff'.*use one of png, jpg"),
        ([Pair("a", "q", b"", "png", "d")], "empty member png"),
        ([Pair("a", ("q", ""), b"x", "png", "d")], "empty query"),
        ([Pair("a", (), b"x", "png", "d")], "empty query"),
        ([Reference("a", " ", "p", "d")], "empty query"),
    ],
)
def test_a_pair_that_cannot_be_read_back_is_refused(pairs: list[Sample], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        write_shards(pairs, tmp_path, prefix="train")


def test_a_file_is_not_a_folder_for_shards(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file"):
        write_shards([a_pair(0)], tmp_path / "out", prefix="train")


def test_key_for_has_no_characters_that_cut_a_key() -> None:
    assert key_for(12, "Annual report.v2/é") == "000012-Annual-report-v2-"


def test_split_keeps_documents_and_queries_on_one_side() -> None:
    # 60 documents of 5 pages; every tenth query is shared with the next document, in another spelling.
    records = [a_record(row // 5, f"query {row}") for row in range(300)]
    records += [a_record(document, f"  QUERY   {5 * document + 5} ") for document in range(0, 58, 10)]
    train, evaluation = split(records, 0.2, seed=0)
    assert sorted(train + evaluation) == list(range(len(records)))
    assert train == sorted(train) and evaluation == sorted(evaluation)
    for of in (lambda record: record.document, lambda record: " ".join(record.query.split()).casefold()):
        assert not {of(records[row]) for row in train} & {of(records[row]) for row in evaluation}
    assert abs(len(evaluation) - 0.2 * len(records)) <= 5


def test_each_of_several_queries_ties_pages_together() -> None:
    records = [Record(str(row), (f"own {row}", f"Shared {row // 2}"), f"d{row}") for row in range(40)]
    _, evaluation = split(records, 0.25, seed=0)
    assert len(evaluation) == 10
    assert all(row ^ 1 in evaluation for row in evaluation)


def test_split_depends_on_the_seed_alone() -> None:
    records = [a_record(row, f"query {row}") for row in range(200)]
    assert split(records, 0.1, seed=1) == split(records, 0.1, seed=1)
    assert split(records, 0.1, seed=1) != split(records, 0.1, seed=2)
    # Rows in another order: the same documents on the same sides.
    chosen = {records[row].document for row in split(records, 0.1, seed=1)[1]}
    assert {records[::-1][row].document for row in split(records[::-1], 0.1, seed=1)[1]} == chosen


def test_split_without_evaluation_keeps_everything() -> None:
    assert split([a_record(0, "a"), a_record(0, "b")], 0, seed=0) == ([0, 1], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_split_refuses_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(UserError, match="leaves nothing to train on"):
        split([a_record(0, "a")], fraction, seed=0)


def test_split_refuses_pairs_that_hang_together() -> None:
    chain_of_pairs = [a_record(row // 2, f"query {(row + 1) // 2}") for row in range(10)]
    with pytest.raises(UserError, match="all of them hang together through shared documents or queries"):
        split(chain_of_pairs, 0.1, seed=0)


def test_split_names_a_fraction_that_works_when_groups_are_large() -> None:
    records = [a_record(row // 25, f"query {row}") for row in range(100)]
    with pytest.raises(UserError, match=r"hold 25, 25, 25, 25 pairs.*ask for a fraction of 0\.25"):
        split(records, 0.1, seed=0)
    assert len(split(records, 0.25, seed=0)[1]) == 25


@pytest.mark.parametrize("seed", range(8))
def test_split_always_leaves_something_to_train_on(seed: int) -> None:
    records = [a_record(0, "a"), *(a_record(1, f"query {row}") for row in range(9))]
    try:
        train, evaluation = split(records, 0.9, seed)
    except UserError as error:
        assert "import the evaluation pairs by themselves" in str(error)
    else:
        assert len(train) == 1 and len(evaluation) == 9


def test_import_pairs_reports_what_it_wrote(tmp_path: Path) -> None:
    records = [Record(f"k{row}", f"query {row}", f"d{row}") for row in range(10)]

    def load(some: list[Record]) -> Iterator[Pair]:
        return (Pair(record.key, record.query, b"image", "png", record.document) for record in some)

    report = import_pairs(
        records, load, tmp_path, eval_fraction=0.2, seed=0, pairs_per_shard=5, skipped=["page 3: blank"]
    )
    assert (report.train_pairs, report.eval_pairs, report.skipped) == (8, 2, ("page 3: blank",))
    assert [path.name for path in report.train_shards] == ["train-000000.tar", "train-000001.tar"]
    assert [path.name for path in report.eval_shards] == ["eval-000000.tar"]
    assert len(members_of(report.train_shards)) == 16
    assert len(members_of(report.eval_shards[:1])) == 4


def test_processes_keep_the_order_and_read_few_items_ahead() -> None:
    items_read = io.StringIO()

    def items() -> Iterator[int]:
        for number in range(40):
            items_read.write(".")
            yield number

    results = map_in_order(square_and_pid, items(), processes=2)
    first = next(results)
    assert len(items_read.getvalue()) <= 6
    everything = [first, *results]
    assert [square for square, _ in everything] == [number * number for number in range(40)]
    assert os.getpid() not in {pid for _, pid in everything}


def test_an_error_in_a_process_comes_out_as_it_is() -> None:
    with pytest.raises(UserError, match="three is refused"):
        list(map_in_order(refuse_three, range(6), processes=2))
