"""Stages of a flywheel in this process, one rank each: launches are tested by themselves, and take most of the time."""

from pathlib import Path
from typing import Any

import pytest

import farnear
from farnear.config import load_config
from farnear.launching import flywheel
from farnear.launching.mining import inputs_of, is_done
from farnear.training.mine_ranks import mine_on_ranks, mining_config


def run_stages_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends."""
    monkeypatch.setattr(flywheel, "launch", _launch)
    monkeypatch.setattr(flywheel, "mine", _mine)


def _launch(run_file: Path, overrides: Any, *, resume: Any, **_: Any) -> int:
    farnear.train(load_config(run_file, overrides), resume=resume)
    return 0


def _mine(run_file: Path, overrides: Any, *, out: Path, **_: Any) -> int:
    config = load_config(run_file, overrides)
    if not is_done(out, inputs_of(config)):
        mine_on_ranks(mining_config(config), out, inputs_of(config))
    return 0
