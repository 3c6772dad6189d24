"""Checkpoints: one canonical state for all strategies, complete or not there at all.

A checkpoint is a folder `checkpoints/step-NNNNNNNN`:

    rank-00000.safetensors ...   pieces of named parameters: weights, exp_avg, exp_avg_sq, each a flat slice
    manifest.json                what the pieces must add up to, where the run stood, and each file's size and hash

A rank writes the slices it holds, whatever the strategy; a tensor's key is `KIND/START/PARAMETER`. Loading puts the
slices of all ranks together again, so another number of ranks or another strategy is the same path, and refuses a
folder whose pieces do not cover every element of every parameter exactly once.

The order of a save is what makes it safe: a fresh folder with a name of its own, every rank's file synced to disk, then
the manifest, then one rename to the final name, then `latest`. A killed save leaves a folder that no one reads and the
next save removes. A published folder is never written to again.

There is no pickle, and no random state: order and dropout are pure functions of the seed and the step. The cursor is
the number of optimizer steps done.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from farnear.errors import RunStoppedError, UserError
from farnear.files import give_usual_mode, replace_text, sync_folder
from farnear.parallel.collectives import gather_objects
from farnear.parallel.strategy import ParameterSlice
from farnear.parallel.world import World, on_main_rank
from farnear.run_folder import published_checkpoints
from farnear.training.scale import TrainedState

FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what must be the same for it to continue.

    Attributes:
        step: Optimizer steps done: the cursor.
        seed, global_batch_size, fingerprint, order: With the step they decide which pairs come next. `order` is what
            the run file says about it, by name.
        epoch, plan_hash: Of the last step done: another order of pairs is noticed by its hash.
        best_metric, best_step: The best evaluation so far, if any.
        total_steps: Of the run file then: the learning rate's course depends on it.
        choices: What the run chose by the memory that it found (`farnear.training.choices`).
        loss_scale: Under training.fp16, the fields of `LossScale`.
        measured_by: What `best_metric` is a value of: another measure or another sample does not compare with it.
    """

    step: int
    seed: int
    global_batch_size: int
    fingerprint: str
    order: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    plan_hash: str = ""
    total_steps: int | None = None
    best_metric: float | None = None
    best_step: int | None = None
    measured_by: str = ""
    choices: Mapping[str, Any] = field(default_factory=dict)
    loss_scale: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest has been read."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return Progress(**self.manifest["progress"])


def save_checkpoint(
    checkpoints: Path,
    state: TrainedState,
    progress: Progress,
    world: World,
    about: Mapping[str, Any],
) -> Path:
    """Write and publish the state after ``progress.step`` steps. A collective.

    Args:
        checkpoints: The run's `checkpoints` folder.
        about: Further facts for the manifest: strategy, versions, saved_as_best (see `retain`).

    Raises:
        UserError: A rank could not write (on all ranks, naming the first).
        RunStoppedError: A weight is not finite.
    """
    _refuse_non_finite(state, progress.step)
    final = checkpoints / folder_name(progress.step)
    save_id = on_main_rank(world, lambda: _open_save(checkpoints, final))
    draft = checkpoints / f".saving-{save_id}"
    name = f"rank-{world.rank:05d}.safetensors"
    failure, facts = None, {}
    try:
        pieces = state.slices(owned=True)
        facts = _write_pieces(draft / name, pieces, {"save_id": save_id, "step": str(progress.step)})
        steps = {piece.name: int(piece.step) for piece in pieces}
    except (OSError, SafetensorError) as error:
        failure = f"rank {world.rank} cannot write {draft / name}: {error}"
        steps = {}
    reports = gather_objects((failure, name, facts, steps))
    failures = [report[0] for report in reports if report[0]]
    if failures:
        on_main_rank(world, lambda: shutil.rmtree(draft))
        raise UserError(
            f"checkpoint of step {progress.step} was not saved: {failures[0]}; what was saved before is untouched"
        )
    step_of_parameter = {name: step for report in reports for name, step in report[3].items()}
    manifest = {
        "format": FORMAT,
        "save_id": save_id,
        "world_size": world.world_size,
        "progress": asdict(progress),
        "parameters": {n: {"shape": list(shape), "step": step_of_parameter[n]} for n, shape in state.shapes.items()},
        "frozen_hash": state.frozen_hash,
        "files": {report[1]: report[2] for report in reports},
        **about,
    }
    on_main_rank(world, lambda: _publish(checkpoints, draft, final, manifest))
    return final


def load_state(checkpoint: Checkpoint, state: TrainedState) -> None:
    """Bring weights and AdamW's state to what a checkpoint holds. A collective; each rank reads for itself.

    Raises:
        UserError: The checkpoint is torn, mixed or short, or belongs to another model.
    """
    parameters = checkpoint.manifest["parameters"]
    saved, held = (
        {name: facts["shape"] for name, facts in parameters.items()},
        {n: list(s) for n, s in state.shapes.items()},
    )
    if odd := sorted(name for name in held.keys() | saved.keys() if held.get(name) != saved.get(name)):
        raise UserError(
            f"checkpoint {checkpoint.folder} is of another model: parameter {odd[0]} differs; "
            "set model.name_or_path, model.freeze, model.lora and loss.learn_scale as they were when the run began"
        )
    if checkpoint.manifest.get("frozen_hash", state.frozen_hash) != state.frozen_hash:
        raise UserError(
            f"checkpoint {checkpoint.folder} was trained beside other frozen weights or with another scale of its "
            "adapters; set model.name_or_path, model.revision and model.lora as they were when the run began"
        )
    pieces = state.slices(owned=False)
    # One kind after the other: only a third of the state is whole in memory at a time.
    for kind in KINDS:
        whole = _assemble(checkpoint, kind)
        for piece in pieces:
            target: Tensor = getattr(piece, f"{kind}_n")
            target.copy_(whole[piece.name][piece.start : piece.start + target.numel()])
    for piece in pieces:
        piece.step.fill_(parameters[piece.name]["step"])
    state.spread_weights()


