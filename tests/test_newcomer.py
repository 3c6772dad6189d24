"""docs/first-run.md, walked as it stands: 200 PNGs and a CSV become a model that sentence-transformers loads.

By default its commands run in this process, for their imports would take most of the time; `make soak` types them into
a shell.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset
from encode_here import encode_here

from farnear.cli import main, train_command
from farnear.ingest.synthetic import synthesise
from farnear.launching import local

DOC = Path(__file__).parents[1] / "docs" / "first-run.md"
PAIRS = 200
STEPS = 4 * 5


def blocks(language: str) -> list[tuple[str, str]]:
    """(title, text) of the document's blocks in a language."""
    block = rf'^```{language}(?: title="([^"]*)")?\n(.*?)^```'
    return re.findall(block, DOC.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a newcomer's pages, table and run file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARNEAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pages").mkdir()
    shards, _ = synthesise(tmp_path / "drawn", train_pairs=PAIRS, eval_pairs=0, seed=0, size=(96, 128))
    with open("pairs.csv", "w", encoding="utf-8", newline="") as file:
        ((_, header),) = blocks("csv")
        rows = csv.writer(file)
        rows.writerow(header.splitlines()[0].split(","))
        for number, sample in enumerate(webdataset.WebDataset(list(map(str, shards)), shardshuffle=False), 1):
            image = Path("pages") / f"{number:04d}.png"
            image.write_bytes(sample["png"])
            rows.writerow([json.loads(sample["json"])["query"], image])
    for title, text in blocks("yaml"):
        (tmp_path / title).write_text(text, encoding="utf-8")
    return tmp_path


def look_at(here: Path, told: str) -> None:
    """What every step has left."""
    assert f"{PAIRS} " not in told.split("shards inspect")[0] or len(list((here / "pages").iterdir())) == PAIRS
    summary = json.loads((here / "runs" / "first" / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["quarantined"] == 0
    compared = json.loads((here / "evaluation" / "comparison.json").read_text())["differences"]
    at_full = next(one for one in compared if one["measure"] == "ndcg@10" and one["dim"] == 128)
    assert at_full["value"] == pytest.approx(summary["ndcg@10_after"], abs=1e-4)
    assert at_full["baseline"] == pytest.approx(summary["ndcg@10_before"], abs=1e-4)
    assert at_full["value"] > at_full["baseline"]
    report = (here / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    assert "data:image/jpeg" in report and str(here / "runs") not in report
    assert "license: mit" in (here / "runs" / "first" / "export" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^pages/\d{4}\.png$", told, re.MULTILINE)


def test_the_first_run_works_as_it_is_written_down(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def supervise(command: Sequence[str], *_: Any, **__: Any) -> int:
        words = list(command)
        return train_command(words[next(n for n, word in enumerate(words) if word.endswith("train.py")) + 1 :])

    monkeypatch.setattr(local, "supervise", supervise)
    encode_here(monkeypatch)
    for _, text in blocks("sh"):
        for line in text.splitlines():
            program, *words = shlex.split(line)
            if program == "farnear":
                assert main(words) == 0, line
            else:
                assert (program, words[0]) == ("python", "-c")
                exec(words[1], {})
    for _, text in blocks("python"):
        exec(text, {})
    look_at(here, capsys.readouterr().out)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_first_run_works_in_a_shell(here: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "".join(text for _, text in blocks("sh"))
    script += "".join(f"python - <<'EOF'\n{text}EOF\n" for _, text in blocks("python"))
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    look_at(here, ended.stdout)


def test_every_command_of_farnear_that_it_names_is_run() -> None:
    run = {line.split()[1] for _, text in blocks("sh") for line in text.splitlines() if line.startswith("farnear")}
    assert run == {"shards", "tiny", "plan", "launch", "compare", "report"}
