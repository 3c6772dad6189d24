"""A slice of the fault campaign (`benchmarks/faults.py`, whole in `make soak`): broken, started again, the same end."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import FAULTS, MAIN_PLACES, PLACES, Scenario, can_mount, make_base, play, scenarios, undisturbed

SLICE = (
    "kill,write,1,zero2",
    "kill,rename,0,ddp",
    "kill,pass two,0,zero3",
    "term,pass one,1,zero2",
    "usr1,evaluation,0,ddp",
    "term,report,1,zero3",
    "exception,update,1,ddp",
    "full,write,1,zero2",
    "readonly,manifest,0,ddp",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    previous = dict(os.environ)
    yield make_base(tmp_path_factory.mktemp("faults"))
    os.environ.clear()
    os.environ.update(previous)


@pytest.fixture(scope="module")
def expected(base: Path) -> dict[str, dict[str, Any]]:
    return {strategy: undisturbed(base, strategy) for strategy in ("ddp", "zero2", "zero3")}


@pytest.mark.parametrize("words", SLICE)
def test_a_run_that_is_broken_comes_to_the_same_end(
    base: Path, expected: dict[str, dict[str, Any]], words: str
) -> None:
    fault, place, rank, strategy = words.split(",")
    if fault in ("full", "readonly") and not can_mount():
        pytest.skip("LEFT OUT: this process may not mount a small disk, which takes root")
    outcome = play(base, Scenario(fault, place, int(rank), strategy), expected[strategy])
    assert not outcome.wrong
    assert (outcome.lost_steps, outcome.hung, outcome.wrong_resume) == (0, False, False)


def test_a_frozen_rank_is_named_with_its_place_and_pairs(
    base: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tenth scenario of the slice; its folder is kept, to be looked at."""
    monkeypatch.setattr(faults.shutil, "rmtree", lambda *_, **__: None)
    outcome = play(base, Scenario("stop", "pass two", 0, "ddp"), expected["ddp"])
    assert not outcome.wrong
    [folder] = [path for path in base.glob("scenario-*") if (path / "run" / "hangs").exists()]
    [report] = (folder / "run" / "hangs").glob("*/report.txt")
    text = report.read_text()
    first = text.splitlines()[0]
    assert "silent: rank 0 (" in first
    assert "in step 5, pass two, mini-batch" in first
    assert "rank 1 waits in step 5, " in first
    assert first.count("(pairs in hand: train-000000.tar/") == 2
    assert "Thread 0x" in text
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "finished"


def test_the_campaign_holds_what_it_should() -> None:
    chosen = scenarios(every=False, faults=FAULTS)
    assert len(chosen) == len(set(chosen)) == len(PLACES) * len(FAULTS) >= 60
    assert {(one.place, one.fault) for one in chosen} == {(place, fault) for place in PLACES for fault in FAULTS}
    assert {one.rank for one in chosen} == {0, 1}
    assert all(one.rank == 0 for one in chosen if one.place in MAIN_PLACES)
    for fault in FAULTS:
        assert {one.strategy for one in chosen if one.fault == fault} == {"ddp", "zero2", "zero3"}
    assert len(scenarios(every=True, faults=FAULTS)) == 7 * 3 * (2 * len(PLACES) - len(MAIN_PLACES))