def find_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The newest published checkpoint, or None where there is none.

    Raises:
        UserError: It has no readable manifest, or a file is missing or has another size.
    """
    published = published_checkpoints(checkpoints)
    return open_checkpoint(published[-1]) if published else None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check its files.

    Raises:
        UserError: Naming the file that is missing, short or of another save.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} has no readable manifest.json ({error}); remove the folder") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder} has format {manifest.get('format')}, this farnear reads {FORMAT}")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise UserError(f"checkpoint {folder} lacks {name}; remove the folder to continue from an older one")
        if path.stat().st_size != facts["bytes"]:
            raise UserError(
                f"checkpoint file {path} has {path.stat().st_size} bytes, not the {facts['bytes']} that were saved; "
                "remove the folder to continue from an older one"
            )
        if _hash_of(path) != facts["sha256"]:
            raise UserError(
                f"checkpoint file {path} does not hold what was saved (its hash differs); remove the folder"
            )
    return Checkpoint(folder, manifest)


def retain(checkpoints: Path, keep: int | None, best_step: int | None) -> None:
    """Remove checkpoints that were saved only for being the best and are no more, then the oldest beyond ``keep``.

    The newest and the best always stay.
    """
    best = folder_name(best_step) if best_step is not None else None
    *older, _newest = published_checkpoints(checkpoints)
    outdone = [path for path in older if path.name != best and _was_saved_as_best(path)]
    kept = [path for path in older if path not in outdone]
    removable = [path for path in kept if path.name != best]
    beyond = max(0, len(kept) + 1 - keep) if keep is not None else 0
    for path in [*outdone, *removable[:beyond]]:
        # Out of sight first: a half-removed folder must not look like a checkpoint.
        doomed = path.with_name(f".removing-{path.name}")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _was_saved_as_best(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest.get("saved_as_best"))


def folder_name(step: int) -> str:
    """`step-NNNNNNNN`."""
    return f"step-{step:08d}"


def _refuse_non_finite(state: TrainedState, step: int) -> None:
    pieces = state.slices(owned=True)
    bad = [piece.name for piece in pieces if not piece.weight_n.isfinite().all()]
    if all_bad := [name for names in gather_objects(bad) for name in names]:
        raise RunStoppedError(
            f"step {step}: the update made {all_bad[0]} non-finite, so nothing was saved; lower training.learning_rate "
            "and continue from the checkpoint before"
        )


def _open_save(checkpoints: Path, final: Path) -> str:
    if final.exists():
        raise UserError(
            f"checkpoint {final} exists already and is never overwritten; remove it or use another output_dir"
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    for leftover in [*checkpoints.glob(".saving-*"), *checkpoints.glob(".removing-*")]:
        print(f"removing {leftover}, the leftover of a save that did not finish")
        shutil.rmtree(leftover)
    save_id = uuid.uuid4().hex
    (checkpoints / f".saving-{save_id}").mkdir()
    return save_id


def _write_pieces(path: Path, pieces: list[ParameterSlice], metadata: dict[str, str]) -> dict[str, Any]:
    tensors = {
        f"{kind}/{piece.start}/{piece.name}": getattr(piece, f"{kind}_n").detach().float().cpu().contiguous()
        for piece in pieces
        for kind in KINDS
    }
    # Views of one flat buffer share memory, which safetensors refuses to write.
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata=metadata)
    give_usual_mode(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _hash_of(path)}


def _publish(checkpoints: Path, draft: Path, final: Path, manifest: dict[str, Any]) -> None:
    replace_text(draft / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    os.replace(draft, final)
    sync_folder(checkpoints)
    replace_text(checkpoints.parent / "latest", final.name + "\n")


def _assemble(checkpoint: Checkpoint, kind: str) -> dict[str, Tensor]:
    """Whole flat fp32 tensors of one kind by parameter name, from the slices of all files."""
    elements = {name: torch.Size(facts["shape"]).numel() for name, facts in checkpoint.manifest["parameters"].items()}
    whole = {name: torch.empty(count) for name, count in elements.items()}
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in elements}
    for file_name in checkpoint.manifest["files"]:
        path = checkpoint.folder / file_name
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("save_id") != checkpoint.manifest["save_id"]:
                    raise UserError(f"checkpoint file {path} is of another save than its manifest; remove the folder")
                for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                    key_kind, start, name = key.split("/", 2)
                    if key_kind == kind:
                        piece = file.get_tensor(key)
                        whole[name][int(start) : int(start) + piece.numel()] = piece
                        spans[name].append((int(start), int(start) + piece.numel()))
        except SafetensorError as error:
            raise UserError(f"checkpoint file {path} cannot be read ({error}); remove the folder") from None
    for name, count in elements.items():
        reached = 0
        for start, stop in sorted(spans[name]):
            if start != reached:
                break
            reached = stop
        if reached != count:
            raise UserError(
                f"checkpoint {checkpoint.folder} is not whole: {kind} of {name} is covered up to {reached} of {count} "
                "elements; remove the folder"
            )
    return whole


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
