"""Saving: the training stands still for a copy to host memory; a thread brings it to the disk and publishes it.

    save      copy this rank's slices to host memory                                   the training waits for this alone
    draft     rank 0 looks for space and makes a fresh folder, `.saving-ID`
    write     every rank writes its files and syncs them to the disk
    report    every rank tells sizes, hashes and what went wrong; what goes wrong on one is everyone's error
    publish   rank 0 writes the manifest, renames the folder to `step-NNNNNNNN`, then replaces `latest`
    retain    rank 0 removes what the run file does not keep

The order is what makes it safe: until the rename there is a folder that no one reads and the next save removes, from
the rename on there is a checkpoint, and nobody ever writes to it again. The ranks' threads talk in a group of their own
(`World.saving`), so that they and the training do not wait for each other.

One save is in flight at a time: the next one waits for it. What goes wrong in the thread stands in `failed`, which the
loop asks about after every step; `finish` waits and raises it.
"""

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from farnear.errors import RunStoppedError, UserError, refused_by_system
from farnear.files import give_usual_mode, replace_text, sync
from farnear.parallel.collectives import gather_objects, gather_on_main_rank
from farnear.parallel.strategy import ParameterSlice
from farnear.parallel.world import World, on_main_rank
from farnear.run_folder import RunFolder
from farnear.training.checkpoint import (
    FORMAT,
    KINDS,
    MANIFEST,
    SEAL,
    Manifest,
    Progress,
    SavedFile,
    SavedParameter,
    folder_name,
    hash_of,
    seal_of,
)
from farnear.training.metrics import append_line
from farnear.training.retention import Retention, remove, retain
from farnear.training.scale import TrainedState
from farnear.training.watch import Watch

SECONDS_TO_FINISH = 30.0
"""How long a rank whose training has failed waits for a save in flight, which other ranks may never complete."""

FILE_BYTES = 1024**3
"""A rank's slices go into files of about this size, so that a save makes progress that can be seen."""

# For headers, the manifest and what else a run writes meanwhile.
_SPARE_SHARE, _SPARE_BYTES = 0.02, 4 * 1024**2


