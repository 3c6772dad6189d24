"""From a checkpoint to a rank's weights and moments: each rank reads the slices that it is to hold, and nothing else.

Which file holds which piece stands in the manifest, so a rank opens the files that overlap with its slices only, and of
those reads, through a memory map, the elements that it needs. On as many ranks and under the strategy that saved, that
is one file a rank; on others a few. Under `ddp`, where every rank holds everything, every rank reads everything.

For an export, which needs no moments and no ranks, `whole_weights` reads a checkpoint's weights alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from farnear.errors import UserError
from farnear.parallel.collectives import gather_objects
from farnear.parallel.strategy import ParameterSlice
from farnear.parallel.world import World
from farnear.training.checkpoint import KINDS, Checkpoint
from farnear.training.scale import TrainedState


def load_state(checkpoint: Checkpoint, state: TrainedState, world: World) -> None:
    """Bring weights and AdamW's state to what a checkpoint holds. A collective.

    Raises:
        UserError: On all ranks: the checkpoint belongs to another model, or a file is not what the manifest says.
    """
    _refuse_another_model(checkpoint, state)
    fault = None
    slices = state.slices(owned=False)
    try:
        for name, overlaps in _overlaps_by_file(checkpoint, slices).items():
            _read(checkpoint, name, overlaps)
    except UserError as error:
        fault = str(error)
    if found := [fault for fault in gather_objects(fault, world.control) if fault]:
        raise UserError(found[0])
    for piece in slices:
        piece.step.fill_(checkpoint.manifest.parameters[piece.name].step)
    state.spread_weights()


def whole_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every trained parameter, fp32 on the CPU, by its name in the checkpoint.

    Raises:
        UserError: A file is not what the manifest says.
    """
    weights = {name: torch.empty(facts.shape) for name, facts in checkpoint.manifest.parameters.items()}
    for file_name, facts in checkpoint.manifest.files.items():
        with _opened(checkpoint, file_name) as file:
            for name, saved in facts.pieces.items():
                weights[name].view(-1)[slice(*saved)] = _piece(checkpoint, file_name, file, "weight", name, saved)[:]
    return weights


@dataclass(frozen=True)
class _Overlap:
    """Elements ``start`` to ``stop`` of a parameter, which ``piece`` is to hold and a saved piece from ``saved[0]`` to
    ``saved[1]`` has."""

    piece: ParameterSlice
    saved: tuple[int, int]
    start: int
    stop: int


def _overlaps_by_file(checkpoint: Checkpoint, slices: list[ParameterSlice]) -> dict[str, list[_Overlap]]:
    wanted: dict[str, list[ParameterSlice]] = {}
    for piece in slices:
        wanted.setdefault(piece.name, []).append(piece)

    def overlaps(pieces: dict[str, tuple[int, int]]) -> Iterator[_Overlap]:
        for name in wanted.keys() & pieces.keys():
            saved = pieces[name]
            for piece in wanted[name]:
                start = max(piece.start, saved[0])
                stop = min(piece.start + piece.weight_n.numel(), saved[1])
                if start < stop:
                    yield _Overlap(piece, saved, start, stop)

    found = {name: list(overlaps(facts.pieces)) for name, facts in checkpoint.manifest.files.items()}
    return {name: of_file for name, of_file in found.items() if of_file}


def _read(checkpoint: Checkpoint, name: str, overlaps: list[_Overlap]) -> None:
    with _opened(checkpoint, name) as file:
        for overlap in overlaps:
            piece, saved_start = overlap.piece, overlap.saved[0]
            for kind in KINDS:
                saved = _piece(checkpoint, name, file, kind, piece.name, overlap.saved)
                target: Tensor = getattr(piece, f"{kind}_n")
                source = saved[overlap.start - saved_start : overlap.stop - saved_start]
                target[overlap.start - piece.start : overlap.stop - piece.start].copy_(source)


@contextmanager
def _opened(checkpoint: Checkpoint, name: str) -> Iterator[Any]:
    """One of a checkpoint's files, through a memory map."""
    path = checkpoint.folder / name
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("save_id") != checkpoint.manifest.save_id:
                raise UserError(f"checkpoint file {path} is of another save than its manifest")
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint file {path} cannot be read ({error})") from None


def _piece(checkpoint: Checkpoint, file_name: str, file: Any, kind: str, name: str, saved: tuple[int, int]) -> Any:
    """What a file holds of a parameter, not read yet."""
    piece = file.get_slice(f"{kind}/{saved[0]}/{name}")
    if piece.get_shape() != [saved[1] - saved[0]]:
        path = checkpoint.folder / file_name
        raise UserError(f"checkpoint file {path} holds another piece of {name} than its manifest")
    return piece


def _refuse_another_model(checkpoint: Checkpoint, state: TrainedState) -> None:
    saved = {name: facts.shape for name, facts in checkpoint.manifest.parameters.items()}
    held = {name: tuple(shape) for name, shape in state.shapes.items()}
    if odd := sorted(name for name in held.keys() | saved.keys() if held.get(name) != saved.get(name)):
        raise UserError(
            f"checkpoint {checkpoint.folder} is of another model: parameter {odd[0]} differs; "
            "set model.name_or_path, model.freeze, model.lora and loss.learn_scale as they were when the run began"
        )
    if checkpoint.manifest.frozen_hash != state.frozen_hash:
        raise UserError(
            f"checkpoint {checkpoint.folder} was trained beside other frozen weights or with another scale of its "
            "adapters; set model.name_or_path, model.revision and model.lora as they were when the run began"
        )
