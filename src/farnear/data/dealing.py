"""One rank's part of a global batch: its pairs, their documents, and the mini-batches that they are cut into.

All of it follows from the index, before anything is read, and every rank could work out every other's part.

Shapes: G pairs in the global batch, b pairs of this rank, p its documents (b positives, then hard negatives).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from farnear.data.batch import MiniBatch, RankBatch, quarantined_pair
from farnear.data.budget import PageTokens, cut, deal, input_cost
from farnear.data.index import Index, modality_name
from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.workers import Job, Result

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

SIDES = ("document", "query")


@dataclass(frozen=True, eq=False)
class RankSlice:
    """What a rank does in a step.

    Attributes:
        pairs_b: Pair rows.
        documents_p: Input rows: the positives in the order of the pairs, then all hard negatives.
        owner_p: Position in ``pairs_b`` of each document's pair.
        teacher_p: A teacher's scores of the documents, nan where there is none.
        hashes_in_batch: Content of every document of the global batch, sorted.
        borrowed: Whether the rank has no pair of its own and only keeps step, with a pair of another rank.
        jobs: The mini-batches, documents first, each with the positions of its inputs in ``documents_p`` or
            ``pairs_b``; no positions where it is there for other ranks' sake.
    """

    pairs_b: Int64
    documents_p: Int64
    owner_p: Int64
    teacher_p: Float32
    hashes_in_batch: Int64
    borrowed: bool
    jobs: tuple[tuple[Job, Int64], ...]


@dataclass(frozen=True)
class Dealing:
    """How global batches are dealt to ranks and cut into mini-batches.

    Attributes:
        page_tokens: What a page costs, by its size.
        mini_batch_size: Most inputs in a mini-batch of each side; None for no bound.
        mini_batch_num_tokens: Most that a mini-batch of each side may cost, padding included; None for no bound.
        num_negatives: Most hard negatives of a pair; None for all.
        same_modalities: Whether a rank borrows a mini-batch of every kind that another rank has, where a forward needs
            all ranks.
        negatives: The hard ones of the order's pairs; None for those that the shards hold, as they are.
    """

    rank: int
    world_size: int
    page_tokens: PageTokens
    mini_batch_size: Mapping[str, int | None]
    mini_batch_num_tokens: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(SIDES))
    num_negatives: int | None = None
    same_modalities: bool = False
    negatives: Negatives | None = None

    def slice_of(self, order: Order, step: int) -> RankSlice:
        """The rank's part of a step, counted over all epochs."""
        index, pairs_G = order.index, order.global_batch(step)
        places_G = order.places_of_positives(pairs_G, order.schedule.epoch_of(step))
        positives_G = index.positives[places_G]
        negatives_of = index.negatives_of if self.negatives is None else self.negatives.of
        negatives_G = [negatives_of(pair)[: self.num_negatives] for pair in pairs_G]
        all_negatives = np.concatenate(negatives_G)
        owner = np.repeat(np.arange(len(pairs_G)), [len(rows) for rows in negatives_G])
        cost_G = input_cost(index, index.query_N[pairs_G], self.page_tokens)
        cost_G += input_cost(index, positives_G, self.page_tokens)
        np.add.at(cost_G, owner, input_cost(index, all_negatives, self.page_tokens))
        own = deal(cost_G, self.world_size)[self.rank]
        borrowed = len(own) == 0
        if borrowed:
            # A rank without pairs would call fewer collectives than the others and hang them.
            own, own_negatives = np.zeros(1, np.int64), [all_negatives[:0]]
        else:
            own_negatives = [negatives_G[place] for place in own]
        counts_b = [len(rows) for rows in own_negatives]
        documents_p = np.concatenate([positives_G[own], *own_negatives])
        jobs = [
            *self._cut(index, "document", documents_p, np.concatenate([positives_G, all_negatives])),
            *self._cut(index, "query", index.query_N[pairs_G[own]], index.query_N[pairs_G]),
        ]
        owner_p = np.concatenate([np.arange(len(own)), np.repeat(np.arange(len(own)), counts_b)])
        teacher_p = self._teacher(pairs_G[own], places_G[own], counts_b)
        hashes = np.unique(index.input_hash_I[np.concatenate([positives_G, all_negatives])])
        return RankSlice(pairs_G[own], documents_p, owner_p, teacher_p, hashes, borrowed, tuple(jobs))

    def batch(self, order: Order, step: int, share: RankSlice, done: Sequence[Result], waited: float) -> RankBatch:
        """The rank's batch of a step, from the result of each job; ``waited`` are seconds."""
        index, pairs_b = order.index, share.pairs_b
        valid_b = np.full(len(pairs_b), not share.borrowed)
        page_valid_p = valid_b[share.owner_p]
        quarantined = []
        for (job, rows), (_, bad) in zip(share.jobs, done, strict=True):
            # What a rank without pairs borrowed, its owner reports.
            for place, reason in bad if len(rows) and not share.borrowed else ():
                row = int(rows[place])
                is_negative = job.side == "document" and row >= len(pairs_b)
                owner = int(share.owner_p[row]) if job.side == "document" else row
                if is_negative:
                    page_valid_p[row] = False
                else:
                    # Without its query or its page the pair is none: neither its row nor any of its documents counts.
                    valid_b[owner] = False
                    page_valid_p[share.owner_p == owner] = False
                quarantined.append(quarantined_pair(index, int(pairs_b[owner]), int(job.rows[place]), reason))
        mini_batches = tuple(
            MiniBatch(job.side, job.modality, rows, features, len(job.rows))
            for (job, rows), (features, _) in zip(share.jobs, done, strict=True)
        )
        return RankBatch(
            step=step,
            epoch=order.schedule.epoch_of(step),
            pairs_b=pairs_b,
            valid_b=valid_b,
            query_hash_b=index.query_hash_N[pairs_b],
            page_hash_p=index.input_hash_I[share.documents_p],
            owner_p=share.owner_p,
            page_valid_p=page_valid_p,
            teacher_p=share.teacher_p,
            answers_bm=_answers(index, share),
            mini_batches=mini_batches,
            quarantined=tuple(quarantined),
            seconds_waited=waited,
        )

    def _teacher(self, pairs_b: Int64, places_b: Int64, counts_b: Sequence[int]) -> Float32:
        """Scores of the pairs' positives, which stand at some places of `Index.positives`, then of their negatives."""
        if self.negatives is None:
            return np.full(len(pairs_b) + sum(counts_b), np.nan, np.float32)
        hard = [self.negatives.teacher_of(pair)[:count] for pair, count in zip(pairs_b, counts_b, strict=True)]
        return np.concatenate([self.negatives.positive_teacher[places_b], *hard])

    def _cut(self, index: Index, side: str, own: Int64, of_all_ranks: Int64) -> Iterator[tuple[Job, Int64]]:
        """Mini-batches of one modality each, modalities in the same order on every rank."""
        own_modality, any_modality = index.input_modality_I[own], index.input_modality_I[of_all_ranks]
        for modality in np.unique(any_modality):
            name = modality_name(int(modality))
            places = np.flatnonzero(own_modality == modality)
            cost = input_cost(index, own[places], self.page_tokens)
            for part in cut(cost, self.mini_batch_size[side], self.mini_batch_num_tokens[side]):
                yield Job(side, name, own[places[part]]), places[part]
            if len(places) == 0 and self.same_modalities:
                yield Job(side, name, of_all_ranks[any_modality == modality][:1]), places


def _answers(index: Index, share: RankSlice) -> Int64:
    """Of each pair the hashes of the batch's documents that answer its query, filled up with its own positive's."""
    own_b = index.input_hash_I[share.documents_p[: len(share.pairs_b)]]
    # A query that many pairs ask may have any number of answers; those in the batch are few.
    answers = [
        np.intersect1d(index.positive_hashes_of_query(int(pair)), share.hashes_in_batch, True) for pair in share.pairs_b
    ]
    answers_bm = np.repeat(own_b[:, None], max(map(len, answers)), axis=1)
    for row, hashes in enumerate(answers):
        answers_bm[row, : len(hashes)] = hashes
    return answers_bm
