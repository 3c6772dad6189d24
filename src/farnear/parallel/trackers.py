"""Experiment trackers (TensorBoard, Weights & Biases, ...) through accelerate, beside the run's own JSON lines.

A tracker is an onlooker: it may be slow, its server may go, its disk may be full, and the training goes on. Each has a
thread that it starts, logs and ends in (MLflow's runs belong to a thread), and a queue before it. What it raises is
told once, and from then on it is left out.

A run that is resumed goes on in the same curves. Steps that are trained again replace the old ones in TensorBoard,
whose readers forget everything from `purge_step` on when they come to the new file. The others cannot forget, so they
are not told again what they were told before the resume. What they know the run by is kept in `trackers.json`.
"""

import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from os import environ
from pathlib import Path
from queue import Full, Queue
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker

from farnear.errors import UserError
from farnear.files import replace_text
from farnear.noise import sweep
from farnear.run_folder import RunFolder
from farnear.tracking import PACKAGES, is_installed

PROJECT = "farnear"
SECONDS_TO_START = 180.0
SECONDS_TO_FINISH = 60.0
SECONDS_TO_LET_GO = 5.0
_WAITING = 10_000  # records before a tracker that is given up

Make = Callable[[], GeneralTracker]


@dataclass(frozen=True)
class Told:
    """What trackers know from before a resume.

    Attributes:
        step: The last one that was trained.
        evaluations: (kind, step) of each.
    """

    step: int = 0
    evaluations: frozenset[tuple[str, int]] = field(default_factory=frozenset)


class Trackers:
    """Trackers by accelerate's names; none until `start`."""

    def __init__(self) -> None:
        self._followers: list[_Follower] = []
        self._resumed_at = 0
        self._told = Told()

    def start(self, names: Sequence[str], folder: RunFolder, config: Mapping[str, Any], step: int, told: Told) -> None:
        """Start them, and tell them the run file.

        Args:
            config: The run file's sections.
            step: That the run goes on from.
            told: By the starts before this one.

        Raises:
            UserError: One cannot start. Where a run goes on it is left out instead, for it may have gone in the night.
        """
        self._resumed_at, self._told = step, told
        if step == 0:
            shutil.rmtree(folder.tensorboard, ignore_errors=True)
            folder.trackers.unlink(missing_ok=True)
        if names:
            # accelerate's own bookkeeping, which its loggers ask who may speak; the process group stands already.
            PartialState(cpu=not torch.cuda.is_available())
        for name in names:
            if not is_installed(name):
                print(f"training.report_to: {name} is not installed, and is left out; pip install {name}", flush=True)
                continue
            known = _read(folder.trackers).get(name)
            follower = _Follower(name, partial(_make, name, folder, step, known), goes_on=known is not None)
            if error := follower.start(_flat(config)):
                if step == 0:
                    raise UserError(f"training.report_to: {name} cannot start ({error}); mend that, or take {name} out")
                print(_left_out(name, error), flush=True)
                continue
            self._followers.append(follower)
        if marks := {one.name: mark for one in self._followers if (mark := _mark(one))}:
            # One that is left out this time may be back the next.
            replace_text(folder.trackers, json.dumps({**_read(folder.trackers), **marks}) + "\n")

    def log_step(self, figures: Mapping[str, Any]) -> None:
        """Send a step's line of metrics.jsonl."""
        step = figures["step"]
        values = {name: value for name, value in figures.items() if name != "step"}
        self._send(values, step, is_old=step <= self._told.step)

    def log_evaluation(self, kind: str, measures: Mapping[str, Any], step: int) -> None:
        """Send the measures of an evaluation: of the sample as ``eval``, of everything as ``eval_all``."""
        name = "eval" if kind == "during" else "eval_all"
        is_old = (kind, step) in self._told.evaluations
        self._send({name: measures}, step, is_old=is_old)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What ends a run before its time may leave it seconds.
        self.close(SECONDS_TO_FINISH if kind is None else SECONDS_TO_LET_GO)

    def close(self, seconds: float = SECONDS_TO_FINISH) -> None:
        """Let each take what it has not taken yet, and end."""
        for follower in self._followers:
            follower.close()
        for follower in self._followers:
            follower.join(seconds)
        self._followers = []

    def _send(self, values: Mapping[str, Any], step: int, *, is_old: bool) -> None:
        numbers = {name: value for name, value in _flat(values).items() if _is_number(value)}
        for follower in self._followers:
            has_it = step <= self._resumed_at if follower.name == "tensorboard" else follower.goes_on
            if not (is_old and has_it):
                follower.send(numbers, step)


