"""From a step's number to this rank's preprocessed mini-batches, by worker processes.

    plan of the epoch -> global batch of the step -> this rank's slice -> mini-batches -> workers -> RankBatch

The unit of work is one mini-batch: a worker reads its rows, decodes them and calls the preprocess function. So what is
prepared ahead is bounded by mini-batches and not by the rank's slice, and all workers are busy within one step. torch's
DataLoader carries the jobs to the workers and the results back in order; this module only says which jobs there are
and puts the mini-batches of a step together again.

There is no cursor here: a step's content follows from its number, so resuming is asking for a later first step. Nothing
is read, and only the plan of one epoch is computed, to get there.

Shapes: b pairs of this rank in a step, p its pages (b positives, then hard negatives), G pairs in a global batch.
"""

import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from farnear.data.index import Index
from farnear.data.plan import Plan, plan_epoch, slice_of_rank, steps_per_epoch
from farnear.data.read import PairReader
from farnear.errors import UserError
from farnear.processes import main_module_hidden

Preprocess = Callable[[list[Any], str], dict[str, Any]]
"""(inputs, side) -> features. ``side`` is "query" (inputs are str) or "document" (inputs are RGB images)."""

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

_PLANS_KEPT = 2  # workers are fed ahead, over the edge of an epoch


@dataclass(frozen=True)
class MiniBatch:
    """What goes through the model at once: the features of ``rows`` of the rank's queries or pages."""

    side: str  # "query" or "document"
    rows: slice  # positions in RankBatch.pairs_b ("query") or RankBatch.page_hash_p ("document")
    features: dict[str, Any]


@dataclass(frozen=True, eq=False)
class RankBatch:
    """One rank's part of the global batch of ``step`` (an optimizer step, counted over all epochs)."""

    step: int
    epoch: int
    pairs_b: Int64  # index rows of this rank's pairs
    valid_b: Bool  # False for a borrowed row, which must not count in the loss
    query_hash_b: Int64
    page_hash_p: Int64  # the b positives in the order of the pairs, then all hard negatives
    mini_batches: tuple[MiniBatch, ...]  # the document ones first
    seconds_waited: float  # for the workers


@dataclass(frozen=True)
class _Job:
    side: str
    ids: Int64  # pair rows ("query") or page rows ("document")


@dataclass(frozen=True, eq=False)
class _RankSlice:
    pairs_b: Int64
    valid_b: Bool
    pages_p: Int64


