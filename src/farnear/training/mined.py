"""What a run has mined on its way, for the steps after it and for a resume: one file each time, known by its hash.

How it comes about is in `farnear.training.refresh`.
"""

from pathlib import Path

from farnear.data.index import Index
from farnear.data.negatives import Negatives
from farnear.data.negatives_file import read_negatives
from farnear.errors import UserError
from farnear.parallel.world import World, on_main_rank
from farnear.run_folder import RunFolder
from farnear.training.checkpoint import Checkpoint, folder_name, hash_of


def negatives_of_checkpoint(checkpoint: Checkpoint, folder: RunFolder, index: Index, world: World) -> Negatives | None:
    """What was mined last before a checkpoint; None where nothing was. A collective.

    Raises:
        UserError: On all ranks: the file is not there, or not the one that the checkpoint was trained with.
    """
    step = checkpoint.progress.mined_step
    if step is None:
        return None
    path = negatives_path(folder, step)

    def look() -> None:
        is_there = path.exists()
        if not is_there or hash_of(path) != checkpoint.progress.mined_hash:
            raise UserError(
                f"checkpoint {checkpoint.folder} was trained with the hard negatives of {path}, which "
                f"{'is not what it was (its hash differs)' if is_there else 'is missing'}; restore the file, or remove "
                f"the checkpoints after {folder_name(step)}, so that a resume mines it again"
            )

    on_main_rank(world, look)
    return read_mined(path, index, world)


def negatives_path(folder: RunFolder, step: int) -> Path:
    """Where what is mined after ``step`` steps lies."""
    return folder.mined / folder_name(step) / "negatives.jsonl"


def read_mined(path: Path, index: Index, world: World) -> Negatives:
    """Rank 0 first; the others map what it has kept beside the file."""

    def read() -> Negatives:
        return read_negatives([str(path)], index, 0.0, kept_in=path.parent)

    on_main_rank(world, lambda: read() and None)
    return read()
