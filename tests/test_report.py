"""The report: what the page says and draws, what it escapes, what it never loads, and which run folders it refuses."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_makers import evaluation_line, step_line, write_rankings, write_run

from farnear.cli import main
from farnear.errors import UserError
from farnear.report.figures import Series, bins_of, chart_over_steps, ticks
from farnear.report.page import write_report
from farnear.report.records import read_run
from farnear.report.sections import duration
from farnear.report.svg import number

VOID = {"meta", "link", "br", "img", "input", "hr"}


class _Page(HTMLParser):
    """Tags with their attributes, and the text of each tag name; complains about tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text_of_tag: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
            self.text_of_tag.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "main" in self.open and "title" not in self.open:
            self.pieces.append(data)
        for tag in set(self.open):
            self.text_of_tag[tag][-1] += data

    def attributes(self, tag: str, css_class: str) -> list[dict[str, str]]:
        return [found for name, found in self.tags if name == tag and found.get("class") == css_class]

    def drawing(self, start: str) -> str:
        """The text alternative that starts so."""
        return next(found["aria-label"] for _, found in self.tags if found.get("aria-label", "").startswith(start))

    @property
    def words(self) -> str:
        """All that a reader sees, in order, without tooltips."""
        return " ".join(" ".join(self.pieces).split())


