"""Which checkpoints stay, and how the others go: out of sight first, and never at the cost of the run."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from farnear.run_folder import published_checkpoints
from farnear.training.checkpoint import MANIFEST


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, beside the newest and the best.

    Attributes:
        newest: That many of the periodic ones; None keeps all.
        every: Those of steps that are a multiple of it.
    """

    newest: int | None = None
    every: int | None = None


def retain(checkpoints: Path, retention: Retention, best_step: int | None) -> list[Path]:
    """Take all out of sight but the newest, those that are to be kept of the periodic ones, and the best.

    Returns:
        Where the others are, for their removal: a half-removed folder must not look like a checkpoint.
    """
    *older, newest = published_checkpoints(checkpoints)
    periodic = [path for path in [*older, newest] if _is_periodic(path)]
    kept = {newest, *(periodic if retention.newest is None else periodic[-retention.newest :])}
    kept |= {path for path in periodic if retention.every and _step_of(path) % retention.every == 0}
    doomed = []
    for path in older:
        if path not in kept and _step_of(path) != best_step:
            out_of_sight = path.with_name(f".removing-{path.name}")
            try:
                os.rename(path, out_of_sight)
            except OSError as error:
                _tell(path, error)
            else:
                doomed.append(out_of_sight)
    return doomed


def remove(path: Path) -> None:
    """Remove a folder, or the link in its place. What the system refuses is told; it is no reason to end a run."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        _tell(path, error)


def _tell(path: Path, error: OSError) -> None:
    print(f"{path} cannot be removed ({error}); remove it by hand", flush=True)


def set_aside(folder: Path) -> Path:
    """Move a damaged checkpoint out of the way of those to come, without removing anything; where to."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.damaged" + (f"-{number}" if number else ""))).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def _is_periodic(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("periodic", True))
    except (OSError, ValueError):
        return True


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
