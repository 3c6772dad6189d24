"""Comparing models: the bootstrap against a slow one and against theory; models whose rows stand in other orders."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farnear.cli import main
from farnear.commands.evaluate import short_names
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
        ("qrels.txt", "q0 0 page-1 1\n", r"39 queries without a page that answers \(q1 first\)"),
        ("qrels.txt", "".join(f"q{q} 0 page-{q + 1} 1\n" for q in range(QUERIES)), "other pages for the same queries"),
        ("qrels.txt", "q0 0 page-9999 1\n", "names document page-9999, which is not among"),
        ("qrels.txt", "q0 page-1\n", "line 1 is not `QUERY 0 DOCUMENT RELEVANCE`"),
        ("document-ids.txt", PAGE_IDS.replace("page-7\n", "page 7\n"), r"line 8 is 'page 7', .* write them %20"),
        ("document-ids.txt", PAGE_IDS.replace("page-7\n", "\n"), "line 8 is ''"),
        ("document-ids.txt", "", "0 ids and 150 rows"),
        ("documents.npy", "no array", "cannot be read"),
        ("manifest.json", "[1]", "manifest.json is not a JSON object"),
        ("manifest.json", '{"matryoshka_dims": [8.5]}', r"matryoshka_dims is \[8.5\], which it cannot be"),
        ("manifest.json", '{"seconds_per_query": "2"}', "seconds_per_query is '2', which it cannot be"),
        ("queries.jsonl", '{"id": "q0"}', "queries.jsonl line 1 is not"),
        ("queries.jsonl", '\n{"id": "q0", "text": null}', "queries.jsonl line 2 is not"),
        ("document-ids.txt", None, "holds no embeddings"),
        ("qrels.txt", None, "cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_said(file: str, text: str | None, message: str, tmp_path: Path) -> None:
    make_collection(tmp_path / "base", noise=2.0)
    _refused(make_collection(tmp_path / "other", noise=1.0), file, text, message, tmp_path)


def _with(array: np.ndarray, place: Any, value: float) -> np.ndarray:
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("documents", lambda x: _with(x, (3, 0), np.nan), "documents.npy row 3 is not finite"),
        ("queries", lambda x: _with(x, (0, 1), np.inf), "queries.npy row 0 is not finite"),
        ("documents", lambda x: x.astype(np.float64) * 1e30, "row 0 is not finite, or longer than fp32 can square"),
        ("queries", lambda x: x[:, 0], "queries.npy is not one array of"),
        ("queries", lambda x: x[:, :, None], "queries.npy is not one array of"),
        ("queries", lambda x: x[:, :0], "queries.npy is not one array of"),
        ("queries", lambda x: x * 1j, "queries.npy is of type complex64, not float32"),
        ("queries", lambda x: x[:, :24], "queries of 24 components and documents of 32"),
        ("documents", lambda x: x.astype(np.uint8), "documents.npy is of type uint8, not float32"),
        ("documents", lambda x: x.astype(np.int8), "documents.npy holds int8, .* or the signs of 256 components"),
        ("ranges", lambda _: np.zeros((2, DIM)), "ranges.npy is of int8 codes, and documents.npy is float32"),
    ],
)
def test_arrays_that_cannot_be_are_said(file: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "other", noise=1.0)
    found = np.load(folder / f"{file}.npy") if file != "ranges" else None
    np.save(folder / f"{file}.npy", change(found))
    with pytest.raises(UserError, match=message):
        open_collection(folder)


@pytest.mark.parametrize("ranges", [np.zeros(DIM), np.zeros((DIM, 2)), np.zeros((2, DIM), np.int64)])
def test_ranges_that_cannot_be_are_said(ranges: np.ndarray, tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "other", noise=1.0)
    np.save(folder / "documents.npy", np.zeros((PAGES, DIM), np.int8))
    np.save(folder / "ranges.npy", ranges)
    with pytest.raises(UserError, match=r"not one array|not the least and the largest value"):
        open_collection(folder)


def test_an_archive_is_no_array(tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "other", noise=1.0)
    with (folder / "documents.npy").open("wb") as file:
        np.savez(file, np.zeros((PAGES, DIM), np.float32))
    with pytest.raises(UserError, match="is not one array"):
        open_collection(folder)


def test_files_as_other_systems_and_people_write_them_are_read(tmp_path: Path) -> None:
    """A mark at the beginning, carriage returns, blank lines, other floats, words that are no words."""
    folder, plain = (make_collection(tmp_path / name, noise=1.0) for name in ("other", "plain"))
    for name in ("document-ids.txt", "query-ids.txt", "qrels.txt"):
        text = (folder / name).read_text().replace("\n", "\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.encode() + (b"\r\n" if name == "qrels.txt" else b""))
    np.save(folder / "documents.npy", np.load(folder / "documents.npy").astype(">f8"))
    odd = "two\u2028lines, half a \ud83d"
    line = json.dumps({"id": "q0", "text": odd}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    (folder / "queries.jsonl").write_bytes(line.replace(b"\xed\xa0\xbd", b"\\ud83d") + b"\n\n")
    other, first = measured({"other": open_collection(folder), "plain": open_collection(plain)}, None, ("float32",))
    assert other.qualities[0].measures == first.qualities[0].measures
    assert other.collection.texts["q0"] == "two\u2028lines, half a ?"
    assert other.collection.texts["q1"] == "q1"


def test_what_was_not_measured_alike_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, dim in (("base", 24), ("tuned", 32)):
        folder = make_collection(tmp_path / name, noise=1.0)
        for file in ("documents.npy", "queries.npy"):
            np.save(folder / file, np.load(folder / file)[:, :dim])
    assert main(["compare", "base", "tuned"]) == 2
    told = capsys.readouterr().err
    assert "nothing was measured alike of base (float32 at 24) and tuned (float32 at 32)" in told
    # Queries are told apart where both were measured, not each at the largest of its own.
    assert main(["compare", "base", "tuned", "--dims", "32", "24"]) == 0
    rows = list(csv.DictReader((tmp_path / "evaluation" / "queries.csv").open(encoding="utf-8")))
    at_24 = measured({"tuned": open_collection(tmp_path / "tuned")}, [24], ("float32",))[0].qualities[0]
    assert np.mean([float(row["tuned ndcg@10"]) for row in rows]) == pytest.approx(at_24.measures["ndcg@10"], abs=1e-6)


def test_names_stay_in_the_folder_of_results_and_on_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert short_names([".."]) == [tmp_path.name]
    assert short_names(["/"]) == ["model"]
    assert short_names(["runs/../a/export", "b\nc"]) == ["a", "b\\nc"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base"], "compare takes two models or more"),
        (["base", "base"], "named twice"),
        (["base", "tuned", "--dims", "64"], "no model has 64 components, the most are 32"),
        (["base", "tuned", "--dims", "0"], "not a whole number"),
        (["base", "tuned", "--dims", "20", "8", "--precision", "float32", "binary"], "20 is no multiple of 8"),
        (["base", "tuned", "--data", "eval.tar"], "read by nobody; take them out"),
        (["base", "tuned", "model.max_pixels=9"], "read by nobody; take them out"),
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
