"""Saving and loading of checkpoints in tests, without a run around it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from farnear.parallel.world import World
from farnear.training.checkpoint import MANIFEST, SEAL, Progress, folder_name, seal_of, whole_checkpoint
from farnear.training.restoring import load_state
from farnear.training.retention import Retention
from farnear.training.saving import Saver
from farnear.training.scale import TrainedState
from farnear.training.watch import Watch

ABOUT: dict[str, Any] = {"strategy": "ddp", "config_hash": "", "versions": {}}
ALL = Retention()


def saver_of(checkpoints: Path, world: World, retention: Retention = ALL, **keys: Any) -> Saver:
    """A saver like a run's; it waits for each save unless told otherwise."""
    return Saver(checkpoints, world, retention, ABOUT, Watch(), **{"in_background": False, **keys})


def save_checkpoint(
    checkpoints: Path,
    state: TrainedState,
    step: int,
    world: World,
    *,
    periodic: bool = True,
    best_step: int | None = None,
) -> Path:
    """Publish the state as that of a step. A collective."""
    saver_of(checkpoints, world).save(state, Progress(step, 1, 2, "f", best_step=best_step), periodic=periodic)
    return checkpoints / folder_name(step)


def load_checkpoint(folder: Path, state: TrainedState, world: World) -> None:
    """Verify a checkpoint and load it. A collective."""
    load_state(whole_checkpoint(folder, world, verify=True), state, world)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a manifest says, and seal it as if it had been written so."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    text = json.dumps(manifest)
    (folder / MANIFEST).write_text(text)
    (folder / SEAL).write_text(seal_of(text.encode()))
