"""One rank's part of a global batch: its pairs, their documents, and the mini-batches that they are cut into.

All of it follows from the index, before anything is read, and every rank could work out every other's part.

Shapes: G pairs in the global batch, b pairs of this rank, p its documents (b positives, then hard negatives).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from farnear.data.budget import PageTokens, cut, deal, input_cost
from farnear.data.index import Index, modality_name
from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.workers import Job

Int64 = npt.NDArray[np.int64]

SIDES = ("document", "query")


@dataclass(frozen=True, eq=False)
class RankSlice:
    """What a rank does in a step.

    Attributes:
        pairs_b: Pair rows.
        documents_p: Input rows: the positives in the order of the pairs, then all hard negatives.
        owner_p: Position in ``pairs_b`` of each document's pair.
        hashes_in_batch: Content of every document of the global batch, sorted.
        borrowed: Whether the rank has no pair of its own and only keeps step, with a pair of another rank.
        jobs: The mini-batches, documents first, each with the positions of its inputs in ``documents_p`` or
            ``pairs_b``; no positions where it is there for other ranks' sake.
    """

    pairs_b: Int64
    documents_p: Int64
    owner_p: Int64
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
        positives_G = order.positives(pairs_G, order.schedule.epoch_of(step))
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
        hashes = np.unique(index.input_hash_I[np.concatenate([positives_G, all_negatives])])
        return RankSlice(pairs_G[own], documents_p, owner_p, hashes, borrowed, tuple(jobs))

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
