"""From a checkpoint to a folder as `export/` is one: on a CPU, in one process, without the shards and without ranks.

A checkpoint holds the trained weights whole, in one form for all strategies; what else an export needs is in the base
model, and which one that is in the run file beside it.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from farnear.config import load_config
from farnear.errors import UserError
from farnear.files import replace_text
from farnear.model.base import at_commits
from farnear.model.export import export_model
from farnear.run_folder import RunFolder, checkpoint_named, published_checkpoints
from farnear.training.cards import facts_of_checkpoint, run_card
from farnear.training.checkpoint import MANIFEST, Checkpoint, fault_of, open_checkpoint
from farnear.training.restoring import whole_weights
from farnear.training.resume import commits_of

EXPORTED_OF = "exported_of"
"""In an export that was made on the way to something else: the hash of its checkpoint's manifest."""
OVERRIDES = ("card.", "model.name_or_path=", "model.revision=")
"""How what may be said otherwise than in a run's own run file begins."""


def export_checkpoint(path: Path, out: Path, *, best: bool = False, overrides: Sequence[str] = ()) -> Path:
    """Make a folder that `SentenceTransformer(out)` or `CrossEncoder(out)` loads, its card included.

    Every file of the checkpoint is hashed first. One that is torn is refused by name; none is fallen back to.

    Args:
        path: A run folder, whose newest checkpoint is taken, or a checkpoint, `RUN/checkpoints/step-NNNNNNNN`.
        out: Where to; there must be nothing, or an empty folder.
        best: Of a run, take the best checkpoint by its evaluations.
        overrides: Words as on a command line, of section card, or of where the base model is now.

    Returns:
        The checkpoint that was taken; its name tells the step.

    Raises:
        UserError: There is no whole checkpoint, its run file or base model is gone or another one, or ``out`` is taken.
    """
    for override in overrides:
        if not override.startswith(OVERRIDES):
            raise UserError(
                f"override {override}: a model that is trained already stays as it is; section card and "
                "model.name_or_path, where the base model is, can be set"
            )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already, and an export replaces nothing of yours; name another folder")
    folder = _checkpoint_of(checkpoint_named(path), best)
    run = RunFolder(folder.absolute().parents[1])
    checkpoint = _whole(folder)
    if not run.config.is_file():
        raise UserError(
            f"there is no {run.config}, which names the base model of checkpoint {folder}; leave a checkpoint in its "
            "run folder"
        )
    config = load_config(run.config, overrides)
    progress = checkpoint.progress
    base = at_commits(config.model, {} if _names_base(overrides) else commits_of(progress.bases))
    facts = facts_of_checkpoint(config, run, checkpoint)
    card = run_card(config, run, facts, progress.step, name=out.name, after=_exported_step(run) == progress.step)
    # A scale that is trained beside the model is none of its weights.
    weights = {
        name.removeprefix("model."): weight
        for name, weight in whole_weights(checkpoint).items()
        if name.startswith("model.")
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        out.rmdir()
    export_model(base, weights, out, config.reranker, card=card, frozen=checkpoint.manifest.frozen_hash)
    return folder


def export_once(path: Path, out: Path) -> None:
    """`export_checkpoint` unless ``out`` holds the export of that very checkpoint; one of another is replaced.

    Errors as there.
    """
    mark = out / EXPORTED_OF
    digest = hashlib.blake2b((path / MANIFEST).read_bytes() if (path / MANIFEST).is_file() else b"").hexdigest()
    if mark.is_file():
        if mark.read_text(encoding="utf-8") == digest:
            return
        shutil.rmtree(out)
    print(f"exporting {path} to {out}", flush=True)
    export_checkpoint(path, out)
    replace_text(mark, digest)


def _names_base(overrides: Sequence[str]) -> bool:
    """Whether a person says where the base model is."""
    return any(override.startswith("model.") for override in overrides)


def _checkpoint_of(path: Path, best: bool) -> Path:
    run = RunFolder(path)
    if not run.checkpoints.is_dir():
        if best:
            raise UserError(f"{path} is no run folder with checkpoints, of which one could be the best; drop --best")
        return path
    if not best:
        if published := published_checkpoints(run.checkpoints):
            return published[-1]
        raise UserError(f"run folder {path} holds no checkpoint; wait for the first one (training.save_steps)")
    if not run.best.is_file():
        raise UserError(
            f"run folder {path} names no best checkpoint, as nothing was evaluated on the way (evaluation.eval_steps); "
            "drop --best for the newest"
        )
    return checkpoint_named(run.best)


def _whole(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a run folder, or a checkpoint in RUN/checkpoints")
    checkpoint = open_checkpoint(folder)
    for name in sorted(checkpoint.manifest.files):
        if fault := fault_of(checkpoint, name):
            raise UserError(f"{fault}; name an older checkpoint of the run")
    return checkpoint


def _exported_step(run: RunFolder) -> int | None:
    """Whose weights were measured when the run had ended; None of one that has not."""
    try:
        step = json.loads(run.summary.read_text(encoding="utf-8"))["exported_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
