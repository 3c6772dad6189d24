"""Hard negatives of shards and of files: names, joins, what is left out, and that no answer is ever among them."""

import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mined_shards import PAGES, answers, page_tokens, pairs_strategy, write_shards
from tar_makers import image_bytes, index_of, number_of_image, pair_members, write_pairs, write_tar
from tiny_runs import make_inputs, run_config

from farnear.data.dealing import SIDES, Dealing
from farnear.data.document_names import DocumentNames, shard_names
from farnear.data.index import Index, open_index, write_index
from farnear.data.negatives import AnswersOfQueries, Negatives, first_of_content
from farnear.data.negatives_file import read_negatives
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.read import InputReader
from farnear.errors import UserError
from farnear.parallel.world import World
from farnear.training.shards import open_data

from tar_makers import STORE  # isort: skip


def contents(index: Index, rows: Any) -> list[int]:
    reader = InputReader(index, STORE)
    return [number_of_image(reader[int(row)]) for row in rows]


def write(path: Path, lines: list[dict[str, Any]], head: bool = True) -> str:
    heads = [{"format": "farnear negatives 1", "model": "m"}] if head else []
    path.write_text("".join(json.dumps(line) + "\n" for line in [*heads, *lines]))
    return str(path)


@settings(deadline=None, max_examples=60)
@given(pairs=pairs_strategy(), named=st.lists(st.lists(st.integers(0, 2 * PAGES - 1), max_size=6), min_size=7))
def test_no_negative_is_an_answer_of_its_query(pairs: Any, named: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        index = write_shards(Path(folder), pairs)
        lines = [
            {"shard": "pairs.tar", "key": f"k{pair}", "neg_ids": [f"p{key}" for key in named[pair]]}
            for pair in range(len(pairs))
        ]
        read = read_negatives([write(Path(folder, "n.jsonl"), lines)], index, 1.0)
        for negatives, wanted in ((read, named), (Negatives.of_index(index), [pair[4] for pair in pairs])):
            for pair in range(len(pairs)):
                found = contents(index, negatives.of(pair))
                right = answers(pairs, pair)
                assert not set(found) & right
                # All that is no answer is there, and in a file's lists once.
                expected = [key % PAGES for key in wanted[pair] if key % PAGES not in right]
                if negatives is read:
                    expected = list(dict.fromkeys(expected))
                    assert found == expected
                else:
                    assert set(found) == set(expected)
                hashes = set(index.positive_hashes_of_query(pair).tolist())
                assert not hashes & set(index.input_hash_I[negatives.of(pair)].tolist())


def test_documents_go_by_key_or_by_place(tmp_path: Path) -> None:
    pairs = write_tar(tmp_path / "pairs.tar", pair_members("a", "one", 1, [2, 3]))
    corpus = write_tar(
        tmp_path / "corpus.tar", [("./x.d/p0.png", image_bytes(0)), ("q.txt", b"hello"), ("q.png", image_bytes(9))]
    )
    index = index_of([pairs], corpus=[corpus, pairs])
    names = DocumentNames(index)
    found = list(names.names(names.row_R))
    assert {"x.d/p0", "q", "a", "a.neg0", "a.neg1", "pairs.tar/a.png", "pairs.tar/a.neg1.png"} <= set(found)
    assert names.rows(pa.array(found, pa.large_string())).tolist() == names.row_R.tolist()
    assert names.rows(pa.array(["corpus.tar/./x.d/p0.png", "nothing"], pa.large_string())).tolist() == [
        names.rows(pa.array(["x.d/p0"], pa.large_string()))[0],
        -1,
    ]
    assert shard_names(index) == [index.shard_name(shard) for shard in range(len(index.shards))]


def test_a_key_in_two_corpora_gives_way_to_the_place(tmp_path: Path) -> None:
    shards, corpora = [], []
    for name in "ab":
        (tmp_path / name).mkdir()
        record = json.dumps({"query": name, "pos_id": "p"}).encode()
        shards.append(write_tar(tmp_path / f"{name}.tar", [(f"{name}.json", record)]))
        corpora.append(write_tar(tmp_path / name / "corpus.tar", [("p.png", image_bytes(ord(name)))]))
    from tar_makers import scanned

    from farnear.data.join import Source, join_scans

    index = join_scans([
        Source(str(corpus), (scanned(shard),), (scanned(corpus, corpus=True),))
        for shard, corpus in zip(shards, corpora, strict=True)
    ])  # fmt: skip
    names = DocumentNames(index)
    # Shards with one name are told by their paths.
    assert list(names.names(index.positives)) == [f"{corpus}/p.png" for corpus in corpora]
    assert names.rows(names.names(index.positives).column).tolist() == index.positives.tolist()


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Six pairs; pair 3 has two positives."""
    pairs: list[Any] = [(number, 0, number, [], []) for number in range(3)] + [(3, 0, 3, [4], [])]
    write_index(write_shards(tmp_path, pairs), tmp_path / "index.arrow")
    return open_index(tmp_path / "index.arrow")


def test_scores_stay_with_their_pages(index: Index, tmp_path: Path) -> None:
    lines = [
        {"shard": "pairs.tar", "key": "k3", "neg_ids": ["p3", "p5", "p6", "p13"], "neg_similarity": [4, 3, 2, 1],
         "neg_teacher": [0.5, -1.5, None, 7], "pos_similarity": [0.9, 0.8], "pos_teacher": [2.5, 1.5]},
        {"shard": index.shards[0], "key": "k1", "neg_ids": ["p7"]},
        {"shard": "pairs.tar", "key": "k0", "neg_ids": []},
    ]  # fmt: skip
    found = read_negatives([write(tmp_path / "n.jsonl", lines, head=False)], index, 0.0)
    assert found.counts().tolist() == [0, 1, 0, 2]
    assert contents(index, found.of(3)) == [5, 6]
    np.testing.assert_array_equal(found.similarity, np.array([np.nan, 3, 2], np.float32))
    np.testing.assert_array_equal(found.teacher, np.array([np.nan, -1.5, np.nan], np.float32))
    np.testing.assert_array_equal(found.positive_teacher, np.array([np.nan] * 3 + [2.5, 1.5], np.float32))
    assert found.counts(1).tolist() == [0, 1, 0, 1]
    again = read_negatives([str(tmp_path / "n.jsonl")], index, 0.0)
    assert again.rows.tolist() == found.rows.tolist()
    assert not again.rows.flags.writeable, "mapped from what the first reading kept"
    write(tmp_path / "n.jsonl", lines[1:])
    assert read_negatives([str(tmp_path / "n.jsonl")], index, 0.0).counts().tolist() == [0, 1, 0, 0]


def test_lists_of_several_files_join(index: Index, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{number}.jsonl", [{"shard": "pairs.tar", "key": "k0", "neg_ids": ids}])
        for number, ids in enumerate((["p1", "p2"], ["p9", "p3"]))
    ]
    assert contents(index, read_negatives(paths, index, 0.0).of(0)) == [1, 2, 3]


def test_what_is_of_no_use_is_counted_and_too_much_of_it_refused(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(key: str, *ids: str, **more: Any) -> dict[str, Any]:
        return {"shard": "pairs.tar", "key": key, "neg_ids": list(ids), **more}

    path = write(
        tmp_path / "n.jsonl",
        [
            line("k0", "p0", "p1", "p9", "nowhere"),
            line("k1", "p2", neg_similarity=[1, 2]),
            line("k9", "p2"),
            line("k3", "p5", pos_teacher=[1]),
            line("k2", "nowhere"),
        ],
    )
    found = read_negatives([path], index, 0.9, tell=True)
    assert found.counts().tolist() == [1, 0, 0, 0]
    told = capsys.readouterr().out
    for words in (
        "1 line of pairs that are none of this run",
        "2 lines whose lists do not fit",
        "2 negatives that no document is called",
        "1 negative among their query's answers",
        "1 negative with the content of one before",
    ):
        assert words in told
    assert told.count("\n") == 1
    with pytest.raises(UserError, match=r"4 of 5 lines are of no use, above data.max_bad_fraction \(0.5\)"):
        read_negatives([path], index, 0.5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("not json\n", "holds no hard negatives \\("),
        ('{"shard": "pairs.tar"}\n', 'no "shard" or no "key"'),
        ('{"format": "farnear negatives 9"}\n', "'farnear negatives 9'"),
        ('{"shard": "pairs.tar", "key": "k0", "neg_ids": "p1"}\n', "holds no hard negatives \\("),
        ("", "holds no hard negatives"),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(index: Index, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "n.jsonl").write_text(text)
    with pytest.raises(UserError, match=why) as refused:
        read_negatives([str(tmp_path / "n.jsonl")], index, 1.0)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_negatives([str(tmp_path / "missing.jsonl")], index, 1.0)


def test_reads_a_hundred_thousand_negatives_at_once(tmp_path: Path) -> None:
    index = index_of(write_pairs(tmp_path, 4000, 2))
    generator = np.random.default_rng(0)
    lines = []
    for pair in range(4000):
        drawn = generator.integers(4000, size=25).tolist()
        ids = [f"part-{page * 2 // 4000:03d}.tar/k{page:05d}.png" for page in drawn]
        shard = f"part-{pair * 2 // 4000:03d}.tar"
        lines.append({"shard": shard, "key": f"k{pair:05d}", "neg_ids": ids, "neg_similarity": drawn})
    path = write(tmp_path / "n.jsonl", lines)
    started = perf_counter()
    found = read_negatives([path], index, 0.0)
    assert perf_counter() - started < 2.0
    for pair in (0, 1777, 3999):
        expected = [int(page) for page in dict.fromkeys(lines[pair]["neg_similarity"]) if page != pair]
        own = slice(found.start_N1[pair], found.start_N1[pair + 1])
        assert found.similarity[own].tolist() == expected
        assert found.of(pair).tolist() == [int(index.positives_of(page)[0]) for page in expected]


def test_answers_are_those_of_the_index(tmp_path: Path) -> None:
    pairs: Any = [(0, 0, 1, [2], []), (0, 1, 3, [], []), (1, 0, 1, [12], []), (2, 2, None, [0, 8], [])]
    index = write_shards(tmp_path, pairs)
    table = AnswersOfQueries(index)
    documents = np.unique(np.concatenate([index.positives, index.corpus_C]))
    for pair in range(len(index)):
        expected = np.isin(index.input_hash_I[documents], index.positive_hashes_of_query(pair))
        assert table.answers(np.full(len(documents), pair), documents).tolist() == expected.tolist()
    assert table.counts().tolist() == [3, 3, 2, 1]
    assert first_of_content(np.array([1, 0, 1, 1]), np.array([5, 5, 5, 6])).tolist() == [True, True, False, True]


def test_dealing_takes_them_and_the_order_stays(index: Index, tmp_path: Path) -> None:
    path = write(tmp_path / "n.jsonl", [{"shard": "pairs.tar", "key": "k1", "neg_ids": ["p6", "p7"]}])
    negatives = read_negatives([path], index, 0.0)
    order = Order(index, PlanSettings(0, 4), tmp_path)
    dealing = Dealing(
        rank=0,
        world_size=1,
        page_tokens=page_tokens,
        mini_batch_size=dict.fromkeys(SIDES, 4),
        num_negatives=1,
        negatives=negatives,
    )
    one = dealing.slice_of(order, 0)
    assert sorted(one.pairs_b.tolist()) == [0, 1, 2, 3]
    assert contents(index, one.documents_p[4:]) == [6]
    assert one.pairs_b[one.owner_p[4:]].tolist() == [1]


def test_a_run_takes_those_of_the_file(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path)
    world = World(0, 1, torch.device("cpu"))
    plain = run_config(folder, "run")
    without = open_data(plain.data, plain.evaluation, world)
    assert len(without.negatives.rows) == 0
    names, shards = DocumentNames(without.train), shard_names(without.train)
    lines = [
        {
            "shard": shards[without.train.pair_shard_N[pair]],
            "key": without.train.pair_key[pair],
            "neg_ids": list(names.names(without.train.positives_of((pair + 3) % 22))),
        }
        for pair in range(22)
    ]
    config = run_config(folder, "run", data={"negatives": write(tmp_path / "n.jsonl", lines)})
    data = open_data(config.data, config.evaluation, world)
    assert data.train.fingerprint == without.train.fingerprint
    assert data.negatives.counts().sum() > 0
