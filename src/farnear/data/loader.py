"""From a step's number to this rank's preprocessed mini-batches, by worker processes.

    order: global batch of the step -> dealing: this rank's pairs, cut into mini-batches -> workers -> the rank's batch

The unit of work is one mini-batch, cut by cost before anything is read: a worker reads its inputs, decodes them and
calls the preprocess function. So what is prepared ahead is bounded by mini-batches and not by the rank's slice, and all
workers are busy within one step. ``workers`` carries the jobs out; this module only says which jobs there are and puts
the mini-batches of a step together again.

There is no cursor here: a step's content follows from its number, so resuming is asking for a later first step. Nothing
is read, and only the plan of one epoch is opened, to get there.

Which jobs a step has, and what their results are put together to, is for the dealing to say: for an embedder
``dealing``, for a reranker ``lists``.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import tee
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from farnear.data.budget import PageTokens, input_cost
from farnear.data.index import Index, modality_name
from farnear.data.order import Order
from farnear.data.prefetch import Prefetcher
from farnear.data.read import InputReader
from farnear.data.remote import RemoteFacts, is_remote
from farnear.data.shard_store import ShardStore
from farnear.data.workers import Job, Preprocess, Result, Workers

Int64 = npt.NDArray[np.int64]


class RankShare(Protocol):
    """A rank's part of a step, before anything is read."""

    @property
    def jobs(self) -> Sequence[tuple[Job, Any]]:
        """What the workers are to do, each with what the dealing wants to remember of it."""


Share = TypeVar("Share", bound=RankShare)
Batch = TypeVar("Batch", covariant=True)


class Deals(Protocol[Share, Batch]):
    """Says what a rank does in a step, and makes its batch of what the workers did."""

    def slice_of(self, order: Order, step: int) -> Share:
        """The rank's part of a step, counted over all epochs."""

    def batch(self, order: Order, step: int, share: Share, done: Sequence[Result], waited: float) -> Batch:
        """The batch, from the result of each job; ``waited`` are seconds."""


class TrainLoader(Generic[Share, Batch]):
    """The training batches of one rank.

    ``num_workers`` 0 works in this process; workers are sent the index and the preprocess function, which must be
    picklable then. ``prefetch_factor`` is in mini-batches a worker, ``prefetch_shards`` in shards behind URLs.
    """

    def __init__(
        self,
        order: Order,
        dealing: Deals[Share, Batch],
        store: ShardStore,
        preprocess: Preprocess,
        *,
        num_workers: int,
        prefetch_factor: int = 2,
        prefetch_shards: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.index = order.index
        self.order = order
        self._dealing = dealing
        self._store = store
        self._prefetch_shards = prefetch_shards
        self._workers = Workers(InputReader(order.index, store), preprocess, num_workers, prefetch_factor, pin_memory)

    def deal_by(self, dealing: Deals[Share, Batch]) -> None:
        """What the next `batches` are dealt by."""
        self._dealing = dealing

    def keys_of_batch(self, step: int) -> list[str]:
        """The pairs of the whole global batch of ``step`` as ``"shard name/KEY"``, for messages."""
        return [self.index.pair_id(int(pair)) for pair in self.order.global_batch(step)]

    def batches(self, start_step: int, stop_step: int) -> Generator[Batch, None, None]:
        """Yield the batches of steps ``start_step`` to ``stop_step`` - 1, counted over all epochs.

        The workers stop when the iterator is exhausted or closed. Raises ``UserError`` for a shard that cannot be
        read, ``WorkerDiedError`` when a worker is killed, and what the preprocess function raises for every input
        alike.
        """
        steps = range(start_step, stop_step)
        # Jobs are handed out some steps ahead; what a step is made of is worked out once for both.
        for_workers, for_batches = tee(self._dealing.slice_of(self.order, step) for step in steps)
        jobs = (job for rank_slice in for_workers for job, _ in rank_slice.jobs)
        with self._prefetching(start_step, stop_step) as advance, closing(self._workers.run(jobs)) as results:
            for step, rank_slice in zip(steps, for_batches, strict=True):
                advance(step)
                seconds_before = time.perf_counter()
                done = [next(results) for _ in rank_slice.jobs]
                seconds_waited = time.perf_counter() - seconds_before
                yield self._dealing.batch(self.order, step, rank_slice, done, seconds_waited)

    @contextmanager
    def _prefetching(self, start_step: int, stop_step: int) -> Iterator[Callable[[int], None]]:
        """Download shards behind URLs ahead of the steps that read them; yields what is told of each step's start."""
        if not self._prefetch_shards or self._store.ranged or not any(map(is_remote, self.index.shards)):
            yield lambda step: None
            return
        position_of_step: dict[int, int] = {}

        def shards_in_order() -> Iterator[tuple[str, RemoteFacts]]:
            position = 0
            for step in range(start_step, stop_step):
                position_of_step[step] = position
                rows = np.concatenate([job.rows for job, _ in self._dealing.slice_of(self.order, step).jobs])
                for shard in dict.fromkeys(self.index.part_shard_M[self.index.part_start_I1[rows]].tolist()):
                    if is_remote(self.index.shards[shard]):
                        size, etag = int(self.index.shard_size_S[shard]), self.index.etags[shard]
                        yield self.index.shards[shard], RemoteFacts(size, etag)
                        position += 1

        prefetcher = Prefetcher(self._store.cache, shards_in_order(), self._prefetch_shards)
        try:
            yield lambda step: prefetcher.advance(position_of_step.get(step, 0))
        finally:
            prefetcher.close()


def load_features(
    index: Index,
    store: ShardStore,
    preprocess: Preprocess,
    side: str,
    rows: Int64,
    *,
    batch_size: int,
    page_tokens: PageTokens,
    num_workers: int,
) -> Generator[tuple[Int64, dict[str, Any]], None, None]:
    """Yield (positions in ``rows``, features) for encoding the inputs ``rows`` of an index, in batches of one modality.

    Raises ``UserError`` for an input that cannot be used, for there is no ranking without it; else as
    ``TrainLoader.batches`` does.
    """
    jobs = []
    for modality in np.unique(index.input_modality_I[rows]):
        places = np.flatnonzero(index.input_modality_I[rows] == modality)
        # Inputs of like cost share a batch, so that little of it is padding.
        places = places[np.argsort(-input_cost(index, rows[places], page_tokens), kind="stable")]
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            jobs.append((Job(side, modality_name(int(modality)), rows[part], needed=True), part))
    workers = Workers(InputReader(index, store), preprocess, min(num_workers, len(jobs)), 2, False)
    with closing(workers.run(job for job, _ in jobs)) as results:
        for _, places in jobs:
            features, _ = next(results)
            yield places, features