class TrainLoader:
    """The training batches of one rank.

    ``num_negatives`` bounds the hard negatives of a pair (None: all, 0: none). ``mini_batch_size`` is in pairs for
    queries and in pages for documents. ``num_workers`` 0 works in this process. Workers are sent the index
    and the preprocess function, which must be picklable then. ``prefetch_factor`` is in mini-batches a worker.
    """

    def __init__(
        self,
        index: Index,
        *,
        preprocess: Preprocess,
        seed: int,
        global_batch_size: int,
        mini_batch_size: int,
        num_negatives: int | None,
        rank: int,
        world_size: int,
        num_workers: int,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.index = index
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.mini_batch_size = mini_batch_size
        self.num_negatives = num_negatives
        self.rank = rank
        self.world_size = world_size
        self._workers = _Workers(PairReader(index), preprocess, num_workers, prefetch_factor, pin_memory)
        self._plan_of_epoch: dict[int, Plan] = {}

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.index), self.global_batch_size)

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch, the same on every rank; those of the last two epochs asked for are kept."""
        if epoch not in self._plan_of_epoch:
            if len(self._plan_of_epoch) >= _PLANS_KEPT:
                del self._plan_of_epoch[next(iter(self._plan_of_epoch))]
            self._plan_of_epoch[epoch] = plan_epoch(
                self.index.query_hash_N,
                self.index.page_hash_P[self.index.positive_N],
                fingerprint=self.index.fingerprint,
                seed=self.seed,
                epoch=epoch,
                global_batch_size=self.global_batch_size,
            )
        return self._plan_of_epoch[epoch]

    def keys_of_batch(self, step: int) -> list[str]:
        """The pairs of the whole global batch of ``step`` as ``"shard name/KEY"``, for messages."""
        return [self.index.pair_id(int(pair)) for pair in self._global_batch(step)]

    def batches(self, start_step: int, stop_step: int) -> Generator[RankBatch, None, None]:
        """Yield the batches of steps ``start_step`` to ``stop_step`` - 1, counted over all epochs.

        The workers stop when the iterator is exhausted or closed. Raises ``UserError`` for a page or query that cannot
        be read or preprocessed, RuntimeError when a worker is killed, and what the preprocess function raises for
        every input alike.
        """
        jobs = (job for step in range(start_step, stop_step) for job, _ in self._jobs(self._rank_slice(step)))
        with closing(self._workers.run(jobs)) as results:
            for step in range(start_step, stop_step):
                rank_slice = self._rank_slice(step)
                seconds_before = time.perf_counter()
                mini_batches = tuple(MiniBatch(job.side, rows, next(results)) for job, rows in self._jobs(rank_slice))
                seconds_waited = time.perf_counter() - seconds_before
                yield RankBatch(
                    step=step,
                    epoch=step // self.steps_per_epoch,
                    pairs_b=rank_slice.pairs_b,
                    valid_b=rank_slice.valid_b,
                    query_hash_b=self.index.query_hash_N[rank_slice.pairs_b],
                    page_hash_p=self.index.page_hash_P[rank_slice.pages_p],
                    mini_batches=mini_batches,
                    seconds_waited=seconds_waited,
                )

    def _global_batch(self, step: int) -> Int64:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        row_G: Int64 = self.plan(epoch).rows_SG[step_of_epoch]
        return row_G[row_G >= 0]

    def _rank_slice(self, step: int) -> _RankSlice:
        pairs = self._global_batch(step)
        pairs_b = slice_of_rank(pairs, self.rank, self.world_size)
        if len(pairs_b) > 0:
            return _RankSlice(pairs_b, np.ones(len(pairs_b), np.bool_), self._pages_of(pairs_b))
        # A rank without rows would call fewer collectives than the others and hang them.
        borrowed = pairs[:1]
        return _RankSlice(borrowed, np.zeros(1, np.bool_), self.index.positive_N[borrowed])

    def _pages_of(self, pairs_b: Int64) -> Int64:
        """Page rows: the positives, then the hard negatives of the first pair, of the second, ..."""
        start_b, stop_b = self.index.negative_start_N1[pairs_b], self.index.negative_start_N1[pairs_b + 1]
        if self.num_negatives is not None:
            stop_b = np.minimum(stop_b, start_b + self.num_negatives)
        negatives = [self.index.negatives[start:stop] for start, stop in zip(start_b, stop_b, strict=True)]
        return np.concatenate([self.index.positive_N[pairs_b], *negatives])

    def _jobs(self, rank_slice: _RankSlice) -> Iterator[tuple[_Job, slice]]:
        yield from _cut("document", rank_slice.pages_p, self.mini_batch_size)
        yield from _cut("query", rank_slice.pairs_b, self.mini_batch_size)


def load_features(
    reader: PairReader, preprocess: Preprocess, side: str, ids: Sequence[int], batch_size: int, workers: int
) -> Generator[tuple[slice, dict[str, Any]], None, None]:
    """Yield (positions in ``ids``, features) in order, for encoding: pair rows ("query") or page rows ("document").

    Raises as ``TrainLoader.batches`` does.
    """
    jobs = list(_cut(side, np.asarray(ids, np.int64), batch_size))
    pool = _Workers(reader, preprocess, min(workers, len(jobs)), prefetch_factor=2, pin_memory=False)
    with closing(pool.run(job for job, _ in jobs)) as results:
        for _, rows in jobs:
            yield rows, next(results)


def _cut(side: str, ids: Int64, size: int) -> Iterator[tuple[_Job, slice]]:
    for start in range(0, len(ids), size):
        rows = slice(start, min(start + size, len(ids)))
        yield _Job(side, ids[rows]), rows


class _Work(Dataset[tuple[dict[str, Any] | None, UserError | None]]):
    """What a worker does with a job. A ``UserError`` is a result, for DataLoader would make its message a traceback."""

    def __init__(self, reader: PairReader, preprocess: Preprocess) -> None:
        self.reader = reader
        self.preprocess = preprocess

    def __getitem__(self, job: _Job) -> tuple[dict[str, Any] | None, UserError | None]:
        read: Callable[[int], Any] = self.reader.query if job.side == "query" else self.reader.page
        try:
            inputs = [read(row) for row in job.ids.tolist()]
            return self._preprocessed(inputs, job), None
        except UserError as error:
            return None, error

    def _preprocessed(self, inputs: list[Any], job: _Job) -> dict[str, Any]:
        try:
            return self.preprocess(inputs, job.side)
        except Exception:
            # A page too thin for the model, a special token in a query? Where all inputs fail it is the model's defect.
            failed = [
                (row, why) for row, one in zip(job.ids, inputs, strict=True) if (why := self._fault(one, job.side))
            ]
            if not failed or len(failed) == len(inputs) > 1:
                raise
            row, why = failed[0]
            index = self.reader.index
            what = f"the query of {index.pair_id(row)}" if job.side == "query" else f"the page {index.page_id(row)}"
            raise UserError(f"{what} cannot be prepared for the model ({why}); mend its sample or drop it") from None

    def _fault(self, one: Any, side: str) -> str | None:
        try:
            self.preprocess([one], side)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None


@dataclass(frozen=True)
class _Workers:
    """How jobs are carried out: in this process (``num_workers`` 0) or by workers, to whom all of this is pickled."""

    reader: PairReader
    preprocess: Preprocess
    num_workers: int
    prefetch_factor: int
    pin_memory: bool

    def run(self, jobs: Iterable[_Job]) -> Generator[dict[str, Any], None, None]:
        """Yield the features of each job, in order."""
        loader = DataLoader(
            _Work(self.reader, self.preprocess),
            batch_size=None,
            sampler=jobs,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            # Never fork: a rank has threads (torch's, tqdm's, queues'), and a child forked while one of them starts or
            # ends can inherit a lock that no one will release.
            multiprocessing_context="forkserver" if self.num_workers else None,
            pin_memory=self.pin_memory,
            # DataLoader draws the workers' seeds when it starts; from its own generator, so that starting it, which a
            # resumed run does at another step, leaves the random state of dropout alone.
            generator=torch.Generator(),
        )
        # The loop holds the only reference to DataLoader's iterator: when it is left, the workers are shut down.
        try:
            for features, error in _started(loader):
                if error is not None:
                    raise error
                yield features
        except Exception as failure:
            if self.num_workers:  # DataLoader's frames in the traceback refer to the iterator too
                traceback.clear_frames(failure.__traceback__)
            raise


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    with main_module_hidden():
        return iter(loader)


def _unchanged(result: Any) -> Any:
    return result
