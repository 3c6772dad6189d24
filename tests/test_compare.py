"""Comparing models: the bootstrap against a slow one and against theory; models whose rows stand in other orders."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from farnear.cli import main
from farnear.data.plan import random_bits
from farnear.errors import UserError
from farnear.retrieve.collection import open_collection
from farnear.retrieve.compare import differences
from farnear.retrieve.side_by_side import NOT_FOUND, compare, first_ranks, measured, query_changes

QUERIES, PAGES, DIM = 40, 150, 32
PAGE_IDS = "".join(f"page-{page}\n" for page in range(PAGES))


def make_collection(folder: Path, *, noise: float, seed: int = 0, order: int | None = None) -> Path:
    """Random pages, and queries near theirs; rows in another order if one is given, which the ids tell."""
    folder.mkdir()
    random = np.random.default_rng(0)
    page_PD = random.standard_normal((PAGES, DIM)).astype(np.float32)
    noise_QD = np.random.default_rng(seed + 1).standard_normal((QUERIES, DIM))
    query_QD = (page_PD[:QUERIES] + noise * noise_QD).astype(np.float32)
    place_P, place_Q = np.arange(PAGES), np.arange(QUERIES)
    if order is not None:
        place_P, place_Q = (np.random.default_rng(order).permutation(n) for n in (PAGES, QUERIES))
    np.save(folder / "documents.npy", page_PD[place_P])
    np.save(folder / "queries.npy", query_QD[place_Q])
    (folder / "document-ids.txt").write_text("".join(f"page-{page}\n" for page in place_P))
    (folder / "query-ids.txt").write_text("".join(f"q{query}\n" for query in place_Q))
    texts = [json.dumps({"id": f"q{query}", "text": f"what stands,\non page {query}?"}) for query in range(QUERIES)]
    (folder / "queries.jsonl").write_text("\n".join(texts) + "\n")
    (folder / "qrels.txt").write_text("".join(f"q{query} 0 page-{query} 1\n" for query in range(QUERIES)))
    return folder


def _slow_interval(difference_Q: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """One resample after the other."""
    queries = len(difference_Q)
    means = []
    for resample in range(resamples):
        numbers = np.arange(resample * queries, (resample + 1) * queries)
        drawn = [int(bits) % 2**64 >> 32 for bits in random_bits(f"{seed}/bootstrap", numbers)]
        means.append(np.mean([difference_Q[draw * queries >> 32] for draw in drawn]))
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def test_the_interval_is_that_of_one_resample_after_the_other() -> None:
    difference_QM = np.random.default_rng(3).normal(0.1, 0.3, (37, 2))
    found = differences(difference_QM, resamples=1300, seed=5)
    for column in range(2):
        assert (found[column].low, found[column].high) == pytest.approx(
            _slow_interval(difference_QM[:, column], 1300, 5)
        )
        assert found[column].mean == pytest.approx(difference_QM[:, column].mean())
    assert differences(difference_QM, resamples=1300, seed=6) != found


def test_the_interval_of_many_queries_is_the_normal_one() -> None:
    difference_Q1 = np.random.default_rng(1).normal(0.02, 0.2, (4000, 1))
    (found,) = differences(difference_Q1)
    half = 1.96 * difference_Q1.std() / np.sqrt(4000)
    assert found.low == pytest.approx(found.mean - half, abs=half / 20)
    assert found.high == pytest.approx(found.mean + half, abs=half / 20)
    assert found.is_clear


def test_an_interval_leaves_zero_out_one_time_in_twenty_where_nothing_differs() -> None:
    noise_QM = np.random.default_rng(9).normal(0, 1, (200, 400))
    clear = sum(one.is_clear for one in differences(noise_QM, resamples=1000))
    assert 0.02 < clear / 400 < 0.09


def test_models_are_compared_query_by_query_wherever_their_rows_stand(tmp_path: Path) -> None:
    folders = {
        "base": make_collection(tmp_path / "base", noise=2.5),
        "tuned": make_collection(tmp_path / "tuned", noise=1.2, seed=1),
        "the same": make_collection(tmp_path / "the same", noise=1.2, seed=1, order=8),
    }
    collections = {name: open_collection(folder) for name, folder in folders.items()}
    subjects = measured(collections, [32, 16], ("float32",))
    base, tuned, same = subjects
    found = {(one.model, one.dim, one.measure): one for one in compare(subjects, resamples=500, seed=0)}
    better = found["tuned", 32, "ndcg@10"]
    assert better.difference.is_clear and better.value > better.baseline + 0.2
    for dim in (32, 16):
        one, other = found["tuned", dim, "map@100"], found["the same", dim, "map@100"]
        assert other.value == pytest.approx(one.value)
        assert (other.difference.low, other.difference.high) == pytest.approx((one.difference.low, one.difference.high))
    changes = {one.query: one for one in query_changes(base, same, "mrr@10")}
    rank_of = dict(zip(tuned.collection.query_ids, first_ranks(tuned, tuned.qualities[0]), strict=True))
    assert {query: one.rank for query, one in changes.items()} == rank_of
    one = changes["q3"]
    assert one.text == "what stands,\non page 3?"
    assert one.value == (1 / one.rank if one.rank and one.rank <= 10 else 0)
    assert all(
        change.baseline_rank > 10 or change.baseline_rank == NOT_FOUND or change.baseline for change in changes.values()
    )


def test_the_command_leaves_tables_that_agree_with_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_collection(tmp_path / "base", noise=2.5)
    make_collection(tmp_path / "tuned", noise=1.2, seed=1, order=4)
    words = ["compare", "base", "tuned", "--dims", "32", "16", "--precision", "float32", "binary", "--resamples", "200"]
    assert main(words) == 0
    told = capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation" / "comparison.json").read_text())
    assert record["baseline"] == "base"
    by_place = {(one["dim"], one["precision"], one["measure"]): one for one in record["differences"]}
    assert {place[:2] for place in by_place} == {(32, "float32"), (32, "binary"), (16, "float32"), (16, "binary")}
    results = json.loads((tmp_path / "evaluation" / "tuned" / "results.json").read_text())["results"]
    for row in results:
        assert by_place[row["dim"], row["precision"], "ndcg@10"]["value"] == row["ndcg@10"]
    headline = by_place[32, "float32", "ndcg@10"]
    assert f"{headline['baseline']:.4f}  {headline['value']:.4f}  {headline['difference']['mean']:+.4f}" in told
    rows = list(csv.DictReader((tmp_path / "evaluation" / "queries.csv").open(encoding="utf-8")))
    assert len(rows) == QUERIES
    change = [float(row["tuned change"]) for row in rows]
    assert change == sorted(change, reverse=True)
    assert np.mean(change) == pytest.approx(headline["difference"]["mean"], abs=1e-6)
    assert rows[0]["text"].startswith("what stands, on page ")
    assert f"{change[0]:+.3f}" in told
    assert sum(one > 0 for one in change) == headline["difference"]["better"]


def _refused(folder: Path, file: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(UserError, match=message):
        measured({"base": open_collection(tmp_path / "base"), "other": open_collection(folder)}, None, ("float32",))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("document-ids.txt", PAGE_IDS.replace("page-149", "other-149"), r"same task: 2 pages \(other-149 first\)"),
        ("query-ids.txt", "q0\nq1\n", "2 ids and 40 rows"),
        ("query-ids.txt", "".join(f"q{query // 2}\n" for query in range(QUERIES)), "a query id twice"),
        ("qrels.txt", "q0 0 page-1 1\n", "39 queries .* have no page that answers them, q1 among"),
        ("qrels.txt", "".join(f"q{q} 0 page-{q + 1} 1\n" for q in range(QUERIES)), "other pages for the same queries"),
        ("qrels.txt", "q0 0 page-9999 1\n", "names document page-9999, which is not among"),
        ("qrels.txt", "q0 page-1\n", "line 1 is not `QUERY 0 DOCUMENT RELEVANCE`"),
        ("documents.npy", "no array", "cannot be read"),
        ("document-ids.txt", None, "holds no embeddings"),
        ("qrels.txt", None, "cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_said(file: str, text: str | None, message: str, tmp_path: Path) -> None:
    make_collection(tmp_path / "base", noise=2.0)
    _refused(make_collection(tmp_path / "other", noise=1.0), file, text, message, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base"], "compare takes two models or more"),
        (["base", "base"], "named twice"),
        (["base", "tuned", "--dims", "64"], "no model has 64 components, the most are 32"),
        (["base", "tuned", "--dims", "0"], "not a whole number"),
        (["base", "elsewhere/tuned"], "no shards are named, and no run that has data.eval"),
    ],
)
def test_mistakes_on_the_command_line_take_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_collection(tmp_path / "base", noise=2.0)
    make_collection(tmp_path / "tuned", noise=1.0)
    assert main(["compare", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
