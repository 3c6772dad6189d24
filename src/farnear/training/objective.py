"""From the embeddings of a global batch to the gradient of each of them: gather, loss, reduce.

Two exchanges, after the one by which ranks agreed on the step. The first brings what this rank's rows are compared
with: the documents of all ranks (and the queries, where a direction has them as columns) with the hashes by which false
negatives are known. Between the two every rank computes its rows of the loss. The second hands what all ranks said
about a document to the rank that owns it, and sums the figures of the step on the way.

A teacher's scores are about a pair's own documents, which lie on its rank: that term of the loss needs no exchange of
its own, only the number of lists that count, which ranks agreed on with the step.

The scale of the gradient is decided in `farnear.parallel.collectives`.

Shapes: b pairs and p documents of this rank, B and N of all ranks, D embedding width, m answers of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farnear.data.batch import RankBatch
from farnear.loss.contrastive import contrastive_gradient, needs_all_queries
from farnear.loss.distillation import TaughtLists, distillation_gradient
from farnear.loss.false_negatives import BatchFacts
from farnear.loss.own import OwnLoss, own_gradient
from farnear.parallel.collectives import all_reduce_sum, gather_together, reduce_to_owners, row_weight
from farnear.parallel.world import World
from farnear.sections import LossConfig

# Counts are summed over ranks as float32, which is exact up to 2**24: they travel in two digits of this base.
_DIGIT = 2**16


@dataclass(frozen=True)
class Sizes:
    """What each rank holds of a step's batch, in rank order: pairs, documents, answers kept of a query.

    ``lists_W`` are the lists with a teacher's scores that count; only distillation asks.
    """

    pairs_W: Sequence[int]
    documents_W: Sequence[int]
    answers_W: Sequence[int]
    lists_W: Sequence[int] = ()

    def of_rank(self, rank: int) -> "Sizes":
        """As if there were no other."""
        return Sizes([self.pairs_W[rank]], [self.documents_W[rank]], [self.answers_W[rank]])


@dataclass(frozen=True)
class EmbeddingGradient:
    """What the loss says, the same on every rank but for ``of_side``.

    Attributes:
        of_side: "query" and "document": float32 gradients of this rank's embeddings.
        loss: Mean over the valid rows of the global batch, with what distillation adds; not finite where any row's is
            not.
        pairs: Valid rows of the global batch.
        masked: Places of the score matrix that were left out as false negatives, by content.
        beyond_margin: Places left out by loss.margin, at the largest dimension.
        dlog_scale: With respect to the logarithm of the scale.
        distillation: Mean over the lists that count, without its weight; None where there is no such term.
        lists: How many those are.
        told_Wn: What each rank told of itself: seconds of pass one, whether a gradient reaches its weights, turns whose
            frozen outputs it keeps.
    """

    of_side: dict[str, Tensor]
    loss: float
    pairs: int
    masked: int
    beyond_margin: int
    dlog_scale: float
    told_Wn: list[list[float]]
    distillation: float | None = None
    lists: int = 0

    @property
    def reaches_weights(self) -> bool:
        """Whether any rank has something to train in this step."""
        return any(trains for _, trains, _ in self.told_Wn)


def embedding_gradient(
    embedding: dict[str, Tensor],
    batch: RankBatch,
    sizes: Sizes,
    loss: LossConfig,
    world: World,
    *,
    scale: float,
    told: Sequence[float] = (0.0, 1.0, 0.0),
) -> EmbeddingGradient:
    """Gather, loss, gradient, reduce: two exchanges, whatever the batch, its tiles and dimensions.

    Args:
        embedding: "query" [b, D] and "document" [p, D] of this rank, any float type; everything here is fp32.
        sizes: Of all ranks.
        scale: Factor on the cosine similarities.
        told: Of this rank, for all ranks; see `EmbeddingGradient`.
    """
    query_bD, document_pD = embedding["query"].float(), embedding["document"].float()
    with_queries = needs_all_queries(loss)
    columns = [document_pD, query_bD] if with_queries else [document_pD]
    facts, (k_ND, *others) = gathered_facts(columns, batch, sizes, world)
    rows = _rows_of(sizes.pairs_W, world.rank)
    valid_pairs = int(facts.pair_valid_B.sum())
    weight_b = facts.pair_valid_B[rows].float() * (row_weight(valid_pairs) * loss.contrastive_weight)
    outcome = contrastive_gradient(
        query_bD, k_ND, others[0] if others else None, facts, rows, weight_b, loss, scale=scale
    )
    distilled, lists = None, sum(sizes.lists_W)
    if loss.distillation is not None:
        weight = row_weight(lists) * loss.distillation_weight
        taught = taught_lists(batch, world.device)
        distilled = distillation_gradient(query_bD, document_pD, taught, loss, weight=weight, scale=scale)
    dlog_scale = outcome.dlog_scale if distilled is None else outcome.dlog_scale + distilled.dlog_scale
    told_at = 6 if distilled is None else 7
    sums = torch.zeros(told_at + len(told) * world.world_size, device=world.device)
    # A row that does not count must not show its nan.
    sums[0], sums[1] = torch.where(weight_b > 0, outcome.loss_b, 0.0).sum(), dlog_scale / world.world_size
    sums[2:4], sums[4:6] = _digits(outcome.masked), _digits(outcome.beyond_margin)
    if distilled is not None:
        sums[6] = distilled.loss_b.sum()
    sums[told_at:].view(world.world_size, -1)[world.rank] = torch.tensor(told)
    said = [outcome.dk_ND] if outcome.dq_BD is None else [outcome.dk_ND, outcome.dq_BD]
    own, sums = reduce_to_owners(said, list(zip(sizes.documents_W, sizes.pairs_W, strict=True)), sums)
    figures = sums[:told_at].tolist()
    of_side = {"document": own[0], "query": outcome.dq_bD + own[1] if len(own) > 1 else outcome.dq_bD}
    of_loss, distillation = figures[0] / max(valid_pairs, 1), None
    if distilled is not None:
        # They are about this rank's own rows.
        of_side = {"document": of_side["document"] + distilled.dk_pD, "query": of_side["query"] + distilled.dq_bD}
        distillation = figures[6] / max(lists, 1)
        of_loss = loss.contrastive_weight * of_loss + loss.distillation_weight * distillation
    return EmbeddingGradient(
        of_side=of_side,
        loss=of_loss,
        pairs=valid_pairs,
        masked=_number(figures[2:4]),
        beyond_margin=_number(figures[4:6]),
        dlog_scale=figures[1],
        told_Wn=sums[told_at:].view(world.world_size, -1).tolist(),
        distillation=distillation,
        lists=lists,
    )


def taught_lists(batch: RankBatch, device: torch.device) -> TaughtLists:
    """This rank's documents as lists with a teacher's scores. What is quarantined is no part of them."""
    owner_p, valid_p, teacher_p = (
        torch.from_numpy(x).to(device)
        for x in (batch.owner_p, batch.page_valid_p & batch.valid_b[batch.owner_p], batch.teacher_p)
    )
    return TaughtLists(owner_p, valid_p, teacher_p, len(batch.pairs_b))


def own_loss_gradient(
    function: OwnLoss,
    embedding: dict[str, Tensor],
    batch: RankBatch,
    sizes: Sizes,
    loss: LossConfig,
    world: World,
    *,
    told: Sequence[float] = (0.0, 1.0, 0.0),
) -> EmbeddingGradient:
    """As `embedding_gradient`, by a function of the user's own."""
    query_bD, document_pD = embedding["query"].float(), embedding["document"].float()
    everybodys = sizes if loss.gather else sizes.of_rank(world.rank)
    facts, (k_ND, q_BD) = gathered_facts([document_pD, query_bD], batch, everybodys, world)
    mine = world.rank if loss.gather else 0
    of_loss, dq_BD, dk_ND = own_gradient(function, q_BD, k_ND, facts, loss)
    # The strategy averages over ranks. A loss of all ranks' embeddings is one that each rank has the whole of, but
    # only its own rows' part of the gradient; of losses of their own the average is what is wanted.
    weight = world.world_size if loss.gather else 1
    sums = torch.zeros(2 + len(told) * world.world_size, device=world.device)
    sums[0], sums[1] = of_loss / world.world_size, int(facts.pair_valid_B.sum()) / weight
    sums[2:].view(world.world_size, -1)[world.rank] = torch.tensor(told)
    all_reduce_sum(sums)
    return EmbeddingGradient(
        of_side={
            "document": dk_ND[_rows_of(everybodys.documents_W, mine)] * weight,
            "query": dq_BD[_rows_of(everybodys.pairs_W, mine)] * weight,
        },
        loss=float(sums[0]),
        pairs=round(float(sums[1])),
        masked=0,
        beyond_margin=0,
        dlog_scale=0.0,
        told_Wn=sums[2:].view(world.world_size, -1).tolist(),
    )