def _read(folder: Path) -> _Page:
    report = write_report(folder)
    assert report == folder / "report.html"
    return _Page(report.read_text(encoding="utf-8"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    evaluations = [
        evaluation_line(0, "before", {"64": 0.02, "128": 0.03, "1024": 0.04}),
        evaluation_line(10, "during", {"64": 0.4, "128": 0.5, "1024": 0.6}),
        evaluation_line(20, "after", {"64": 0.7, "128": 0.8, "1024": 0.95}),
    ]
    folder = write_run(tmp_path / "demo", [step_line(step) for step in range(1, 21)], evaluations)
    summary = {"seconds": 153.2, "pairs_per_s": 83.71234, "world_size": 2, "strategy": "zero2", "ndcg@10_after": 0.95}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_page_is_whole_and_loads_nothing(run_folder: Path) -> None:
    page = _read(run_folder)
    assert page.text_of_tag["title"][0] == "demo · farnear report"
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    for loading in ("http://", "https://", "url(", "@import", "<script", "<link", "<img", " src=", " href="):
        assert loading not in html
    policy = next(found for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")
    assert any(found.get("name") == "viewport" for _, found in page.tags)
    assert "prefers-color-scheme: dark" in html
    assert "\n  name: tiny\n" in page.text_of_tag["details"][0]
    drawings = [found for tag, found in page.tags if tag == "svg"]
    assert len(drawings) == 4 + 1 + 4 + 1 + 1, "change bars and their axis, nDCG, four of training, time, masked"
    assert all(found["role"] == "img" and found["aria-label"] for found in drawings)


def test_the_figures_of_the_run(run_folder: Path) -> None:
    words = _read(run_folder).words
    assert "nDCG@10 with 1,024 dimensions 0.040 → 0.950 after training" in words
    assert "Optimizer steps 20 epoch 3" in words
    assert "Pairs per second 83.71" in words
    assert "Time 2 min 33 s" in words
    assert "Processes 2 zero2" in words
    assert "Peak memory 2.1 GB" in words
    # The full dimension first, in the order of numbers and not of strings.
    assert "1,024 0.040 0.950 +0.910 128 0.030 0.800 +0.770 64 0.020 0.700 +0.680" in words
    assert "Dimensions nDCG@1 nDCG@10 Recall@10 1,024 0.100 0.950 0.500" in words
    assert "Pass one 6 s 30.0% 300 ms" in words
    assert "Masked negatives 10 in all" in words


def test_the_charts_hold_the_values(run_folder: Path) -> None:
    page = _read(run_folder)
    assert page.drawing("Loss") == "Loss: 4.9 at step 1, 3 at step 20, lowest 3, highest 4.9"
    assert page.drawing("Learning rate").startswith("Learning rate: 2e-5 at step 1")
    assert page.drawing("nDCG@10 64") == (
        "nDCG@10 64: 0.02 at step 0, 0.7 at step 20, lowest 0.02, highest 0.7; "
        "nDCG@10 128: 0.03 at step 0, 0.8 at step 20, lowest 0.03, highest 0.8; "
        "nDCG@10 1,024: 0.04 at step 0, 0.95 at step 20, lowest 0.04, highest 0.95"
    )
    assert page.drawing("Time by phase") == (
        "Time by phase: Data 10.0%, Pass one 30.0%, Loss 10.0%, Pass two 40.0%, Optimizer 10.0%"
    )
    titles = page.text_of_tag["title"]
    assert {f"Loss {number(5 - 0.1 * step)}, step {step}" for step in range(1, 21)} <= set(titles)
    assert "nDCG@10 0.6, step 10, 1,024" in titles
    lines = [found["points"].split() for found in page.attributes("polyline", "line")]
    assert [len(line) for line in lines] == [3, 3, 3, 20, 20, 20, 20]
    # nDCG from 0 (y 180) to 1 (y 14): 0.5 lies half way, wherever the labels are.
    assert float(lines[1][1].split(",")[1]) == pytest.approx((180 + 14) / 2, abs=0.1)
    loss_y = [float(point.split(",")[1]) for point in lines[3]]
    assert loss_y == sorted(set(loss_y)), "a falling loss runs down the page"


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "</pre></svg><script>alert(1)</script>\"'&"
    steps = [step_line(1, seconds={evil: 0.5, "b": 0.5})]
    evaluations = [evaluation_line(1, "after", {"8": 0.5})]
    evaluations[0]["metrics"]["8"][evil] = 0.25
    folder = write_run(tmp_path / "<script>x<", steps, evaluations, config=evil)
    (folder / "summary.json").write_text(json.dumps({evil: evil, "strategy": evil, "world_size": [evil]}))
    page = _read(folder)
    assert "<script" not in (folder / "report.html").read_text(encoding="utf-8")
    assert page.text_of_tag["h1"] == ["<script>x<"]
    assert page.text_of_tag["pre"] == [evil]
    assert page.drawing("Time by phase") == f"Time by phase: {evil.capitalize()} 50.0%, B 50.0%"


@pytest.mark.parametrize("metrics", [None, ""])
def test_a_run_without_steps_says_so(tmp_path: Path, metrics: str | None) -> None:
    folder = write_run(tmp_path / "new")
    if metrics is not None:
        (folder / "metrics.jsonl").write_text(metrics)
    page = _read(folder)
    assert "No steps yet" in page.words
    assert "No evaluation yet" in page.words
    assert "name: tiny" in page.words


def test_a_run_that_goes_on_shows_its_newest_evaluation(tmp_path: Path) -> None:
    evaluations = [evaluation_line(0, "before", {"8": 0.1}), evaluation_line(5, "during", {"8": 0.25})]
    words = _read(write_run(tmp_path / "going", [step_line(step) for step in range(1, 8)], evaluations)).words
    assert "0.100 → 0.250 at step 5" in words
    assert "Pairs per second 80 median step Time 7 s in steps" in words


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, None])
def test_values_that_are_not_finite_are_marked(tmp_path: Path, broken: float | None) -> None:
    steps = [step_line(step) for step in range(1, 10)]
    steps[3] = step_line(4, loss=broken, grad_norm=broken, pairs_per_s=broken, masked=broken, seconds={"data": broken})
    steps[8] = step_line(9, loss=broken)
    evaluations = [evaluation_line(0, "before", {"8": None}), evaluation_line(9, "after", {"8": 0.5})]
    page = _read(write_run(tmp_path / "nan", steps, evaluations))
    assert "2 of 9 values are not finite" in page.words
    assert "Loss not finite from 4.9" in page.words
    assert "not finite → 0.500" in page.words
    assert {"Loss, step 4: not finite", "Loss, step 9: not finite", "nDCG@10, step 0: not finite"} <= set(
        page.text_of_tag["title"]
    )
    loss_lines = [found["points"].split() for found in page.attributes("polyline", "line")][:2]
    assert [len(line) for line in loss_lines] == [3, 4], "the line breaks at the broken step"
    assert not any("nan" in value or "inf" in value for _, found in page.tags for value in found.values())


def test_a_run_of_broken_values_only_is_drawn(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("epoch", "loss", "lr", "grad_norm", "pairs_per_s", "masked", "peak_memory_bytes"))
    page = _read(write_run(tmp_path / "nan", [step_line(step, **nothing, seconds={"data": None}) for step in (1, 2)]))
    assert page.drawing("Loss") == "Loss: 2 of 2 values are not finite"
    assert "No times were recorded" in page.words


def test_a_run_file_stands_for_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", [step_line(1)])
    run_file = tmp_path / "mine.yaml"
    run_file.write_text(json.dumps({"output_dir": str(folder), "model": {"name_or_path": "m"}, "data": {"train": "t"}}))
    assert main(["report", str(run_file)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"


def test_steps_that_a_resume_did_again_count_once(tmp_path: Path) -> None:
    first = [step_line(step, loss=1.0) for step in range(1, 9)]
    evaluations = [evaluation_line(3, "during", {"8": 0.3}), evaluation_line(6, "during", {"8": 0.1})]
    evaluations += [evaluation_line(6, "during", {"8": 0.6})]
    page = _read(write_run(tmp_path / "resumed", first + [step_line(step, loss=2.0) for step in (5, 6)], evaluations))
    assert page.drawing("Loss") == "Loss: 1 at step 1, 2 at step 6, lowest 1, highest 2"
    assert "4 recorded steps were left out" in page.words
    assert page.drawing("nDCG@10").endswith("0.6 at step 6, lowest 0.3, highest 0.6")


def test_other_corpora_are_not_compared_in_silence(tmp_path: Path) -> None:
    evaluations = [
        evaluation_line(0, "before", {"8": 0.1}, pages=400),
        evaluation_line(5, "during", {"8": 0.5}, pages=400),
        evaluation_line(7, "during", {"8": 0.6}, pages=400),
        evaluation_line(8, "during", {"8": 0.3}, pages=5000),
        evaluation_line(8, "after", {"8": 0.4}, pages=5000),
    ]
    page = _read(write_run(tmp_path / "sampled", [step_line(step) for step in range(1, 10)], evaluations))
    assert (
        "Not the same task: 200 queries against 400 pages before, 200 queries against 5,000 pages since" in page.words
    )
    assert "Rings apart from the lines: 200 queries against 5,000 pages" in page.words
    ndcg_line, loss_line = page.attributes("polyline", "line")[:2]
    assert (len(ndcg_line["points"].split()), len(loss_line["points"].split())) == (3, 9)
    assert "Not the same task" not in _read(write_run(tmp_path / "sampled", None, evaluations[:2])).words


def test_no_masked_pairs_draws_no_chart(tmp_path: Path) -> None:
    page = _read(write_run(tmp_path / "clean", [step_line(step, masked=0) for step in (1, 2)]))
    assert "Masked negatives 0 in all" in page.words
    assert not any(found.get("aria-label", "").startswith("Masked") for _, found in page.tags)


def test_what_was_left_out_is_shown(tmp_path: Path) -> None:
    assert "Pairs left out" not in _read(write_run(tmp_path / "clean", [step_line(1)])).words
    folder = write_run(tmp_path / "damaged", [step_line(1)])
    fault = {"shard": "/data/a.tar", "offset": 5120, "kind": "cut_short", "detail": "the file ends", "pairs_lost": 2}
    (folder / "faults.jsonl").write_text(json.dumps(fault) + "\n")
    pairs = [
        {"step": 3, "shard": "b.tar", "key": f"k{n}", "input": "b.tar/k.png", "reason": "is <cut>"} for n in range(60)
    ]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, pairs[0]]))
    words = _read(folder).words
    assert "2 pairs or more lost to 1 fault of the shards (faults.jsonl), 60 pairs quarantined" in words
    assert "a.tar at byte 5,120 2 cut_short: the file ends" in words and "and 12 more" in words
    assert "b.tar/k7 1 b.tar/k.png is <cut>, step 3" in words
    (folder / "faults.jsonl").write_text(json.dumps({**fault, "kind": None}) + "\n")
    with pytest.raises(UserError, match=r"faults.jsonl line 1: 'kind' is None, not a text"):
        write_report(folder)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 3, "lo', "not a complete JSON object"),
        ("", "not a complete JSON object"),
        ("[1, 2]", "not a JSON object"),
        (json.dumps({"step": 3}), "'seconds' is missing"),
        (
            json.dumps({key: value for key, value in step_line(3).items() if key != "grad_norm"}),
            "'grad_norm' is missing",
        ),
        (json.dumps(step_line(3, loss="low")), "'loss' is 'low', not a number"),
        (json.dumps(step_line(3, loss=True)), "'loss' is True, not a number"),
        (json.dumps(step_line(-3)), "'step' is -3, not a whole number"),
        (json.dumps(step_line(3, seconds=7)), "'seconds' is not an object"),
        (json.dumps(step_line(3, seconds={"data": "x"})), "'data' is 'x', not a number"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    folder = write_run(tmp_path / "damaged", [step_line(1), step_line(2)])
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(line + "\n")
    with pytest.raises(UserError) as caught:
        write_report(folder)
    message = str(caught.value)
    assert f"{folder / 'metrics.jsonl'} line 3: " in message
    assert complaint in message
    assert "restore the file" in message
    assert "\n" not in message
    assert not (folder / "report.html").exists()


def test_a_line_that_is_being_written_is_no_damage(tmp_path: Path) -> None:
    """Nor is half a line that a kill has left; one that only lacks its end counts."""
    folder = write_run(tmp_path / "killed", [step_line(1), step_line(2)])
    for rest, steps in (('{"step": 3, "lo', 2), (json.dumps(step_line(3)), 3)):
        text = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(text + rest)
        assert len(read_run(folder).steps) == steps
        (folder / "metrics.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "later"}, "'kind' is 'later', not before, during or after"),
        ({"metrics": {}}, "'metrics' is empty"),
        ({"metrics": {"full": {"ndcg@10": 0.5}}}, "has the key 'full', which is not a number of dimensions"),
        ({"metrics": {"8": {"ndcg@1": 0.5}}}, "'ndcg@10' is missing"),
        ({"metrics": {"8": {"ndcg@10": 1.5}}}, "'ndcg@10' at 8 dimensions is 1.5, outside 0 to 1"),
        ({"pages": 0.5}, "'pages' is 0.5, not a whole number"),
    ],
)
def test_a_damaged_evaluation_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    folder = write_run(tmp_path / "damaged", [step_line(1)], [evaluation_line(1, "after", {"8": 0.5}) | changes])
    with pytest.raises(UserError, match=r"eval\.jsonl line 1: ") as caught:
        write_report(folder)
    assert complaint in str(caught.value)


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"holds no run\.yaml, so it is not a run folder"):
            write_report(folder)
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text('{"seconds": ')
    with pytest.raises(UserError, match=r"summary\.json is not a JSON object"):
        write_report(folder)
    (folder / "run.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"run\.yaml is not UTF-8"):
        write_report(folder)


def test_the_page_is_replaced_whole_or_left_alone(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = write_report(run_folder)
    before = report.read_text(encoding="utf-8")
    with (run_folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(step_line(21)) + "\n")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("farnear.files.os.replace", fail)
        with pytest.raises(OSError, match="no space"):
            write_report(run_folder)
    assert report.read_text(encoding="utf-8") == before
    names = ["eval.jsonl", "metrics.jsonl", "report.html", "run.yaml", "summary.json"]
    assert sorted(path.name for path in run_folder.iterdir()) == names, "nothing unfinished is left behind"
    assert "step 21" in write_report(run_folder).read_text(encoding="utf-8")
    assert sorted(path.name for path in run_folder.iterdir()) == names


def test_a_long_run_keeps_its_spikes_and_stays_small(tmp_path: Path) -> None:
    steps = [step_line(step, loss=1.0 if step != 7777 else 40.0) for step in range(1, 10_001)]
    page = _read(write_run(tmp_path / "long", steps))
    assert (tmp_path / "long" / "report.html").stat().st_size < 300_000
    assert page.drawing("Loss").endswith("lowest 1, highest 40")
    assert "Loss 1.78, steps 7,751 to 7,800 (mean; 1 to 40)" in page.text_of_tag["title"]
    band_y = [float(point.split(",")[1]) for point in page.attributes("polygon", "band")[0]["points"].split()]
    assert [y < 150 for y in band_y].count(True) == 1, "one spike, all else at the bottom"
    assert min(band_y) < 25


def test_bins_cover_every_step_once() -> None:
    bins = bins_of(Series(range(1, 1002), [float(step) for step in range(1, 1002)]), at_most=100)
    assert len(bins) <= 100
    assert (bins[0].first_step, bins[-1].last_step) == (1, 1001)
    assert all(left.last_step + 1 == right.first_step for left, right in pairwise(bins))
    assert (bins[0].low, bins[0].high, bins[0].mean) == (1, 11, 6)


def test_one_step_stands_in_the_middle_of_its_axis() -> None:
    drawing = _Page(f"<main>{chart_over_steps('Loss', [Series([7], [0.5])], 'line')}</main>")
    marks = [found for tag, found in drawing.tags if tag == "text" and found.get("y") == "198.0"]
    assert len(marks) == 1 and "7" in drawing.text_of_tag["text"]
    assert not {"6", "8"} & set(drawing.text_of_tag["text"])


@pytest.mark.parametrize("level", [0.0, 0.5, 0.99])
def test_labels_do_not_cover_each_other(level: float) -> None:
    series = [Series([0, 1], [0.0, level + 0.001 * line], label=f"<b>{line}") for line in range(6)]
    drawing = _Page(f"<main>{chart_over_steps('nDCG@10', series, 'dots', value_range=(0.0, 1.0))}</main>")
    label_y = sorted(float(found["y"]) for tag, found in drawing.tags if found.get("text-anchor") == "start")
    assert len(label_y) == 6
    assert all(below - above >= 12 for above, below in pairwise(label_y))
    assert label_y[-1] <= 186
    assert drawing.text_of_tag["text"][-6:] == ["<b>5", "<b>4", "<b>3", "<b>2", "<b>1", "<b>0"]


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 3, True, [1, 2, 3]),
        (0, 24_000, True, [0, 5000, 10_000, 15_000, 20_000]),
        (0, 2.1e-5, False, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
        (-3, 1, False, [-3, -2, -1, 0, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, whole: bool, expected: list[float]) -> None:
    assert ticks(low, high, 6, whole) == pytest.approx(expected)


def test_numbers_as_people_write_them() -> None:
    shown = {0: "0", 0.95: "0.95", 1234.5: "1,234", 12.34: "12.3", 2e-5: "2e-5", 0.00123: "0.00123", 3e7: "3e7"}
    assert {value: number(value) for value in shown} == shown
    assert number(-1.5) == "-1.5"
    assert number(math.nan) == number(math.inf) == "not finite"
    assert [duration(value) for value in (0.5, 59, 153.2, 11_100)] == ["0.5 s", "59 s", "2 min 33 s", "3 h 5 min"]


def test_a_rerankers_measures_are_not_said_to_be_of_a_dimension(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text("output_dir: run\n")
    measures = {"1": {"ndcg@10": 0.75}}
    lines = [
        {"step": step, "kind": kind, "queries": 3, "pages": 9, "metrics": measures, "embedder": {"ndcg@10": 0.5}}
        for step, kind in ((0, "before"), (4, "after"))
    ]
    (run / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(run).read_text()
    assert "nDCG@10 of the reranked pages" in text
    assert "nDCG@10 by the embedder alone" in text and "0.500" in text
    assert "1 dimensions" not in text


def test_the_page_says_what_became_of_the_queries(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step_line(1)])
    write_rankings(run, "before", [1, 2, None, 3, 1])
    page = _read(run)
    assert "The right page comes first for 2 of 5 queries before training." in page.words
    assert page.text_of_tag["option"] == ["Worst", "Alphabetical"]
    write_rankings(run, "after", [1, 1, 5, None, 2])
    page = _read(run)
    assert (
        "The right page comes first for 2 of 5 queries, as before training. 2 queries find it earlier, 2 later."
        in page.words
    )
    assert "All 5 queries of the evaluation." in page.words
    assert "random sample" not in page.words  # of all
    assert page.text_of_tag["option"] == ["Biggest gain", "Biggest loss", "Worst now", "Alphabetical"]
    cards = [found for tag, found in page.tags if tag == "li" and "data-gain" in found]
    moves = [text.strip() for text in page.text_of_tag["p"] if "rank" in text and "\N{RIGHTWARDS ARROW}" in text]
    assert [move.split(" random")[0] for move in moves] == [
        "rank 2 \N{RIGHTWARDS ARROW} 1 better",
        "rank > 1,000 \N{RIGHTWARDS ARROW} 5 better",
        "rank 1 \N{RIGHTWARDS ARROW} 1 as before",
        "rank 3 \N{RIGHTWARDS ARROW} > 1,000 worse",
        "rank 1 \N{RIGHTWARDS ARROW} 2 worse",
    ]
    assert [card["data-tags"] for card in cards] == ["better", "better wrong", "", "worse wrong", "worse"]
    assert float(cards[-1]["data-gain"]) == 0.5 and float(cards[3]["data-now"]) == -1001
    # The right page of the third query is not shown among the first five before, but after.
    assert "right page" not in page.text_of_tag["h4"]


def test_a_right_page_that_no_ranking_shows_stands_beside_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_rankings(run, "before", [1, 7, *[1] * 8])
    page = _read(run)
    assert page.text_of_tag["h4"].count("right page") == 1
    labels = [found["aria-label"] for tag, found in page.tags if tag == "button" and "aria-label" in found]
    assert "the right page, which is not among these: a.tar/k1.png" in labels
    assert "wrong page at rank 1 before training, score 1: a.tar/k2.png" in labels
    assert "right page at rank 1 before training, score 1: a.tar/k0.png" in labels


def test_rankings_of_another_task_do_not_stand_side_by_side(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_rankings(run, "before", [3, 3, 3], fingerprint="other")
    write_rankings(run, "after", [1, 1, 2])
    page = _read(run)
    assert "The right page comes first for 2 of 3 queries after training." in page.words
    assert "The rankings before training are of other queries or pages and are not shown beside these." in page.words
    assert set(page.text_of_tag["h4"]) == {"after training"}


def test_pages_without_a_picture_are_shown_by_words(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for card, words in (
        ({"kind": "audio"}, "audio"),
        ({"kind": "text", "words": "of <b> old"}, "of <b> old"),
        ({"fault": "the member is cut"}, "the member is cut"),
        ({"picture": "ab12.jpg", "width": 3, "height": 4}, "image"),  # whose file somebody has removed
    ):
        write_rankings(run, "before", [1, 1], **card)
        page = _read(run)
        shown = {found for found in page.text_of_tag["span"] if found}
        assert words in shown
        assert "data:" not in (run / "report.html").read_text().replace("img-src data:", "")


def test_queries_from_the_shards_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    evil = "</script></style><script>alert(1)</script>\"'"
    write_rankings(run, "before", [1, 1], asked=evil, name=evil)
    page = _read(run)
    assert page.text_of_tag["h3"][-2:] == [f"{evil} 0", f"{evil} 1"]
    assert len(page.text_of_tag["script"]) == 1 and "alert" not in page.text_of_tag["script"][0]
    script_hash = base64.b64encode(hashlib.sha256(page.text_of_tag["script"][0].encode()).digest()).decode()
    policy = next(found for _, found in page.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{script_hash}';" in policy["content"]


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("after.jsonl", lambda text: text.replace('"rank": 2', '"rank": "2"'), "line 3: 'rank' is '2', not a number"),
        ("after.jsonl", lambda text: text[: text.rindex("{")], "line 1: 'queries' is 3, but 2 follow"),
        ("after.jsonl", lambda text: text.replace('"hits": [2]', '"hits": 2'), "line 3: 'hits' is no list of int"),
        ("after.jsonl", lambda text: "", "is missing or empty"),
        ("after-shown.json", lambda text: text[:-1], "after-shown.json: this is not a complete JSON object"),
        ("after-shown.json", lambda text: text.replace('"2": {', '"x": {'), "'pages' has nothing for page 2"),
        ("after-shown.json", lambda text: text.replace('"line": 2', '"line": 7'), "'line' is 7, but there are 3"),
    ],
)
def test_a_damaged_gallery_is_named(tmp_path: Path, file: str, change: Any, complaint: str) -> None:
    run = write_run(tmp_path / "run")
    write_rankings(run, "before", [3, 3, 3])
    write_rankings(run, "after", [1, 2, 3])
    path = run / "gallery" / file
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=re.escape(complaint)) as caught:
        write_report(run)
    assert str(path) in str(caught.value)


def test_rankings_that_a_kill_left_half_are_passed_by(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_rankings(run, "after", [1, 2])
    (run / "gallery" / "after-shown.json").unlink()
    assert "Queries" not in _read(run).words
    write_rankings(run, "before", [2, 2])
    assert "comes first for 0 of 2 queries before training" in _read(run).words


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"state": "running"}, "farnear report \N{MIDDLE DOT} running, at step 1 when this was written"),
        ({"state": "finished"}, "farnear report \N{MIDDLE DOT} finished 2026-11-22 01:00 UTC run"),
        (
            {"state": "stopped", "reason": "SIGTERM at <rank 1>"},
            "stopped 2026-11-22 01:00 UTC: SIGTERM at <rank 1> run",
        ),
        ({}, "farnear report run"),
    ],
)
def test_the_page_says_how_the_run_ended(tmp_path: Path, status: dict[str, str], words: str) -> None:
    run = write_run(tmp_path / "run", [step_line(1)])
    (run / "status.json").write_text(json.dumps({**status, "time": "2026-11-22T01:00:00Z"}))
    assert words in _read(run).words


def test_padding_quarantine_and_minings_are_drawn_where_they_are_recorded(tmp_path: Path) -> None:
    steps = [step_line(step, padding_share=step / 10, quarantined=3 * (step == 2)) for step in (1, 2, 3)]
    run = write_run(tmp_path / "run", steps)
    mined = [
        {"step": step, "pairs": 1000, "negatives": 4000, "pairs_with_fewer": 7, "seconds": 61.0} for step in (1, 2)
    ]
    (run / "mined.jsonl").write_text("".join(json.dumps({**line, "phases": {}}) + "\n" for line in mined))
    page = _read(run)
    assert page.drawing("Padding") == "Padding: 10 at step 1, 30 at step 3, lowest 10, highest 30"
    assert "Padding 20.0% in the mean of the steps" in page.words
    assert (
        page.drawing("Quarantined pairs").endswith("lowest 0, highest 3") and "Quarantined pairs 3 in all" in page.words
    )
    assert "Hard negatives mined anew" in page.words and "2 1,000 4,000 7 1 min 1 s" in page.words
    older = _read(write_run(tmp_path / "older", [step_line(1)]))
    assert not {"Padding", "Quarantined", "mined anew"} & set(older.words.split())
    (run / "mined.jsonl").write_text(json.dumps({**mined[0], "pairs": "many"}) + "\n")
    with pytest.raises(UserError, match=r"mined.jsonl line 1: 'pairs' is 'many', not a number"):
        write_report(run)