class Saver:
    """Publishes a run's checkpoints.

    Args:
        checkpoints: The run's `checkpoints` folder.
        about: strategy, config_hash and versions, for the manifest.
        in_background: Whether `save` returns once the state is copied.
        saved_step: Of the checkpoint that the run continues from.

    Attributes:
        saved_step: Of the last checkpoint that is published, or under way.
    """

    def __init__(
        self,
        checkpoints: Path,
        world: World,
        retention: Retention,
        about: Mapping[str, Any],
        watch: Watch,
        *,
        in_background: bool = True,
        saved_step: int = 0,
    ) -> None:
        self._checkpoints, self._world, self._retention, self._about = checkpoints, world, retention, about
        self._watch, self._in_background = watch, in_background
        self.saved_step = saved_step
        self._host: list[ParameterSlice] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a save is known to have failed on this rank; `finish` raises what went wrong."""
        return self._error is not None

    def save(self, state: TrainedState, progress: Progress, *, periodic: bool) -> None:
        """Copy the state after ``progress.step`` steps, and have it published. A collective.

        Raises:
            UserError, RunStoppedError: What the save before met, or under ``in_background=False`` this one.
        """
        self.finish()
        started = perf_counter()
        self._watch.at("save: copy", step=progress.step)
        self._copy(state)
        copied = perf_counter()
        facts = _Facts(progress, periodic, dict(state.shapes), state.frozen_hash, started, copied)
        self._thread = threading.Thread(target=self._run, args=(facts,), name="save", daemon=True)
        self._thread.start()
        self.saved_step = progress.step
        if not self._in_background:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight; what one rank has met is raised on all of them.

        Raises:
            UserError: A rank could not write, or rank 0 not publish.
            RunStoppedError: A weight is not finite.
        """
        if self._thread is not None:
            self._watch.at("save: wait")
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Finish a save in flight; where the training has failed, as far as the other ranks let it come to its end.

        What is not published by then is left as a draft, which the next save removes.
        """
        if error is None:
            self.finish()
        elif self._thread is not None:
            self._thread.join(SECONDS_TO_FINISH)

    def _copy(self, state: TrainedState) -> None:
        """Into buffers that are kept for the next save: to make them anew would cost more than the copy."""
        slices = state.slices(owned=True)
        if [(piece.name, piece.start) for piece in slices] != [(piece.name, piece.start) for piece in self._host]:
            self._host = [_on_host(piece) for piece in slices]
        for copy, piece in zip(self._host, slices, strict=True):
            for kind in KINDS:
                getattr(copy, f"{kind}_n").copy_(getattr(piece, f"{kind}_n"), non_blocking=True)
            copy.step.copy_(piece.step)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()

    def _run(self, facts: "_Facts") -> None:
        try:
            self._write_and_publish(facts)
        except BaseException as error:
            self._error = error
        finally:
            self._watch.saves = None

    def _write_and_publish(self, facts: "_Facts") -> None:
        step = facts.progress.step
        planned = sum(_bytes_of(piece) for piece in self._host)
        final = self._checkpoints / folder_name(step)
        self._watch.saving("draft", step)
        needed = sum(gather_objects(planned, self._world.saving))
        save_id = self._on_main(lambda: _open_draft(final, needed))
        draft = self._checkpoints / f".saving-{save_id}"
        report = self._write(draft, save_id, step)
        self._watch.saving("report", step)
        reports: list[_Report] = gather_on_main_rank(report, self._world.saving)
        self._on_main(lambda: self._publish(draft, final, save_id, facts, reports))
        self._on_main(lambda: self._settle(final, facts))

    def _on_main(self, work: Callable[[], Any]) -> Any:
        return on_main_rank(self._world, work, self._world.saving)

    def _write(self, draft: Path, save_id: str, step: int) -> "_Report":
        files: dict[str, SavedFile] = {}
        try:
            if bad := [piece.name for piece in self._host if not piece.weight_n.isfinite().all()]:
                raise RunStoppedError(
                    f"step {step}: the update made {bad[0]} non-finite, so nothing was saved; lower "
                    "training.learning_rate and continue from the checkpoint before"
                )
            for number, pieces in enumerate(_files(self._host)):
                name = f"rank-{self._world.rank:05d}.{number}.safetensors"
                self._watch.saving("write", step)
                path = _write_pieces(draft / name, pieces, {"save_id": save_id, "step": str(step)})
                self._watch.saving("sync", step)
                sync(path)
                sync(draft)
                self._watch.saving("hash", step)
                spans = {piece.name: (piece.start, piece.start + piece.weight_n.numel()) for piece in pieces}
                files[name] = SavedFile(bytes=path.stat().st_size, xxh3_128=hash_of(path), pieces=spans)
        except RunStoppedError as error:
            return _Report(error=error)
        except (OSError, SafetensorError) as error:
            return _Report(error=_not_saved(step, f"rank {self._world.rank} cannot write into {draft} ({error})"))
        except Exception as error:  # a defect; the other ranks wait to be told
            return _Report(error=RuntimeError(f"rank {self._world.rank} failed while it saved: {error!r}"))
        return _Report(files, {piece.name: int(piece.step) for piece in self._host})

    def _publish(self, draft: Path, final: Path, save_id: str, facts: "_Facts", reports: Sequence["_Report"]) -> None:
        step = facts.progress.step
        try:
            if error := next((report.error for report in reports if report.error is not None), None):
                raise error
            self._watch.saving("manifest", step)
            text = self._manifest(save_id, facts, reports).model_dump_json(indent=1) + "\n"
            replace_text(draft / MANIFEST, text)
            replace_text(draft / SEAL, seal_of(text.encode()))
            self._watch.saving("rename", step)
            os.rename(draft, final)
            sync(self._checkpoints)
        except OSError as error:
            raise _not_saved(step, str(refused_by_system(error))) from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # what is published is there no more

    def _manifest(self, save_id: str, facts: "_Facts", reports: Sequence["_Report"]) -> Manifest:
        steps = {name: step for report in reports for name, step in report.steps.items()}
        return Manifest(
            format=FORMAT,
            save_id=save_id,
            world_size=self._world.world_size,
            progress=facts.progress,
            periodic=facts.periodic,
            parameters={
                name: SavedParameter(shape=tuple(shape), step=steps[name]) for name, shape in facts.shapes.items()
            },
            frozen_hash=facts.frozen_hash,
            files={name: file for report in reports for name, file in report.files.items()},
            **self._about,
        )

    def _settle(self, final: Path, facts: "_Facts") -> None:
        """Point at what is there now, tell what it took, and remove what is kept no longer."""
        progress = facts.progress
        self._watch.saving("latest", progress.step)
        folder = RunFolder(self._checkpoints.parent)
        replace_text(folder.latest, final.name + "\n")
        waited = facts.copied if self._in_background else perf_counter()
        seconds = {"seconds": perf_counter() - facts.started, "seconds_waited": waited - facts.started}
        append_line(folder.saves, {"step": progress.step, **seconds})
        point_at_best(folder, progress)
        self._watch.saving("retain", progress.step)
        for doomed in retain(self._checkpoints, self._retention, progress.best_step):
            self._watch.saving("remove", progress.step)
            remove(doomed)
        print(f"saved {final}{', the best so far' if progress.best_step == progress.step else ''}", flush=True)


def point_at_best(folder: RunFolder, progress: Progress) -> None:
    """Name the best checkpoint so far."""
    if progress.best_step is not None:
        replace_text(folder.best, folder_name(progress.best_step) + "\n")


@dataclass(frozen=True)
class _Facts:
    """What the thread is told beside the copied slices; the training has gone on meanwhile."""

    progress: Progress
    periodic: bool
    shapes: Mapping[str, torch.Size]
    frozen_hash: str
    started: float
    copied: float


class _Report:
    """What a rank says of its part: its files and the optimizer's steps of its parameters, or what went wrong."""

    def __init__(
        self,
        files: Mapping[str, SavedFile] | None = None,
        steps: Mapping[str, int] | None = None,
        error: Exception | None = None,
    ) -> None:
        self.files, self.steps, self.error = files or {}, steps or {}, error


