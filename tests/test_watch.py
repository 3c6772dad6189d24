"""`farnear watch`: a run's files read as they grow, in every state that a run folder can be found in."""

import io
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from farnear.cli import main
from farnear.course import Course
from farnear.launching.slurm import waiting_job
from farnear.report import following
from farnear.report.following import Following
from farnear.report.tail import Tail, samples
from farnear.report.watch_text import ASCII_BLOCKS, news, one_line, picture, sparkline
from farnear.report.watching import watch
from farnear.run_folder import RunFolder
from farnear.status import write_status

COURSE = Course(total_steps=600, epochs=3, ranks=4, eval_steps=100, evaluates=True)
NOBODY = 2**22 + 1  # above what Linux gives a process


def metrics(step: int, **figures: Any) -> dict[str, Any]:
    loss = {"loss": 4.0 - step / 200, "lr": 1e-5, "grad_norm": 0.5, "pairs_per_s": 93.1}
    seconds = {"data": 0.5, "pass_one": 0.5, "pass_two": 1.0}
    more = {"peak_memory_bytes": 41.2e9, "padding_share": 0.03, "seconds": seconds}
    return {"step": step, "epoch": step // 200, **loss, **more, **figures}


def evaluation(step: int, kind: str, value: float, pages: int = 200) -> dict[str, Any]:
    by_dim = {dim: {"ndcg@10": value / divisor} for divisor, dim in enumerate(("2048", "512", "64"), 1)}
    return {"step": step, "kind": kind, "queries": 100, "pages": pages, "seconds": 30.0, "metrics": by_dim}


def append(path: Path, *records: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def beat(folder: RunFolder, rank: int, step: int, place: str, moves: int, ago: float = 0.0) -> None:
    folder.heartbeats.mkdir(exist_ok=True)
    told = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago))
    facts = {"rank": rank, "pid": 7, "host": "n1", "moves": moves, "step": step, "place": place, "time": told}
    path = folder.heartbeats / f"rank-{rank:05d}.json"
    path.with_suffix(".tmp").write_text(json.dumps(facts))
    os.replace(path.with_suffix(".tmp"), path)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of 120 of 600 steps, on four ranks."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.lock.touch()
    write_status(folder, "running", step=0, **COURSE.as_plain())
    append(folder.metrics, *(metrics(step) for step in range(1, 121)))
    append(folder.evaluations, evaluation(0, "before", 0.2), evaluation(100, "during", 0.4, pages=50))
    append(folder.saves, {"step": 100, "seconds": 12.34, "seconds_waited": 0.5})
    folder.latest.write_text("step-00000100\n")
    folder.best.write_text("step-00000100\n")
    for rank in range(4):
        beat(folder, rank, 121, "step 121, pass two, mini-batch 3", 1000)
    return folder


JUNK = (None, "low", True, -5, 2.5, 1e400, float("nan"), [1], {"a": {}}, 10**40, "\ud800")


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_junk_in_any_place_of_any_record_draws_no_less_than_the_rest(folder: RunFolder, junk: Any) -> None:
    """Disks fill and files are edited: who watches a run sees what can be seen."""
    append(folder.minings, {"step": 60, "negatives": 9, "seconds": 3.0})
    append(folder.bad_steps, {"step": 7, "what": "loss", "action": "left out"})
    append(folder.quarantine, {"step": 7, "shard": "a.tar", "key": "k"})
    for path in (folder.metrics, folder.evaluations, folder.saves, folder.minings, folder.bad_steps, folder.quarantine):
        whole = path.read_text()
        record = json.loads(whole.splitlines()[-1])
        before = Following(folder.path).look()
        for key in (*record, "everything"):
            changed = dict.fromkeys(record, junk) if key == "everything" else {**record, key: junk}
            path.write_text(whole + json.dumps(changed) + "\n" + "[" * 100_000 + "\n\x00\n")
            view = Following(folder.path).look()
            shown = picture(view, 100, 30), one_line(view), *news(before, view)
            assert "running" in shown[0] and "nDCG@10" in shown[0] and "step 120/600" in shown[0], key
            for line in shown:
                line.encode()
        path.write_text(whole)
    status = json.loads(folder.status.read_text())
    for key in status:
        folder.status.write_text(json.dumps({**status, key: junk}))
        picture(Following(folder.path).look(), 100, 30)


# Files that grow


def test_a_file_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.look() == (False, [])
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.look() == (False, [{"step": 1}, {"step": 2}])
    assert tail.look() == (False, [])
    with open(path, "a") as file:
        file.write('ep": 3}\nnonsense\n[4]\n{"step": 5}\n')
    assert tail.look() == (False, [{"step": 3}, {"step": 5}])


