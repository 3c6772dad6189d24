"""From a checkpoint to a rank's weights and moments: each rank reads the slices that it is to hold, and nothing else.

Which file holds which piece stands in the manifest, so a rank opens the files that overlap with its slices only, and of
those reads, through a memory map, the elements that it needs. On as many ranks and under the strategy that saved, that
is one file a rank; on others a few. Under `ddp`, where every rank holds everything, every rank reads everything.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
    path = checkpoint.folder / name
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("save_id") != checkpoint.manifest.save_id:
                raise UserError(f"checkpoint file {path} is of another save than its manifest")
            for overlap in overlaps:
                piece, (saved_start, saved_stop) = overlap.piece, overlap.saved
                for kind in KINDS:
                    saved = file.get_slice(f"{kind}/{saved_start}/{piece.name}")
                    if saved.get_shape() != [saved_stop - saved_start]:
                        raise UserError(f"checkpoint file {path} holds another piece of {piece.name} than its manifest")
                    target: Tensor = getattr(piece, f"{kind}_n")
                    source = saved[overlap.start - saved_start : overlap.stop - saved_start]
                    target[overlap.start - piece.start : overlap.stop - piece.start].copy_(source)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint file {path} cannot be read ({error})") from None


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