def _not_saved(step: int, why: str) -> UserError:
    return UserError(f"checkpoint of step {step} was not saved: {why}; what was saved before is untouched")


def _on_host(piece: ParameterSlice) -> ParameterSlice:
    def buffer(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.device.type == "cuda")

    weight, exp_avg, exp_avg_sq = (buffer(tensor) for tensor in (piece.weight_n, piece.exp_avg_n, piece.exp_avg_sq_n))
    return ParameterSlice(piece.name, piece.start, weight, exp_avg, exp_avg_sq, torch.zeros(()))


def _files(pieces: Sequence[ParameterSlice]) -> list[list[ParameterSlice]]:
    """The pieces of each file; a rank without any has no file."""
    files: list[list[ParameterSlice]] = []
    room = 0
    for piece in pieces:
        if room < _bytes_of(piece):
            files.append([])
            room = max(FILE_BYTES, _bytes_of(piece))
        files[-1].append(piece)
        room -= _bytes_of(piece)
    return files


def _bytes_of(piece: ParameterSlice) -> int:
    return len(KINDS) * 4 * piece.weight_n.numel()


def _open_draft(final: Path, needed: int) -> str:
    """Make the folder that the ranks write into; the id of the save."""
    checkpoints = final.parent
    if final.exists():
        raise UserError(
            f"checkpoint {final} exists already and is never overwritten; remove it or use another output_dir"
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    for leftover in [*checkpoints.glob(".saving-*"), *checkpoints.glob(".removing-*")]:
        print(f"removing {leftover}, the leftover of a save that did not finish", flush=True)
        remove(leftover)
    free = shutil.disk_usage(checkpoints).free
    if free < needed * (1 + _SPARE_SHARE) + _SPARE_BYTES:
        raise UserError(
            f"checkpoint {final} was not saved: it takes {needed / 1e9:.2f} GB, and {checkpoints} has {free / 1e9:.2f} "
            "GB free; make room, or set training.save_total_limit, and continue with --resume"
        )
    save_id = uuid.uuid4().hex
    (checkpoints / f".saving-{save_id}").mkdir()
    return save_id


def _write_pieces(path: Path, pieces: Sequence[ParameterSlice], metadata: dict[str, str]) -> Path:
    tensors = {f"{kind}/{piece.start}/{piece.name}": getattr(piece, f"{kind}_n") for piece in pieces for kind in KINDS}
    save_file(tensors, path, metadata=metadata)
    give_usual_mode(path)
    return path
