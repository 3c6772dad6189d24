"""What a run says: lines where they go into a pipe, one line drawn again and again on a terminal."""

import io
import sys
import threading
import time
from typing import Any

import pytest

from farnear.course import Course
from farnear.training import terminal as terminal_module
from farnear.training.terminal import Terminal
from farnear.training.watch import Watch

COURSE = Course(total_steps=4, epochs=2, ranks=1)


class Screen(io.StringIO):
    """A terminal that keeps what it was sent."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What can be read on it: a return goes to the start of the line, which is overwritten."""
        return [line.split("\r")[-1].replace("\033[K", "") for line in self.getvalue().split("\n")]


def put_up_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """In the test itself, for pytest takes the streams anew between fixtures and test."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("TERM", raising=False)
    return screen


def record(step: int, **figures: Any) -> dict[str, Any]:
    plain = {"step": step, "epoch": step // 3, "loss": 2.0 * step, "pairs": 8, "lr": 1e-3, "grad_norm": 0.5}
    speed = {"left_out": None, "pairs_per_s": 12.34, "peak_memory_bytes": 41.2e9, "seconds": {"data": 0.5, "loss": 1.5}}
    return {**plain, **speed, **figures}


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_pipe_gets_a_line_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(Watch()) as terminal:
        terminal.begin(COURSE, logging_steps=2)
        for step in (1, 2, 3):
            terminal.step(record(step))
        terminal.step(record(4, grad_norm=float("nan"), left_out="gradient", loss=None))
    assert capsys.readouterr().out.splitlines() == [
        "step 2/4  epoch 1/2  loss 3.0000  lr 1.00e-03  grad norm 0.500  12.3 pairs/s  41.2 GB  0:04 left",
        "step 4/4  epoch 2/2  loss 6.0000  lr 1.00e-03  grad norm none, gradient not finite  12.3 pairs/s  41.2 GB  "
        "0:00 left",
    ]


def test_a_pipe_that_has_heard_nothing_hears_where_the_run_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal_module, "SECONDS_OF_SILENCE", 0.2)
    monkeypatch.setattr(terminal_module, "_SECONDS_BETWEEN_DRAWS", 0.02)
    watch, said = Watch(), ""

    def heard(words: str) -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return words in said

    with Terminal(watch) as terminal:
        watch.at("model", step=0)
        wait_for(lambda: heard("model, for 0:0"))
        terminal.begin(COURSE, logging_steps=1)
        count = watch.counts("evaluation", 3)
        count("pages", 0, 50_000)
        time.sleep(0.1)
        count("pages", 12_000, 50_000)
        wait_for(lambda: heard("step 3/4: evaluation, 12,000 of 50,000 pages, 0:0"))
        watch.at("pass two", step=4, mini_batch=7)
        wait_for(lambda: heard("step 4/4: pass two, mini-batch 7, for 0:0"))
    assert " left\n" in said
    assert "\r" not in said and "\033" not in said


def test_a_rank_that_is_not_the_first_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal_module, "SECONDS_OF_SILENCE", 0.0)
    monkeypatch.setattr(terminal_module, "_SECONDS_BETWEEN_DRAWS", 0.01)
    with Terminal(Watch(), is_main=False):
        time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_live_line_below_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = put_up_screen(monkeypatch)
    monkeypatch.setattr(terminal_module, "_SECONDS_BETWEEN_DRAWS", 0.01)
    watch = Watch()
    with Terminal(watch) as terminal:
        terminal.begin(COURSE, logging_steps=4)
        watch.at("pass one", step=2, mini_batch=1)
        terminal.step(record(1))
        terminal.step(record(2))
        wait_for(lambda: "step 2/4" in screen.lines()[-1])
        live = screen.lines()[-1]
        assert live.startswith("|████████        | step 2/4  loss 4.0000  12.3 pairs/s  41.2 GB  0:04 left  pass one")
        # What is printed in parts, by another thread, stands whole above it.
        printing = threading.Thread(target=lambda: print("saved", "somewhere", flush=True))
        printing.start()
        printing.join()
        assert screen.lines()[-2:] == ["saved somewhere", live]
        watch.counts("evaluation", 2)("pages", 25, 100)
        wait_for(lambda: "evaluation, 25 of 100 pages" in screen.lines()[-1])
        assert screen.lines()[-1].startswith("|████            | step 2: ")
        monkeypatch.setenv("COLUMNS", "30")
        wait_for(lambda: len(screen.lines()[-1]) == 29)
        print("the last words, without an end", end="")
    assert screen.lines() == ["saved somewhere", "the last words, without an end", ""]
    assert sys.stdout is screen


def test_no_live_line_where_nothing_can_be_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = put_up_screen(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(terminal_module, "_SECONDS_BETWEEN_DRAWS", 0.01)
    with Terminal(Watch()) as terminal:
        terminal.begin(COURSE, logging_steps=1)
        terminal.step(record(1))
        time.sleep(0.1)
    assert "\r" not in screen.getvalue()
    assert screen.getvalue().count("\n") == 1
