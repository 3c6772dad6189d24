"""Shards are written whole, the same each time, and split without a document or query on both sides."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tar_makers import image_bytes

from farnear.data.index import build_index
from farnear.errors import UserError
from farnear.ingest.pool import map_in_order
from farnear.ingest.shards import Pair, Record, import_pairs, key_for, split, write_prefixes, write_shards


def a_pair(number: int) -> Pair:
    return Pair(f"k{number:03d}", f"Qüery {number}", image_bytes(number), "png", f"doc {number}")


def a_record(document: int, query: str) -> Record:
    return Record(f"{document}-{query}".replace(".", ""), query, f"d{document}")


def members_of(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


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
    last = members_of(shards[2])
    assert list(last) == ["k004.json", "k004.png"]
    assert json.loads(last["k004.json"]) == {"query": "Qüery 4", "document": "doc 4"}
    assert last["k004.png"] == image_bytes(4)


def test_the_index_reads_what_was_written(tmp_path: Path) -> None:
    index = build_index(write_shards(map(a_pair, range(7)), tmp_path, prefix="train", pairs_per_shard=3))
    assert len(index) == 7
    assert index.ignored_members == 0


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
    with pytest.raises(UserError, match=r"already holds 1 shards named train-\*\.tar.*another folder"):
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
    ],
)
def test_a_pair_that_cannot_be_read_back_is_refused(pairs: list[Pair], words: str, tmp_path: Path) -> None:
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
    assert sum(len(members_of(shard)) for shard in report.train_shards) == 16
    assert len(members_of(report.eval_shards[0])) == 4


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
