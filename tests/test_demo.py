"""The demo: a small one from the command to the three lines that it prints, and in `make soak` the real one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from own_lines import noise
from stages_here import run_stages_here

from farnear import demo, demo_reranker
from farnear.cli import main


def test_a_small_demo_ends_with_lines_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAIN_PAIRS", 300)
    monkeypatch.setattr(demo, "EVAL_PAIRS", 20)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--strategy", "zero2", "--ranks", "2", "--seed", "5"]) == 0
    printed, complaints = capfd.readouterr()
    assert noise(printed.splitlines()) == [] and complaints == ""
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["strategy"], summary["world_size"], summary["steps"]) == ("zero2", 2, 2)
    assert {"ndcg@10_before", "ndcg@10_after", "seconds", "pairs_per_s"} <= summary.keys()
    assert summary["ndcg@10_by_dim"].keys() == {"128", "64", "32"}
    assert f"{summary['ndcg@10_before']:.3f}" in printed
    assert "2/2" in printed
    assert (out / "report.html").exists()
    program = "\n".join(line.strip() for line in printed.splitlines()[-3:])
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert answer.stdout.startswith("tensor([[")
    assert answer.stdout.count(",") == 2


def test_a_small_demo_of_the_reranker_ends_with_lines_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_reranker, "TRAIN_PAIRS", 160)
    monkeypatch.setattr(demo_reranker, "EVAL_PAIRS", 12)
    monkeypatch.setattr(demo_reranker, "STEPS", {"embedder": 2, "reranker": 2, "distilled": 2})
    run_stages_here(monkeypatch)
    assert main(["demo", "--reranker", "--out", str(tmp_path / "demo"), "--strategy", "single"]) == 0
    printed = capfd.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    wanted = {"ndcg@10_embedder", "ndcg@10_reranked", "ndcg@10_after_flywheel"}
    assert all(0 < figures[name] <= 1 for name in wanted)
    assert figures["seconds_per_query"].keys() == {"embedder", "reranker"}
    assert list(figures["seconds_of_stage"]) == ["embedder", "negatives", "reranker", "judged", "distilled"]
    program = "\n".join(line.strip() for line in printed[-5:-2])
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert len(answer.stdout.strip("[]\n").split()) == 3


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds something that is not a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_wheel_gains_by_both_models(tmp_path: Path, capfd: pytest.CaptureFixture[str], seed: int) -> None:
    assert main(["demo", "--reranker", "--out", str(tmp_path / "demo"), "--seed", str(seed)]) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["ndcg@10_reranked"] > figures["ndcg@10_embedder"] + 0.05
    assert figures["ndcg@10_after_flywheel"] > figures["ndcg@10_embedder"] + 0.02


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("seed", "wanted"), [(0, 0.90), (1, 0.85), (2, 0.85)])
def test_the_demo_learns_to_read(tmp_path: Path, seed: int, wanted: float) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--seed", str(seed)]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["ndcg@10_before"] <= 0.10
    assert summary["ndcg@10_after"] >= wanted
