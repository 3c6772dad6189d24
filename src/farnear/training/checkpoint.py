"""What a checkpoint is: one canonical state for all strategies, whole or refused by name.

A checkpoint is a folder `checkpoints/step-NNNNNNNN`:

    rank-00000.0.safetensors ...   pieces of named parameters: weight, exp_avg, exp_avg_sq, each a flat slice
    manifest.json                  what the pieces add up to, where the run stood, each file's size, hash and pieces
    manifest.xxh128                the manifest's own hash, as `xxh128sum` writes it

A rank writes the slices it holds, whatever the strategy; a tensor's key is `KIND/START/PARAMETER`. Together the pieces
cover every element of every parameter exactly once, so another number of ranks or another strategy is the same path:
each rank reads what overlaps with the slices that it is to hold (`farnear.training.restoring`). How a folder comes to
be there, and never in part, is `farnear.training.saving`'s to know.

There is no pickle, and no random state: order and dropout are pure functions of the seed and the step. The cursor is
the number of steps done. Where only adapters or heads train, only those are there, and a hash of what they
stand beside.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import xxhash
from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from farnear.errors import UserError
from farnear.parallel.collectives import gather_objects
from farnear.parallel.world import World, on_main_rank
from farnear.run_folder import Resume, published_checkpoints
from farnear.training.bad_steps import Numbers

FORMAT = 2
KINDS = ("weight", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
SEAL = "manifest.xxh128"

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what must be the same for it to continue.

    Attributes:
        step: Steps done: the cursor.
        seed, global_batch_size, fingerprint, order: With the step they decide which pairs come next. `order` is what
            the run file says about it, by name.
        epoch, plan_hash: Of the last step done: another order of pairs is noticed by its hash.
        best_metric, best_step: The best evaluation so far, if any.
        evaluated_step: The last step that was evaluated: one that was due and is not, is made up for.
        total_steps: Of the run file then: the learning rate's course depends on it.
        choices: What the run chose by the memory that it found (`farnear.training.choices`).
        loss_scale: Under training.fp16, the fields of `LossScale`.
        measured_by: What `best_metric` is a value of: another measure or another sample does not compare with it.
        numbers: The losses that the next ones are held against.
        mined_step, mined_hash: When the run has mined hard negatives last, if it has, and the hash of their file.
        bases: Of base models on the hub, by the key that names each: name and revision as the run file says them, and
            the commit that was trained.
    """

    step: Annotated[int, Ge(0)]
    seed: int
    global_batch_size: int
    fingerprint: str
    order: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    plan_hash: str = ""
    total_steps: int | None = None
    best_metric: float | None = None
    best_step: int | None = None
    evaluated_step: int | None = None
    measured_by: str = ""
    choices: Mapping[str, Any] = field(default_factory=dict)
    loss_scale: Mapping[str, Any] | None = None
    numbers: Numbers = field(default_factory=Numbers)
    mined_step: int | None = None
    mined_hash: str = ""
    bases: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SavedFile(_Facts):
    """One file of a checkpoint: its size, its hash, and START and STOP of its piece of each parameter."""

    bytes: int
    xxh3_128: str
    pieces: dict[str, tuple[int, int]]


class SavedParameter(_Facts):
    """Shape of a parameter, and how many steps AdamW has taken with it."""

    shape: tuple[int, ...]
    step: Annotated[int, Ge(0), Le(2**53)]


# Nothing but a plain name: what a manifest says cannot lead out of its folder.
FileName = Annotated[str, StringConstraints(pattern=r"^rank-\d{5,}\.\d+\.safetensors$")]


class Manifest(_Facts):
    """What `manifest.json` holds.

    Attributes:
        save_id: Stands in every file too, so that files of two saves do not mix.
        config_hash: Of the resolved run file.
        periodic: Whether it was saved because its step was due; others go when they are neither the newest nor the
            best.
    """

    format: int
    save_id: str
    strategy: str
    world_size: int
    progress: Progress
    config_hash: str
    versions: dict[str, str]
    periodic: bool
    parameters: dict[str, SavedParameter]
    frozen_hash: str
    files: dict[FileName, SavedFile]


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest has been read, and whose files are there and as long as it says."""

    folder: Path
    manifest: Manifest

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return self.manifest.progress


def folder_name(step: int) -> str:
    """`step-NNNNNNNN`."""
    return f"step-{step:08d}"


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest, and see that its files are all there and of the right size.

    Raises:
        UserError: Naming what is missing, short, or not covered.
    """
    manifest = _read_manifest(folder)
    if folder.name != folder_name(manifest.progress.step):
        raise UserError(f"checkpoint {folder} is a copy under another name, of {folder_name(manifest.progress.step)}")
    for name, facts in manifest.files.items():
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            raise UserError(f"checkpoint {folder} lacks {name} ({error.strerror})") from None
        if size != facts.bytes:
            raise UserError(f"checkpoint file {folder / name} has {size} bytes, not the {facts.bytes} that were saved")
    _refuse_gaps(folder, manifest)
    return Checkpoint(folder, manifest)


