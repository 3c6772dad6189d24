"""The run folder: what lies in it, and the rule that keeps a run from being started over by accident.

A folder that holds checkpoints stands for hours of work. It is continued when the user says so and never mixed with a
new run, nor does a run replace what is not a run's. `farnear launch` asks before it starts processes, and the training
asks again, as it may be started otherwise.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from farnear.errors import UserError

Resume = Literal["newest", "auto"]

_CHECKPOINT_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved run file."""
        return self.path / "run.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object an evaluation."""
        return self.path / "eval.jsonl"

    @property
    def gallery(self) -> Path:
        """Rankings of the evaluations before and after, and thumbnails of what the report shows of them."""
        return self.path / "gallery"

    @property
    def checkpoints(self) -> Path:
        """Published checkpoints."""
        return self.path / "checkpoints"

    @property
    def saves(self) -> Path:
        """One JSON object a checkpoint: step, seconds from the copy until it was published, those that steps waited."""
        return self.path / "saves.jsonl"

    @property
    def mined(self) -> Path:
        """Hard negatives that the run has mined on its way, a folder `step-NNNNNNNN` each time."""
        return self.path / "mined"

    @property
    def minings(self) -> Path:
        """One JSON object each time: step, pairs, negatives, pairs_with_fewer, seconds, those by phase."""
        return self.path / "mined.jsonl"

    @property
    def latest(self) -> Path:
        """The name of the newest checkpoint."""
        return self.path / "latest"

    @property
    def best(self) -> Path:
        """The name of the best one."""
        return self.path / "best"

    @property
    def faults(self) -> Path:
        """One JSON object a damaged place of the training shards: shard, offset, kind, detail, pairs_lost."""
        return self.path / "faults.jsonl"

    @property
    def quarantine(self) -> Path:
        """One JSON object a pair that could not be used: step, shard, key, input, reason."""
        return self.path / "quarantine.jsonl"

    @property
    def export(self) -> Path:
        """The trained model, as others load it."""
        return self.path / "export"

    @property
    def bad_steps(self) -> Path:
        """One JSON object a step that was left out or rolled back: step, what, action, loss, grad_norm, keys."""
        return self.path / "bad_steps.jsonl"

    @property
    def status(self) -> Path:
        """How the run stands or has ended; see `farnear.status`."""
        return self.path / "status.json"

    @property
    def heartbeats(self) -> Path:
        """A file a rank: where it is. They go when the rank ends in order."""
        return self.path / "heartbeats"

    @property
    def hang(self) -> Path:
        """What the ranks leave for the report of a hang, while it is put together; reports are in `hangs`."""
        return self.path / "hang"

    @property
    def card(self) -> Path:
        """What the run notes of itself for the model cards of what it exports; see `farnear.training.cards`."""
        return self.path / "card.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def trackers(self) -> Path:
        """By what other trackers know the run."""
        return self.path / "trackers.json"

    @property
    def submitted(self) -> Path:
        """The resolved run file of the newest job that was submitted."""
        return self.path / "submit.yaml"

    @property
    def summary(self) -> Path:
        """The run in a few figures; it exists when the run is done."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The run as one page."""
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the run that writes here; its being there says that the folder is a run folder."""
        return self.path / "run.lock"

    def written(self) -> tuple[Path, ...]:
        """What a new run would replace."""
        records = (
            self.metrics,
            self.evaluations,
            self.saves,
            self.minings,
            self.faults,
            self.quarantine,
            self.bad_steps,
            self.status,
            self.card,
            self.trackers,
        )
        return (self.config, *records, self.gallery, self.export, self.tensorboard, self.summary, self.report)


def published_checkpoints(checkpoints: Path) -> list[Path]:
    """The folders `step-NNNNNNNN`, the newest last. Others beside them, set aside by a person, do not count."""
    return sorted(path for path in checkpoints.glob("step-*") if _CHECKPOINT_NAME.fullmatch(path.name))


def checkpoint_named(path: Path) -> Path:
    """A checkpoint by the file of a run that names it, ``RUN/best`` or ``RUN/latest``; any other path as it is."""
    folder = RunFolder(path.parent)
    if path not in (folder.best, folder.latest) or not path.is_file():
        return path
    return folder.checkpoints / path.read_text(encoding="utf-8").strip()


def check_start(output_dir: Path, resume: Resume | None) -> None:
    """Refuse to start over what a run or a person has made, and to resume what has no checkpoint.

    Raises:
        UserError: Naming the ways out.
    """
    folder = RunFolder(output_dir)
    published = published_checkpoints(folder.checkpoints)
    if published and resume is None:
        raise UserError(
            f"run folder {output_dir} holds checkpoints up to {published[-1].name}, and a new run would mix with them; "
            "continue it with --resume, or set another output_dir"
        )
    if published:
        return
    if resume == "newest":
        raise UserError(
            f"there is no checkpoint in {folder.checkpoints} to resume from; "
            "drop --resume to start, or say --resume auto to continue only if there is one"
        )
    if folder.summary.exists():
        raise UserError(
            f"run folder {output_dir} holds a finished run without checkpoints, which a new one would replace; "
            "set another output_dir, or remove the folder"
        )
    if not folder.lock.exists() and (found := [path.name for path in folder.written() if path.exists()]):
        raise UserError(
            f"{output_dir} holds {found[0]}, but is no run folder, and a run would replace that; set another output_dir"
        )


@contextmanager
def claimed(folder: RunFolder, seconds: float = 0.0) -> Iterator[None]:
    """Keep other runs out of a run folder. The lock goes with the process, so a kill leaves none behind.

    Args:
        seconds: To wait for who has it.

    Raises:
        UserError: Another run writes into the folder.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    with open(folder.lock, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + seconds
        while not _locked(file) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not _locked(file):
            file.seek(0)
            raise UserError(
                f"another run is writing into {folder.path} ({file.read().strip()}); wait for it, or set another "
                "output_dir"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _locked(file: TextIO) -> bool:
    """Take the lock of an open file, or keep it; False where another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


DONE = "done.json"
"""In a folder that was mined or encoded into: what it was made of, and the files that were left; there when all is."""


def digest_of(deciding: Mapping[str, Any]) -> str:
    """What work in such a folder is known by, from all that decides what comes of it, in words and numbers."""
    return hashlib.blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=16).hexdigest()


def done_in(folder: Path, files_in: Callable[[Path], dict[str, int]], **made_of: str) -> bool:
    """Whether work has ended in a folder, of what is given by its digests, and its files are there still."""
    try:
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
        is_the_same = all(done[what] == digest for what, digest in made_of.items())
        return bool(is_the_same and done["files"] and done["files"] == files_in(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def files_left(folder: Path) -> dict[str, int]:
    """Sizes of the files of a mining, by their paths in its folder."""
    found = [folder / "negatives.jsonl", *sorted((folder / "embeddings").glob("*"))]
    return {str(path.relative_to(folder)): path.stat().st_size for path in found}


def files_of_collection(folder: Path) -> dict[str, int]:
    """Sizes of the files of an encoding, by their names."""
    found = [
        path for path in folder.iterdir() if path.suffix in (".npy", ".txt", ".jsonl") or path.name == "manifest.json"
    ]
    return {path.name: path.stat().st_size for path in sorted(found)}