def gathered_facts(
    embeddings: Sequence[Tensor], batch: RankBatch, sizes: Sizes, world: World
) -> tuple[BatchFacts, Sequence[Tensor]]:
    """Facts and embeddings (documents, then queries if they are given) of the ranks whose ``sizes`` are given."""
    own_b = batch.page_hash_p[: len(batch.pairs_b)]
    # Ranks keep different numbers of answers; one that stands there twice changes nothing.
    answers_bm = np.repeat(own_b[:, None], max(sizes.answers_W), axis=1)
    answers_bm[:, : batch.answers_bm.shape[1]] = batch.answers_bm
    page_facts_pf = np.stack([batch.page_hash_p, batch.owner_p, batch.page_valid_p], axis=1)
    pair_facts_bf = np.concatenate([batch.query_hash_b[:, None], batch.valid_b[:, None], answers_bm], axis=1)
    facts = [torch.from_numpy(x.astype(np.int64)).to(world.device) for x in (page_facts_pf, pair_facts_bf)]
    everything = [*facts, *embeddings]
    if len(sizes.pairs_W) > 1:
        rows_Wt = [
            [documents, pairs, documents, pairs][: len(everything)]
            for documents, pairs in zip(sizes.documents_W, sizes.pairs_W, strict=True)
        ]
        everything = gather_together(everything, rows_Wt)
    page_facts_Nf, pair_facts_Bf, *gathered = everything
    # From positions on a rank to positions among all.
    owner_N = page_facts_Nf[:, 1] + _first_of_each(sizes.pairs_W).repeat_interleave(torch.tensor(sizes.documents_W)).to(
        world.device
    )
    positive_B = torch.cat(
        [first + torch.arange(b) for first, b in zip(_first_of_each(sizes.documents_W), sizes.pairs_W, strict=True)]
    )
    about = BatchFacts(
        query_hash_B=pair_facts_Bf[:, 0].contiguous(),
        pair_valid_B=pair_facts_Bf[:, 1].bool(),
        answers_Bm=pair_facts_Bf[:, 2:].contiguous(),
        positive_B=positive_B.to(world.device),
        page_hash_N=page_facts_Nf[:, 0].contiguous(),
        owner_N=owner_N,
        page_valid_N=page_facts_Nf[:, 2].bool(),
    )
    return about, gathered


def _first_of_each(counts_W: Sequence[int]) -> Tensor:
    counts = torch.tensor(counts_W)
    return counts.cumsum(0) - counts


def _rows_of(counts_W: Sequence[int], rank: int) -> slice:
    first = int(_first_of_each(counts_W)[rank])
    return slice(first, first + counts_W[rank])


def _digits(count: Tensor) -> Tensor:
    return torch.stack([count // _DIGIT, count % _DIGIT]).float()


def _number(digits: Sequence[float]) -> int:
    return int(digits[0]) * _DIGIT + int(digits[1])