def fault_of(checkpoint: Checkpoint, name: str) -> str | None:
    """What is wrong with the content of one of its files, by its hash; None where nothing is."""
    path = checkpoint.folder / name
    try:
        found = hash_of(path)
    except OSError as error:
        return f"checkpoint file {path} cannot be read ({error.strerror})"
    if found != checkpoint.manifest.files[name].xxh3_128:
        return f"checkpoint file {path} does not hold what was saved (its hash differs)"
    return None


def whole_checkpoint(folder: Path, world: World, *, verify: bool) -> Checkpoint:
    """A checkpoint that every rank may read. A collective: each rank hashes its share of the files.

    Args:
        verify: Whether contents are hashed, or only names and sizes looked at.

    Raises:
        UserError: On all ranks: the first thing that is wrong with it.
    """
    checkpoint = on_main_rank(world, lambda: open_checkpoint(folder))
    if verify:
        # On the ranks that saved it, that is the rank's own; no file is hashed twice.
        share = sorted(checkpoint.manifest.files)[world.rank :: world.world_size]
        faults = [fault for name in share if (fault := fault_of(checkpoint, name))]
        if found := [fault for of_rank in gather_objects(faults, world.control) for fault in of_rank]:
            raise UserError(found[0])
    return checkpoint


def checkpoint_to_resume(
    checkpoints: Path, resume: Resume | None, world: World, *, verify: bool
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint, or under "auto" the newest whole one, and what is wrong with those passed over.

    A collective.

    Raises:
        UserError: The newest is damaged and "auto" was not asked for, or none is whole.
    """
    published = on_main_rank(world, lambda: published_checkpoints(checkpoints)) if resume else []
    damaged: dict[Path, str] = {}
    for folder in reversed(published):
        try:
            return whole_checkpoint(folder, world, verify=verify), damaged
        except UserError as error:
            if resume != "auto":
                raise UserError(
                    f"{error}; say --resume auto to continue from the newest whole checkpoint before it, or remove "
                    f"{folder}"
                ) from None
            damaged[folder] = str(error)
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {checkpoints} is whole ({next(iter(damaged.values()))}); "
            "restore one from a copy, or start in a new output_dir"
        )
    return None, {}


def hash_of(path: Path) -> str:
    """xxh3-128 of a file's content, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def seal_of(manifest: bytes) -> str:
    """What stands beside a manifest."""
    return f"{xxhash.xxh3_128_hexdigest(manifest)}  {MANIFEST}\n"


def _read_manifest(folder: Path) -> Manifest:
    try:
        text, seal = (folder / MANIFEST).read_bytes(), (folder / SEAL).read_bytes()
        if seal != seal_of(text).encode():
            raise UserError(f"checkpoint {folder}: {MANIFEST} and {SEAL} do not fit, one of them is damaged")
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise ValueError("it is no JSON object")
        if tree.get("format") != FORMAT:
            raise UserError(f"checkpoint {folder} has format {tree.get('format')}, this farnear reads {FORMAT}")
        return Manifest.model_validate(tree)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise UserError(f"checkpoint {folder}: its {MANIFEST} is damaged ({where}: {detail['msg']})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} has no readable {MANIFEST} and {SEAL} ({error})") from None


def _refuse_gaps(folder: Path, manifest: Manifest) -> None:
    """Every element of every parameter is in one file, and in one only."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.parameters}
    for file_name, facts in manifest.files.items():
        for name, span in facts.pieces.items():
            if name not in spans:
                raise UserError(f"checkpoint {folder}: {file_name} holds {name}, which is none of its parameters")
            spans[name].append(span)
    for name, parameter in manifest.parameters.items():
        reached, elements = 0, 1
        for length in parameter.shape:
            elements *= length
        for start, stop in sorted(spans[name]):
            if start != reached or stop <= start:
                break
            reached = stop
        if reached != elements:
            raise UserError(
                f"checkpoint {folder} is not whole: {name} is covered up to {reached} of {elements} elements"
            )