class _Follower:
    """One tracker, and the thread that it lives in; ``goes_on`` says whether it knows the run already."""

    def __init__(self, name: str, make: Make, *, goes_on: bool) -> None:
        self.name, self.goes_on = name, goes_on
        self.tracker: GeneralTracker | None = None
        self._make = make
        self._queue: Queue[tuple[dict[str, Any], int] | None] = Queue(_WAITING)
        self._started = threading.Event()
        self._error: str | None = None
        self._thread: threading.Thread | None = None

    def start(self, config: dict[str, Any]) -> str | None:
        """Start it; what went wrong."""
        self._thread = threading.Thread(target=self._run, args=(config,), name=self.name, daemon=True)
        self._thread.start()
        if not self._started.wait(SECONDS_TO_START):
            self._error = f"it has not answered for {SECONDS_TO_START:.0f} s"
        return self._error

    def send(self, values: dict[str, Any], step: int) -> None:
        """Have it take some numbers, unless it has failed."""
        if self._error is not None:
            return
        try:
            self._queue.put_nowait((values, step))
        except Full:
            self._fail(f"it is {_WAITING:,} records behind")

    def close(self) -> None:
        """Nothing comes after what is waiting."""
        if self._error is None:
            try:
                self._queue.put_nowait(None)
            except Full:
                self._fail(f"it is {_WAITING:,} records behind")

    def join(self, seconds: float) -> None:
        """Wait for its end."""
        if self._error is None and self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._fail(f"it has not taken everything within {seconds:.0f} s")

    def _run(self, config: dict[str, Any]) -> None:
        try:
            import_module(next(package for package in PACKAGES[self.name] if find_spec(package)))
            sweep()
            self.tracker = self._make()
            self.tracker.start()
            if not self.goes_on:  # MLflow lets nobody change what it was told
                self.tracker.store_init_configuration(config)
        except BaseException as error:  # some exit
            self._error = _in_a_line(error)
            return
        finally:
            self._started.set()
        try:
            while (record := self._queue.get()) is not None:
                self.tracker.log(_named_for(self.name, record[0]), step=record[1])
            self.tracker.finish()
        except BaseException as error:
            self._fail(_in_a_line(error))

    def _fail(self, error: str) -> None:
        if self._error is None:
            self._error = error
            print(_left_out(self.name, error), flush=True)


class _TensorBoard(TensorBoardTracker):  # type: ignore[misc]
    """accelerate's, whose hyper-parameters would lie in a folder of their own at every start."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Beside the curves, in the same file."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, {"loss": 0.0}):
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()


def _make(name: str, folder: RunFolder, step: int, known: str | None) -> GeneralTracker:
    """A tracker of a run; where it is ``known`` there already, of the same one."""
    run = folder.path.resolve().name
    if name == "tensorboard":
        path = folder.tensorboard
        return _TensorBoard(path.name, str(path.parent), purge_step=step + 1 if step else None)
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if name == "wandb":
        project, mark = environ.get("WANDB_PROJECT", PROJECT), {"id": known, "resume": "allow"} if known else {}
        return tracker_class(project, name=run, dir=str(folder.path), **mark)
    if name == "trackio":
        project = environ.get("TRACKIO_PROJECT", PROJECT)
        return tracker_class(project, name=known or run, resume="allow" if known else "never")
    if name == "mlflow":
        return tracker_class(PROJECT, run_id=known, run_name=run)
    return tracker_class(run, **({"logging_dir": str(folder.path)} if tracker_class.requires_logging_directory else {}))


def _mark(follower: _Follower) -> str | None:
    """By what a tracker's server knows the run."""
    of_tracker = {"wandb": ("id",), "trackio": ("name",), "mlflow": ("info", "run_id")}
    found: Any = follower.tracker.tracker if follower.name in of_tracker and follower.tracker is not None else None
    for name in of_tracker.get(follower.name, ()):
        found = getattr(found, name, None)
    return None if found is None else str(found)


def _named_for(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """MLflow takes no @ in a name."""
    return {key.replace("@", "_at_"): value for key, value in values.items()} if name == "mlflow" else values


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by slashes; a value that is no number, truth or text as JSON writes it."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            is_plain = isinstance(value, (int, float, str, bool))
            flat[f"{prefix}{key}"] = value if is_plain else json.dumps(value, default=str)
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


def _left_out(name: str, error: str) -> str:
    return f"training.report_to: {name} is left out from here on ({error}); metrics.jsonl and eval.jsonl have it all"