@pytest.mark.parametrize("later", ['{"step": 1}\n', '{"step": 1}\n{"step": 2, "loss": 3.5}\n{"step": 3}\n'])
def test_a_file_that_was_cut_or_replaced_is_read_anew(tmp_path: Path, later: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    tail = Tail(path)
    tail.look()
    path.write_text(later)
    assert tail.look() == (True, [json.loads(line) for line in later.splitlines()])
    path.unlink()
    assert tail.look() == (True, [])
    assert tail.look() == (False, [])
    path.write_text('{"step": 7}\n')
    assert tail.look() == (False, [{"step": 7}])


def test_of_a_long_file_the_end_is_read_and_the_rest_sampled(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps(metrics(step)) + "\n" for step in range(1, 30_001))
    assert path.stat().st_size > 5e6
    _, records = Tail(path, first_look_bytes=10_000).look()
    steps = [record["step"] for record in records]
    assert steps == list(range(steps[0], 30_001)) and 20 < len(steps) < 60
    sampled = [record["step"] for record in samples(path, 20)]
    assert sampled == sorted(set(sampled)) and sampled[0] == 1 and sampled[-1] > 28_000 and len(sampled) < 1000
    # A look after the first one costs what has come since.
    view = Following(tmp_path)
    losses = view.look().losses
    assert losses[0][0] < 20 and losses[-1][0] == 30_000 and len(losses) <= 2048
    append(path, metrics(30_001))
    started = time.perf_counter()
    assert view.look().step == 30_001
    assert time.perf_counter() - started < 0.05


def test_a_resume_that_cuts_the_records_shows_no_step_twice(folder: RunFolder) -> None:
    seen = Following(folder.path)
    assert seen.look().step == 120
    lines = folder.metrics.read_text().splitlines(keepends=True)
    folder.metrics.write_text("".join(lines[:100]))
    assert seen.look().step == 100
    append(folder.metrics, metrics(101, loss=9.0))
    view = seen.look()
    assert [record["step"] for record in view.recent] == list(range(52, 102))
    assert [step for step, _ in view.losses] == list(range(1, 102))


# What is shown


def test_the_picture_has_it_all(folder: RunFolder) -> None:
    append(folder.bad_steps, {"step": 90, "what": "loss", "action": "left out"})
    append(folder.quarantine, *({"step": 3, "shard": "a.tar", "key": key} for key in ("x", "y", "y")))
    text = picture(Following(folder.path).look())
    lines = text.splitlines()
    assert len(lines) < 24 and all(len(line) <= 80 for line in lines)
    # 480 steps of 2 s, evaluations at 200, 300, 400, 500 and 600 of 30 s, one at the end, no further save.
    assert lines[1] == "running  step 120/600  epoch 1/3  19:00 left"
    assert lines[2].endswith(" 20.0%") and lines[2].count("█") == 14
    loss = next(line for line in lines if line.startswith("      loss"))
    assert loss.startswith("      loss  3.4225    ██") and loss.endswith("▁")
    for words in (
        "lr 1.00e-05  grad norm 0.500  93.1 pairs/s  41.2 GB  padding 3%",
        "2.00 s a step: pass two 50%  data 25%  pass one 25%",
        "evaluations 1:00",
        "at step 100 (100 queries, 50 pages)",
        "2048  0.4000",
        "step-00000100 in 12.3 s  best step-00000100",
        "1 bad step, the last is 90 (loss); 2 pairs in quarantine",
        "ranks 0-3  step 121, pass two, mini-batch 3, ",
    ):
        assert words in text, words
    append(folder.evaluations, evaluation(600, "after", 0.8))
    after = picture(Following(folder.path).look())
    assert "at step 600 (100 queries, 200 pages)  before at step 0\n" in after
    assert "512  0.1000 -> 0.4000" in after


@pytest.mark.parametrize(("width", "height"), [(40, 24), (80, 12), (200, 60), (20, 5), (3, 9)])
def test_the_picture_fits_the_terminal(folder: RunFolder, width: int, height: int) -> None:
    metrics_by_dim = {str(2**power): {"ndcg@10": 0.5} for power in range(4, 14)}
    append(folder.evaluations, {**evaluation(110, "during", 0.4), "metrics": metrics_by_dim})
    for rank in range(4):
        beat(folder, rank, 121, f"step 121, in phase {rank}", 1000)
    lines = picture(Following(folder.path).look(), width, height).splitlines()
    assert len(lines) < height and all(len(line) <= width for line in lines)
    assert "running" in lines[1] or width < 7
    if height == 24:
        assert "more" in "".join(lines)


def test_losses_are_drawn_over_the_steps() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([(1, 2.0)], 10) == "▁"
    assert sparkline([(step, 8.0 - step) for step in range(8)], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([(step, step) for step in range(1, 101)], 4, ASCII_BLOCKS) == "_-*@"
    assert sparkline([(1, float("nan")), (2, 1.0), (3, 2.0)], 10) == "▁█"


def test_ranks_that_are_silent_behind_or_absent_are_marked(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Following(folder.path)
    assert not any(rank.mark for rank in seen.look().ranks)
    beat(folder, 0, 130, "step 130, reduce", 1100, ago=20)
    beat(folder, 1, 121, "step 121, data", 1001, ago=10)
    beat(folder, 2, 121, "step 121, data", 1001, ago=25)
    (folder.heartbeats / "rank-00003.json").unlink()
    assert [rank.mark for rank in seen.look().ranks] == ["", "9 behind", "", "no heartbeat"]
    # By this machine's clock, when the beats were seen to change.
    later = time.monotonic() + 65
    monkeypatch.setattr(following, "monotonic", lambda: later)
    beat(folder, 0, 130, "step 130, reduce", 1100)
    beat(folder, 1, 130, "step 130, pass one", 1200)
    view = seen.look()
    assert [rank.mark for rank in view.ranks] == ["stands for 65 s", "", "silent", "no heartbeat"]
    text = picture(view)
    assert "    rank 2  ! silent: step 121, data, 65 s ago" in text
    assert "    rank 3  ! no heartbeat" in text
    # At the first look the clocks are all there is.
    beat(folder, 2, 121, "step 121, data", 1001, ago=300)
    assert Following(folder.path).look().ranks[2].seconds_ago == pytest.approx(300, abs=2)


def test_ranks_that_cannot_be_are_not_counted_up_to(folder: RunFolder) -> None:
    (folder.heartbeats / "rank-99999999999.json").write_text(json.dumps({"step": 121}))
    status = json.loads(folder.status.read_text())
    assert [rank.number for rank in Following(folder.path).look().ranks] == [0, 1, 2, 3, 99999999999]
    folder.status.write_text(json.dumps({**status, "ranks": 2**40}))
    assert Following(folder.path).look().course is None


def test_words_from_files_move_no_cursor(folder: RunFolder) -> None:
    write_status(folder, "failed", reason="two\nlines \x1b[2J", exit_code=1)
    assert "\x1b" not in picture(Following(folder.path).look())


# States and ends


@pytest.mark.parametrize(
    ("state", "facts", "code", "told"),
    [
        ("finished", {"exit_code": 0}, 0, "finished  step 120/600"),
        ("stopped", {"exit_code": 75, "reason": "stopped by SIGTERM at rank 1"}, 75, "stopped by SIGTERM"),
        ("failed", {"exit_code": 2, "reason": "data.train names no shard"}, 2, "data.train names no shard"),
        ("failed", {}, 1, "failed"),
    ],
)
def test_it_ends_with_the_runs_exit_code(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], state: Any, facts: dict[str, Any], code: int, told: str
) -> None:
    write_status(folder, state, **COURSE.as_plain(), **facts)
    for words in ([], ["--once"]):
        assert main(["watch", str(folder.path), *words]) == code
        assert told in capsys.readouterr().out


def test_a_run_that_goes_on_is_followed_to_its_end(folder: RunFolder) -> None:
    out = io.StringIO()

    def go_on() -> None:
        time.sleep(0.3)
        append(folder.metrics, metrics(121))
        append(folder.evaluations, evaluation(121, "during", 0.5))
        append(folder.saves, {"step": 121, "seconds": 1.0})
        time.sleep(0.3)
        write_status(folder, "finished", step=121, exit_code=0, **COURSE.as_plain())

    running = threading.Thread(target=go_on)
    running.start()
    assert watch(folder.path, 0.1, stream=out) == 0
    running.join()
    lines = out.getvalue().splitlines()
    assert [line.partition("  loss")[0] for line in lines] == [
        "running  step 120/600  epoch 1/3",
        "step 121: nDCG@10 during training  2048: 0.5000  512: 0.2500  64: 0.1667",
        "step 121: saved",
        "running  step 121/600  epoch 1/3",
        "finished  step 121/600  epoch 1/3",
    ]
    assert lines[0].endswith("loss 3.4225  93.1 pairs/s  41.2 GB  19:00 left")


def test_before_a_run_has_written_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (tmp_path, tmp_path / "none"):
        assert main(["watch", str(run)]) == 2
        assert f"farnear: error: there is no run in {run}; name the output_dir" in capsys.readouterr().err
    folder = RunFolder(tmp_path)
    folder.lock.touch()
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "nothing has run yet" in capsys.readouterr().out
    write_status(folder, "running", step=None)
    beat(folder, 0, 0, "step 0, model", 3)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert "opening" in out and "is at  step 0, model" in out


def test_a_killed_run_is_told_from_one_elsewhere(folder: RunFolder) -> None:
    seen = Following(folder.path)
    for rank in range(4):
        beat(folder, rank, 121, "step 121, data", 1000, ago=100)
    status = json.loads(folder.status.read_text())
    folder.status.write_text(json.dumps({**status, "pid": NOBODY}))
    view = Following(folder.path).look()
    assert (view.state, view.exit_code) == ("killed", 1)
    assert "killed: its process is gone" in picture(view)
    folder.status.write_text(json.dumps({**status, "pid": NOBODY, "host": f"not-{platform.node()}"}))
    view = Following(folder.path).look()
    assert view.state == "running" and not view.has_ended
    assert "running, but no rank has been heard of for 1:4" in picture(view)
    assert seen.look().state == "running"  # who saw the beats change knows that they have just come


def test_a_job_that_waits_is_waited_for(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text('#!/bin/sh\ncase "$*" in *--name=farnear-run*) echo "12 PENDING (Priority)";; esac\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=os.pathsep)
    assert waiting_job(folder.path) is None
    folder.submitted.touch()
    assert waiting_job(folder.path) == "job 12 PENDING (Priority)"
    write_status(folder, "stopped", exit_code=75, reason="stopped by SIGUSR1", **COURSE.as_plain())
    assert main(["watch", str(folder.path), "--once"]) == 0
    assert "waiting: job 12 PENDING (Priority)  step 120/600" in capsys.readouterr().out
    write_status(folder, "finished", exit_code=0)
    assert main(["watch", str(folder.path)]) == 0
    for name in ("metrics", "status", "evaluations", "lock"):
        getattr(folder, name).unlink()
    assert main(["watch", str(folder.path), "--once"]) == 0
    assert "waiting: job 12 PENDING (Priority)" in capsys.readouterr().out


def test_a_run_file_names_its_folder(
    folder: RunFolder, write_run_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run_file(output_dir="elsewhere")
    assert main(["watch", str(run_file), f"output_dir={folder.path}", "--once"]) == 0
    assert "step 120/600" in capsys.readouterr().out
    assert main(["watch", str(folder.path), "seed=1"]) == 2
    assert "seed=1 changes a run file, and" in capsys.readouterr().err
    assert main(["watch", str(folder.path), "--interval", "0"]) == 2
    assert "'0' is not a number of seconds" in capsys.readouterr().err


# The terminal


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_another_size_of_the_terminal_is_drawn_at_once_and_ctrl_c_leaves(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("COLUMNS", "80")
    out, before = Screen(), {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}

    def resize_and_leave() -> None:
        for number in (signal.SIGWINCH, signal.SIGINT):
            time.sleep(0.3)
            monkeypatch.setenv("COLUMNS", "50")
            os.kill(os.getpid(), number)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    hand = threading.Thread(target=resize_and_leave)
    hand.start()
    started = time.monotonic()
    try:
        assert watch(folder.path, 60.0, stream=out) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    hand.join()
    assert time.monotonic() - started < 10
    first, second = out.getvalue().split("\033[H")[1:]
    longest = [max(len(line.removesuffix("\033[K")) for line in one.splitlines()) for one in (first, second)]
    assert 50 < longest[0] <= 80 and longest[1] <= 50
    assert out.getvalue().startswith("\033[2J") and out.getvalue().endswith("\n\033[J")
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_a_reader_that_has_enough_ends_it(folder: RunFolder) -> None:
    """And a terminal that knows no more than ASCII gets no more."""
    command = [sys.executable, "-m", "farnear", "watch", str(folder.path), "--interval", "0.1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as watching:
        assert watching.stdout is not None and watching.stderr is not None
        assert watching.stdout.readline().startswith(b"running  step 120/600")
        watching.stdout.close()
        append(folder.metrics, metrics(121))
        assert watching.wait(timeout=30) == 141
        assert watching.stderr.read() == b""
