"""Mining: against a slow reference, the same for any ranks, killed and gone on with, and as a command."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mined_shards import Colours, answers, page_tokens, pairs_strategy, preprocess, write_shards
from ranks import run_ranks
from tar_makers import STORE, index_of, number_of_image, write_pairs
from tiny_runs import make_inputs, run_config, run_tree

from farnear.cli import main
from farnear.data.document_names import DocumentNames
from farnear.data.index import Index
from farnear.data.negatives_file import read_negatives
from farnear.data.read import InputReader
from farnear.errors import RunStoppedError, UserError
from farnear.mining_section import MiningConfig
from farnear.parallel.world import World, join_world, stop_world
from farnear.retrieve import mining_block
from farnear.retrieve.embeddings import Embeddings, StoredRows, distinct_inputs
from farnear.retrieve.inference import Inference
from farnear.retrieve.mine import Mined, mine, weights_fingerprint

ONE = World(0, 1, torch.device("cpu"))
COLOURS_ND = Colours().embedding.double()


def mined(index: Index, folder: Path, strategy: Any = None, world: World = ONE, **keys: Any) -> Mined:
    mining = MiningConfig(**{name: keys.pop(name) for name in list(keys) if name in MiningConfig.model_fields})
    facts = keys.pop("facts", {"model": "colours", "weights": "w"})
    by = Inference(strategy or Colours(), world, preprocess, page_tokens, batch_size=5, num_workers=0)
    by = replace(by, **{name: keys.pop(name) for name in list(keys) if name in Inference.__annotations__})
    return mine(by, index, STORE, mining, folder, facts, **{"seed": 1, **keys})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def similarity(query: int, page: int) -> float:
    return float(COLOURS_ND[(-1 - query) % len(COLOURS_ND)] @ COLOURS_ND[page])


@settings(deadline=None, max_examples=40)
@given(
    pairs=pairs_strategy(),
    range_min=st.integers(0, 3),
    absolute=st.sampled_from([None, 0.0, 0.2]),
    relative=st.sampled_from([None, 0.1]),
    max_score=st.sampled_from([None, 0.1]),
    min_score=st.sampled_from([None, -0.2]),
)
def test_keeps_what_a_slow_reference_keeps_and_never_an_answer(
    pairs: Any, range_min: int, absolute: Any, relative: Any, max_score: Any, min_score: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        index = write_shards(Path(folder), pairs)
        result = mined(
            index,
            Path(folder),
            num_negatives=2,
            range_min=range_min,
            range_max=6,
            absolute_margin=absolute,
            relative_margin=relative,
            max_score=max_score,
            min_score=min_score,
        )
        negatives = read_negatives([str(result.path)], index, 0.0)
        reader, lines = InputReader(index, STORE), lines_of(result.path)[1:]
        assert [line["key"] for line in lines] == [f"k{pair}" for pair in range(len(pairs))]
        for pair, line in enumerate(lines):
            query, right = pairs[pair][0], answers(pairs, pair)
            found = [number_of_image(reader[int(row)]) for row in negatives.of(pair)]
            assert not set(found) & right
            assert len(found) == len(line["neg_ids"]), "reading leaves nothing out of what was mined"
            least = min(line["pos_similarity"])
            rows = index.positives_of(pair)
            np.testing.assert_allclose(
                line["pos_similarity"],
                [similarity(query, number_of_image(reader[int(row)])) for row in rows],
                atol=2e-6,
            )
            # All contents are those of p0 to p7, and of pages that stand with pairs, which are copies of them.
            others = sorted(set(range(8)) - right, key=lambda page: -similarity(query, page))
            passing = [
                page
                for page in others[range_min:6]
                if (max_score is None or similarity(query, page) <= max_score)
                and (min_score is None or similarity(query, page) >= min_score)
                and (absolute is None or similarity(query, page) + absolute <= least)
                and (relative is None or similarity(query, page) <= least * (1 - relative))
            ]
            assert found == passing[:2]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return index_of(write_pairs(tmp_path_factory.mktemp("shards"), 300, 3, negatives_of_pair=2, copies_of_page=2))


def _mine_on_rank(rank: int, world_size: int, folder: Path) -> None:
    world = join_world()
    own = index_of(sorted((folder / "shards").glob("*.tar")))
    told: list[tuple[str, int, int]] = []
    keys = {"num_negatives": 3, "range_max": 40, "sampling_strategy": "random"}
    mined(own, folder / f"of-{world_size}", world=world, told=lambda *count: told.append(count), **keys)
    stop_world()
    # How far it is, on all ranks together, the last time before the last batch.
    assert list(dict.fromkeys(what for what, _, _ in told)) == ["queries", "pages", "pairs searched for"]
    for what, total in (("queries", 300), ("pages", 150), ("pairs searched for", 300)):
        done = [count[1:] for count in told if count[0] == what]
        assert done == sorted(done) and {of for _, of in done} == {total}
        assert done[0][0] == 0 and total / 2 <= done[-1][0] < total


def test_is_the_same_for_any_number_of_ranks_and_any_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_pairs(tmp_path / "shards", 300, 3, copies_of_page=2)
    alone = mined(index_of(shards), tmp_path / "of-1", num_negatives=3, range_max=40, sampling_strategy="random")
    monkeypatch.setattr(mining_block, "_TILE", (64, 64))
    small = mined(index_of(shards), tmp_path / "small", num_negatives=3, range_max=40, sampling_strategy="random")
    assert small.path.read_bytes() == alone.path.read_bytes()
    run_ranks(_mine_on_rank, 2, tmp_path)
    assert (tmp_path / "of-2" / "negatives.jsonl").read_bytes() == alone.path.read_bytes()
    report = json.loads((tmp_path / "of-2" / "report.json").read_text())
    assert report["pairs"] == 300 and report["negatives"] == 900 and report["pairs_with_fewer"] == 0


def test_random_ones_are_others_than_the_nearest_and_follow_the_seed(index: Index, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"num_negatives": 3, "range_max": 40}
    top = mined(index, tmp_path / "top", **keys)
    first = mined(index, tmp_path / "random", sampling_strategy="random", **keys)
    other = mined(index, tmp_path / "other", sampling_strategy="random", seed=2, **keys)
    nearest = mined(index, tmp_path / "all", num_negatives=40, range_max=40)
    for one in zip(*(lines_of(each.path)[1:] for each in (top, first, other, nearest)), strict=True):
        ids = [line["neg_ids"] for line in one]
        assert ids[0] == ids[3][:3] and set(ids[1]) <= set(ids[3])
        assert one[0]["neg_similarity"] == sorted(one[0]["neg_similarity"], reverse=True)
    assert len({each.path.read_text().partition("\n")[2] for each in (top, first, other)}) == 3


def test_goes_on_where_it_was_killed_and_never_from_other_weights(index: Index, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"num_negatives": 3, "range_max": 40}
    whole = Colours()
    expected = mined(index, tmp_path / "whole", whole, **keys).path.read_bytes()

    class KilledError(Exception):
        pass

    def killer(batches: int) -> Any:
        left = iter(range(batches))

        def between() -> None:
            if next(left, None) is None:
                raise KilledError

        return between

    strategy = Colours()
    for batches in (20, 40, 30):
        with pytest.raises(KilledError):
            mined(index, tmp_path / "killed", strategy, between=killer(batches), **keys)
    with pytest.raises(UserError, match="not complete"):
        Embeddings.open(tmp_path / "killed" / "embeddings")
    done = strategy.batches
    assert mined(index, tmp_path / "killed", strategy, **keys).path.read_bytes() == expected
    # Each of the three kills costs the part that was being embedded, and no more.
    assert strategy.batches - done < whole.batches - 60, "what was there is not embedded again"
    before = strategy.batches
    assert mined(index, tmp_path / "killed", strategy, **keys).path.read_bytes() == expected
    assert strategy.batches == before
    mined(index, tmp_path / "killed", strategy, facts={"model": "colours", "weights": "others"}, **keys)
    assert strategy.batches - before == whole.batches


def test_embeddings_are_found_by_content(index: Index, tmp_path: Path) -> None:
    mined(index, tmp_path)
    found = Embeddings.open(tmp_path / "embeddings")
    colours = Colours().embedding.numpy()
    pairs = np.array([7, 3, 7, 299])
    reader = InputReader(index, STORE)
    pages = [number_of_image(reader[int(row)]) for row in index.positives[index.positive_start_N1[pairs]]]
    hashes = index.input_hash_I[index.positives[index.positive_start_N1[pairs]]]
    np.testing.assert_array_equal(found.document(hashes), colours[pages])
    np.testing.assert_array_equal(found.query(index.query_hash_N[pairs]), colours[-1 - pairs])
    assert found.documents.shape == (len(distinct_inputs(index)["document"][0]), 16)
    np.testing.assert_array_equal(found.documents[30:70], found.document(found.document_hash_P[30:70]))
    assert isinstance(found.documents, StoredRows) and found.documents[:0].shape == (0, 16)
    with pytest.raises(UserError, match="1 of 2 document embeddings that are asked for are not stored"):
        found.document(np.array([hashes[0], hashes[0] + 1]))
    with pytest.raises(UserError, match="holds no embeddings"):
        Embeddings.open(tmp_path)


@pytest.mark.parametrize("margin", [0.0, 20.0, None])
def test_a_reranker_vetoes_and_is_a_teacher(index: Index, tmp_path: Path, margin: float | None) -> None:
    reader = InputReader(index, STORE)
    number_of_row = {int(row): number_of_image(reader[int(row)]) for row in np.unique(
        np.concatenate([index.positives, index.negatives]))}  # fmt: skip
    asked = []

    def score_pairs(query_rows: Any, rows: Any) -> Any:
        asked.append(len(rows))
        return np.array([number_of_row[int(row)] % 97 for row in rows], np.float32)

    keys: dict[str, Any] = {"num_negatives": 4, "range_max": 30, "score_pairs": score_pairs}
    result = mined(index, tmp_path / "judged", reranker="r", reranker_margin=margin, reranker_facts={"r": 1}, **keys)
    plain = mined(index, tmp_path / "plain", num_negatives=30, range_max=30)
    negatives = read_negatives([str(result.path)], index, 0.0)
    documents = DocumentNames(index)
    known = zip(documents.names(documents.row_R), documents.row_R.tolist(), strict=True)
    score_of = {name: float(number_of_row[row] % 97) for name, row in known}
    for pair, (line, every) in enumerate(zip(lines_of(result.path)[1:], lines_of(plain.path)[1:], strict=True)):
        (teacher,) = line["pos_teacher"]
        assert teacher == pair // 2 % 97 == negatives.positive_teacher[index.positive_start_N1[pair]]
        names = dict(zip(every["neg_ids"], every["neg_similarity"], strict=True))
        scores = {name: score_of[name] for name in names}
        passing = [name for name in names if margin is None or scores[name] <= teacher - margin]
        assert line["neg_ids"] == passing[:4]
        assert line["neg_teacher"] == [scores[name] for name in passing[:4]]
        assert line["neg_similarity"] == [names[name] for name in passing[:4]]
    assert sum(asked) < (6 if margin is None else 31) * 300, "no more are scored than it takes"
    if margin is not None:
        assert result.report["fell"]["reranker_margin"] > 0


def test_report_counts_what_fell_and_the_page_shows_pairs(index: Index, tmp_path: Path) -> None:
    result = mined(index, tmp_path, num_negatives=4, range_min=2, range_max=20, max_score=0.6)
    lines = lines_of(result.path)
    assert lines[0]["format"] == "farnear negatives 1" and lines[0]["mining"]["max_score"] == 0.6
    report = json.loads((tmp_path / "report.json").read_text())
    counts = [len(line["neg_ids"]) for line in lines[1:]]
    assert report["negatives"] == sum(counts) and report["pairs_with_fewer"] == sum(count < 4 for count in counts)
    assert report["fell"]["rank_window"] == 2 * 300 and report["fell"]["max_score"] > 0
    scores = np.concatenate([line["neg_similarity"] for line in lines[1:]])
    assert report["negative_similarity"]["p50"] == pytest.approx(np.median(scores), abs=0.01)
    assert report["seconds"].keys() == {"encode", "search", "write"}
    page = (tmp_path / "examples.html").read_text()
    assert page.count("<section>") == 20 and page.count('class="positive"') == 20
    assert page.count("data:image/jpeg") > 20 and "http:" not in page and "https:" not in page
    assert not (tmp_path / "parts").exists()


def test_stops_at_embeddings_that_are_not_finite_and_without_faiss(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = Colours()
    strategy.embedding[5] = float("nan")
    with pytest.raises(RunStoppedError, match="embeddings \\(document\\) are not finite"):
        mined(index, tmp_path / "a", strategy)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="FAISS cannot be imported"):
        mined(index, tmp_path / "b", use_faiss=True)


def test_weights_have_a_fingerprint() -> None:
    one, other = Colours(), Colours()
    assert weights_fingerprint(one, ONE, "f") == weights_fingerprint(other, ONE, "f")
    other.embedding[3, 3] += 1e-6
    found = {weights_fingerprint(strategy, ONE, frozen) for strategy in (one, other) for frozen in "fg"}
    assert len(found) == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_inputs(tmp_path)
    tree = run_tree(folder, "run", strategy="ddp", num_processes=2)
    tree["mining"] = {"num_negatives": 3, "range_max": 10}
    (folder / "run.yaml").write_text(json.dumps(tree))
    words = [sys.executable, "-m", "farnear", "mine", str(folder / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=200)
    assert first.returncode == 0, first.stderr
    assert "mined 66 negatives of 22 pairs, 0 pairs with fewer than 3" in first.stdout
    path = folder / "run" / "mined" / "negatives.jsonl"
    assert f"set data.negatives: {path}" in first.stdout
    assert len(lines_of(path)) == 23
    config = run_config(folder, "run", data={"negatives": str(path)})
    assert config.data.negatives == (str(path),)
    assert main(["mine", str(folder / "run.yaml"), "training.learning_rate=1e-4"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    (folder / "file").touch()
    assert main(["mine", str(folder / "run.yaml"), "--out", str(folder / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
