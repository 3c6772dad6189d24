"""Worker processes that turn inputs into features, one mini-batch a job.

torch's DataLoader carries the jobs to the workers and the results back in order. A worker notes in shared memory which
input it has in hand, so that when it dies, killed for its memory or by a decoder's crash, the error names that input.

An input that cannot be read, decoded or prepared is replaced by a stand-in of its modality and reported beside the
features: what to do about it is the loader's business. Jobs that need every input raise instead.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from farnear.data.index import modality_name
from farnear.data.read import BadInputError, InputReader
from farnear.errors import RunStoppedError, UserError
from farnear.noise import quiet_worker
from farnear.processes import end_with_starter, main_module_hidden

Int64 = npt.NDArray[np.int64]

Preprocess = Callable[[list[Any], str], dict[str, Any]]
"""(inputs, side) -> features. Of side "query" or "document" inputs are those of ``InputReader``, of side "pair" tuples
of two of them, (query, document), in which an input of several pairs is the same object."""

Result = tuple[dict[str, Any], list[tuple[int, str]]]
"""Features, and (place in the job, reason) of each input that could not be used."""

_NOTHING = -1
_BLOCKS_KEPT = 32  # of Pillow's allocator, each as large as an image and at most 16 MB
_LOST = (ConnectionError, EOFError, FileNotFoundError)
_SECONDS_TO_DIE = 2.0  # a connection is lost a moment before the process is gone
_AFTER_DEATH = ", so its batch is missing; if the system ran out of memory lower data.dataloader_num_workers"


@dataclass(frozen=True, eq=False)
class Job:
    """Inputs, or pairs of them, that are prepared together.

    Attributes:
        side: "query", "document" or "pair".
        modality: Of all inputs; of pairs, what their two inputs hold together.
        rows: Input rows, each of which is read once.
        needed: Whether an input that cannot be used is an error.
        pair_n2: Of side "pair", where in ``rows`` each pair's query and document stand.
    """

    side: str
    modality: str
    rows: Int64
    needed: bool = False
    pair_n2: Int64 | None = None

    def units(self, inputs: list[Any]) -> list[Any]:
        """What is preprocessed: the inputs, or the pairs of them."""
        if self.pair_n2 is None:
            return inputs
        return [(inputs[query], inputs[document]) for query, document in self.pair_n2.tolist()]


class WorkerDiedError(RunStoppedError):
    """A worker process was killed or crashed."""


@dataclass(frozen=True)
class Workers:
    """How jobs are carried out: in this process (``num_workers`` 0) or by workers, to whom all of this is pickled.

    ``prefetch_factor`` is in jobs a worker.
    """

    reader: InputReader
    preprocess: Preprocess
    num_workers: int
    prefetch_factor: int
    pin_memory: bool

    def run(self, jobs: Iterable[Job]) -> Generator[Result, None, None]:
        """Yield the result of each job, in order."""
        # Of each worker its pid and the input row that it has in hand.
        in_hand_w2 = torch.full((max(1, self.num_workers), 2), _NOTHING, dtype=torch.int64).share_memory_()
        loader = DataLoader(
            _Work(self.reader, self.preprocess, in_hand_w2),
            batch_size=None,
            sampler=jobs,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            # Never fork: a rank has threads (torch's, tqdm's, queues'), and a child forked while one of them starts or
            # ends can inherit a lock that no one will release.
            multiprocessing_context="forkserver" if self.num_workers else None,
            worker_init_fn=_start_worker,
            pin_memory=self.pin_memory,
            # DataLoader draws the workers' seeds when it starts; from its own generator, so that starting it, which a
            # resumed run does at another step, leaves the random state of dropout alone.
            generator=torch.Generator(),
        )
        # The loop holds the only reference to DataLoader's iterator: when it is left, the workers are shut down.
        try:
            for result, error in _started(loader):
                if error is not None:
                    raise error
                yield result
        except Exception as failure:
            # A dead worker shows itself as DataLoader's RuntimeError, or, while it hands over a tensor, as a lost
            # connection.
            died = None
            is_told = "DataLoader worker (pid" in str(failure)
            if self.num_workers and (isinstance(failure, _LOST) or is_told):
                died = self._last_words(in_hand_w2, is_told)
            if self.num_workers:  # DataLoader's frames in the traceback refer to the iterator too
                traceback.clear_frames(failure.__traceback__)
            if died is not None:
                raise WorkerDiedError(died) from failure
            raise

    def _last_words(self, in_hand_w2: torch.Tensor, one_died: bool) -> str | None:
        """What the workers that are not alive had in hand; None where all are, as far as is known."""
        deadline = time.monotonic() + _SECONDS_TO_DIE
        while True:
            alive = {child.pid for child in multiprocessing.active_children()}
            dead = {pid: row for pid, row in in_hand_w2.tolist() if pid != _NOTHING and pid not in alive}
            if dead:
                break
            if time.monotonic() > deadline:
                # One that died while it started has not even told its pid.
                return "a data worker died before its first input" + _AFTER_DEATH if one_died else None
            time.sleep(0.05)
        inputs = ", ".join(self.reader.index.input_id(row) for row in dead.values() if row != _NOTHING) or "nothing"
        return (
            f"the data worker with pid {', '.join(map(str, dead))} died with {inputs} in hand{_AFTER_DEATH}, else put "
            "the pair into a file of data.exclude"
        )


class _Work(Dataset[tuple[Result | None, UserError | None]]):
    """What a worker does with a job. A ``UserError`` is a result, for DataLoader would make its message a traceback."""

    def __init__(self, reader: InputReader, preprocess: Preprocess, in_hand_w2: torch.Tensor) -> None:
        self.reader = reader
        self.preprocess = preprocess
        self.in_hand_w2 = in_hand_w2

    def __getitem__(self, job: Job) -> tuple[Result | None, UserError | None]:
        info = get_worker_info()
        in_hand_2 = self.in_hand_w2[0 if info is None else info.id]
        in_hand_2[0] = os.getpid()
        bad: dict[int, str] = {}
        inputs: list[Any] = []
        try:
            for place, row in enumerate(job.rows.tolist()):
                in_hand_2[1] = row
                try:
                    inputs.append(self.reader[row])
                except BadInputError as error:
                    if job.needed:
                        raise
                    bad[place] = error.reason
                    inputs.append(self._stand_in(job, place))
            features = self._preprocessed(inputs, job, bad)
            in_hand_2[1] = _NOTHING
            return (features, sorted(bad.items())), None
        except UserError as error:
            return None, error
        except MemoryError:
            # No fault of the input's: the same one may fit in a moment, or on another machine.
            name = self.reader.index.input_id(int(in_hand_2[1]))
            return None, RunStoppedError(
                f"there was not enough memory to decode and prepare {name}, so its batch is missing; lower "
                "data.dataloader_num_workers, training.mini_batch_size or data.max_image_pixels"
            )

    def _stand_in(self, job: Job, place: int) -> Any:
        return stand_in(modality_name(int(self.reader.index.input_modality_I[job.rows[place]])))

    def _preprocessed(self, inputs: list[Any], job: Job, bad: dict[int, str]) -> dict[str, Any]:
        try:
            return self.preprocess(job.units(inputs), job.side)
        except MemoryError:
            raise
        except Exception:
            # A page too thin for the model, a special token in a query? Where plain inputs fail too, it is a defect.
            plain = [self._stand_in(job, place) for place in range(len(inputs))]
            if preparation_fault(self.preprocess, job.units(plain)[0], job.side) is not None:
                raise
            faults = dict(self._faults(inputs, plain, job, bad))
            if not faults:
                raise
            if job.needed:
                place, why = next(iter(faults.items()))
                side = "input" if job.side == "pair" else job.side
                name = self.reader.index.input_id(int(job.rows[place]))
                raise UserError(
                    f"the {side} {name} cannot be prepared for the model ({why}); mend its sample or drop it"
                ) from None
        for place, why in faults.items():
            bad[place] = f"cannot be prepared for the model ({why})"
            inputs[place] = plain[place]
        return self.preprocess(job.units(inputs), job.side)

    def _faults(self, inputs: list[Any], plain: list[Any], job: Job, bad: dict[int, str]) -> Iterator[tuple[int, str]]:
        """Place and fault of each input with which preprocessing fails where every other one is a stand-in."""
        unit_of_place = np.arange(len(inputs))
        if job.pair_n2 is not None:
            for unit, places in enumerate(job.pair_n2):
                unit_of_place[places] = unit
        for place, one in enumerate(inputs):
            if place not in bad:
                tried = [*plain[:place], one, *plain[place + 1 :]]
                unit = job.units(tried)[unit_of_place[place]]
                if (why := preparation_fault(self.preprocess, unit, job.side)) is not None:
                    yield place, why


def preparation_fault(preprocess: Preprocess, one: Any, side: str) -> str | None:
    """Why an input, or a pair of them, cannot be prepared for the model (a page too thin, say); None where it can."""
    try:
        preprocess([one], side)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def stand_in(modality: str) -> Any:
    """A small input of a modality, to keep the place of one that cannot be used. It never counts in a loss."""
    kinds = modality.split("+")
    if "message" in kinds:
        # With the same media, so that it goes through the same parts of a model.
        media = {kind: stand_in(kind) for kind in kinds if kind != "message"}
        parts = [{"type": kind, kind: one.get(kind) if isinstance(one, dict) else one} for kind, one in media.items()]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "."}]}]
    makers: dict[str, Callable[[], Any]] = {
        "text": lambda: ".",
        "image": lambda: Image.new("RGB", (64, 64)),
        "audio": lambda: {"array": np.zeros(16_000, np.float32), "sampling_rate": 16_000},
        "video": lambda: {"array": np.zeros((4, 64, 64, 3), np.uint8), "video_metadata": None},
    }
    values = {name: makers[name]() for name in kinds}
    if len(values) > 1:
        return values
    ((name, value),) = values.items()
    return {name: value} if name in ("audio", "video") else value


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    with main_module_hidden():
        return iter(loader)


def _start_worker(worker: int) -> None:
    end_with_starter()
    quiet_worker()
    # A mini-batch's pages are in memory together. Given back to the system and fetched again for each mini-batch, that
    # memory costs a fifth of the time of decoding.
    Image.core.set_blocks_max(_BLOCKS_KEPT)  # type: ignore[attr-defined]


def _unchanged(result: Any) -> Any:
    return result
