"""From a step's number to this rank's preprocessed mini-batches, by worker processes.

    order: global batch of the step -> dealing: this rank's pairs, cut into mini-batches -> workers -> RankBatch

The unit of work is one mini-batch, cut by cost before anything is read: a worker reads its inputs, decodes them and
calls the preprocess function. So what is prepared ahead is bounded by mini-batches and not by the rank's slice, and all
workers are busy within one step. ``workers`` carries the jobs out; this module only says which jobs there are and puts
the mini-batches of a step together again.

There is no cursor here: a step's content follows from its number, so resuming is asking for a later first step. Nothing
is read, and only the plan of one epoch is opened, to get there.

An input that cannot be used keeps its place, for the shape of a batch must not depend on it: a worker puts a stand-in
there, and the pair (or, for a hard negative, the document) is marked as not valid, which the loss heeds on every rank.

Shapes: b pairs of this rank in a step, p its documents (b positives, then hard negatives), G pairs in a global batch,
m other positives of a pair.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import tee
from typing import Any

import numpy as np
import numpy.typing as npt

from farnear.data.budget import PageTokens, input_cost
from farnear.data.dealing import Dealing, RankSlice
from farnear.data.index import Index, modality_name
from farnear.data.order import Order
from farnear.data.prefetch import Prefetcher
from farnear.data.read import InputReader
from farnear.data.remote import RemoteFacts, is_remote, shown
from farnear.data.shard_store import ShardStore
from farnear.data.workers import Job, Preprocess, Result, Workers

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MiniBatch:
    """What goes through the model at once: the features of some of the rank's queries or documents.

    ``rows`` are positions in RankBatch.pairs_b ("query") or RankBatch.page_hash_p ("document"), none where the
    mini-batch was borrowed: then it is there for other ranks, whose forwards need this one's, and counts for nothing.
    """

    side: str  # "query" or "document"
    modality: str  # "image", "text", "image+text", ...: a mini-batch holds inputs of one kind
    rows: Int64
    features: dict[str, Any]
    inputs: int  # in the features, those that count for nothing among them


@dataclass(frozen=True)
class Quarantined:
    """A pair with an input that could not be used: named by ``shard``, a path or URL, and ``key``."""

    shard: str
    key: str
    input: str
    reason: str


@dataclass(frozen=True, eq=False)
class RankBatch:
    """One rank's part of the global batch of ``step`` (an optimizer step, counted over all epochs)."""

    step: int
    epoch: int
    pairs_b: Int64  # index rows of this rank's pairs
    valid_b: Bool  # False for a pair that must not count in the loss
    query_hash_b: Int64
    page_hash_p: Int64  # the b positives in the order of the pairs, then all hard negatives
    owner_p: Int64  # position in pairs_b of each document's pair
    page_valid_p: Bool  # False for a document that must not count in the loss
    answers_bm: Int64  # hashes of the batch's documents that answer each query, filled up with the row's own positive
    mini_batches: tuple[MiniBatch, ...]  # the document ones first
    quarantined: tuple[Quarantined, ...]
    seconds_waited: float  # for the workers


class TrainLoader:
    """The training batches of one rank.

    ``num_workers`` 0 works in this process; workers are sent the index and the preprocess function, which must be
    picklable then. ``prefetch_factor`` is in mini-batches a worker, ``prefetch_shards`` in shards behind URLs.
    """

    def __init__(
        self,
        order: Order,
        dealing: Dealing,
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

    def keys_of_batch(self, step: int) -> list[str]:
        """The pairs of the whole global batch of ``step`` as ``"shard name/KEY"``, for messages."""
        return [self.index.pair_id(int(pair)) for pair in self.order.global_batch(step)]

    def batches(self, start_step: int, stop_step: int) -> Generator[RankBatch, None, None]:
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
                yield self._rank_batch(step, rank_slice, done, seconds_waited)

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

    def _rank_batch(
        self,
        step: int,
        rank_slice: RankSlice,
        done: Sequence[Result],
        waited: float,
    ) -> RankBatch:
        index, pairs_b = self.index, rank_slice.pairs_b
        valid_b = np.full(len(pairs_b), not rank_slice.borrowed)
        page_valid_p = valid_b[rank_slice.owner_p]
        quarantined = []
        for (job, rows), (_, bad) in zip(rank_slice.jobs, done, strict=True):
            # What a rank without pairs borrowed, its owner reports.
            for place, reason in bad if len(rows) and not rank_slice.borrowed else ():
                row = int(rows[place])
                is_negative = job.side == "document" and row >= len(pairs_b)
                owner = int(rank_slice.owner_p[row]) if job.side == "document" else row
                if is_negative:
                    page_valid_p[row] = False
                else:
                    # Without its query or its page the pair is none: neither its row nor any of its documents counts.
                    valid_b[owner] = False
                    page_valid_p[rank_slice.owner_p == owner] = False
                pair = int(pairs_b[owner])
                shard = index.shards[index.pair_shard_N[pair]]
                quarantined.append(
                    Quarantined(shown(shard), index.pair_key[pair], index.input_id(int(job.rows[place])), reason)
                )
        mini_batches = tuple(
            MiniBatch(job.side, job.modality, rows, features, len(job.rows))
            for (job, rows), (features, _) in zip(rank_slice.jobs, done, strict=True)
        )
        return RankBatch(
            step=step,
            epoch=self.order.schedule.epoch_of(step),
            pairs_b=pairs_b,
            valid_b=valid_b,
            query_hash_b=index.query_hash_N[pairs_b],
            page_hash_p=index.input_hash_I[rank_slice.documents_p],
            owner_p=rank_slice.owner_p,
            page_valid_p=page_valid_p,
            answers_bm=self._answers(rank_slice),
            mini_batches=mini_batches,
            quarantined=tuple(quarantined),
            seconds_waited=waited,
        )

    def _answers(self, rank_slice: RankSlice) -> Int64:
        own_b = self.index.input_hash_I[rank_slice.documents_p[: len(rank_slice.pairs_b)]]
        # A query that many pairs ask may have any number of answers; those in the batch are few.
        answers = [
            np.intersect1d(self.index.positive_hashes_of_query(int(pair)), rank_slice.hashes_in_batch, True)
            for pair in rank_slice.pairs_b
        ]
        answers_bm = np.repeat(own_b[:, None], max(map(len, answers)), axis=1)
        for row, hashes in enumerate(answers):
            answers_bm[row, : len(hashes)] = hashes
        return answers_bm


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
