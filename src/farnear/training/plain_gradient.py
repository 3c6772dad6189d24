"""The gradient that a cached step has to equal: the whole global batch through the model at once, one backward.

Rank 0 computes it alone, with a copy of the model that no strategy has touched. There is no cache, no mini-batch and no
rank in it; only where the model draws random numbers (dropout) does it go mini-batch by mini-batch, each from the seed
that the cached step gives it, because its masks are part of the objective.

Shapes: B pairs and N documents of the global batch, n inputs of a mini-batch, D embedding width.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farnear.config import RunConfig
from farnear.data.batch import RankBatch
from farnear.data.dealing import SIDES, Dealing
from farnear.data.loader import TrainLoader
from farnear.data.order import Order
from farnear.data.shard_store import ShardStore
from farnear.data.workers import Preprocess
from farnear.loss.contrastive import contrastive_gradient, needs_all_queries
from farnear.loss.distillation import distillation_gradient
from farnear.loss.own import OwnLoss, own_gradient
from farnear.model.embedder import Embedder, to_device
from farnear.parallel.world import World
from farnear.training.cache import groups_of, turns_of
from farnear.training.objective import Sizes, gathered_facts, taught_lists


@dataclass(frozen=True)
class Probe:
    """A small global batch of the run's own pairs, and how it is dealt and cut.

    Attributes:
        dealing: Of this rank.
    """

    order: Order
    dealing: Dealing
    store: ShardStore
    preprocess: Preprocess

    def batch(self, step: int = 0) -> RankBatch:
        """This rank's part of the batch of ``step``, read and prepared in this process."""
        loader = TrainLoader(self.order, self.dealing, self.store, self.preprocess, num_workers=0)
        with closing(loader.batches(step, step + 1)) as batches:
            return next(batches)

    def of_rank(self, rank: int) -> "Probe":
        """As another rank sees it."""
        return replace(self, dealing=replace(self.dealing, rank=rank))

    def whole(self) -> "Probe":
        """As a single rank with room for all of it sees it."""
        unbounded: dict[str, int | None] = dict.fromkeys(SIDES)
        one_rank = replace(
            self.dealing, rank=0, world_size=1, mini_batch_size=unbounded, mini_batch_num_tokens=unbounded
        )
        return replace(self, dealing=one_rank)


def plain_gradient(
    config: RunConfig, module: Embedder, probe: Probe, own_loss: OwnLoss | None, world: World, *, replay: bool
) -> dict[str, Tensor]:
    """Gradient of the mean loss by the name of each trained parameter, float32 on the CPU.

    Args:
        module: In training mode, on the rank's device. Its gradients are cleared.
        replay: Whether the model draws random numbers.
    """
    whole = probe.whole().batch()
    rows_of_rank = dict(_rows_of_ranks(probe, whole))
    if replay:
        pieces = list(_replayed(config, module, probe, rows_of_rank, world))
    else:
        pieces = [
            (mini.side, torch.from_numpy(mini.rows), module(to_device(mini.features, world.device)))
            for mini in whole.mini_batches
        ]
    embedding = {side: _in_order(pieces, side) for side in SIDES}
    detached = {side: e_nD.detach().float() for side, e_nD in embedding.items()}
    if own_loss is not None and not config.loss.gather:
        gradient = _mean_over_ranks(config, detached, probe, rows_of_rank, own_loss, world)
    else:
        gradient = _of_whole(config, detached, whole, own_loss, world)
    torch.stack([(embedding[side].float() * gradient[side]).sum() for side in SIDES]).sum().backward()
    found = {
        name: torch.zeros_like(p, dtype=torch.float32, device="cpu") if p.grad is None else p.grad.float().cpu()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    module.zero_grad(set_to_none=True)
    return found


def _of_whole(
    config: RunConfig, embedding: Mapping[str, Tensor], batch: RankBatch, own_loss: OwnLoss | None, world: World
) -> dict[str, Tensor]:
    """The gradient of each embedding."""
    query_BD, document_ND = embedding["query"], embedding["document"]
    facts, _ = gathered_facts([document_ND, query_BD], batch, _sizes(batch), world)
    if own_loss is not None:
        _, dq_BD, dk_ND = own_gradient(own_loss, query_BD, document_ND, facts, config.loss)
        return {"query": dq_BD, "document": dk_ND}
    weight_B = config.loss.contrastive_weight * facts.pair_valid_B.float() / facts.pair_valid_B.sum().clamp_min(1)
    columns = query_BD if needs_all_queries(config.loss) else None
    rows = slice(0, len(query_BD))
    outcome = contrastive_gradient(
        query_BD, document_ND, columns, facts, rows, weight_B, config.loss, scale=config.loss.scale
    )
    dq_BD = outcome.dq_bD if outcome.dq_BD is None else outcome.dq_bD + outcome.dq_BD
    if config.loss.distillation is None:
        return {"query": dq_BD, "document": outcome.dk_ND}
    taught = taught_lists(batch, world.device)
    weight = config.loss.distillation_weight / max(int(taught.counts(config.loss).sum()), 1)
    distilled = distillation_gradient(
        query_BD, document_ND, taught, config.loss, weight=weight, scale=config.loss.scale
    )
    return {"query": dq_BD + distilled.dq_bD, "document": outcome.dk_ND + distilled.dk_pD}


def _mean_over_ranks(
    config: RunConfig,
    embedding: Mapping[str, Tensor],
    probe: Probe,
    rows_of_rank: Mapping[int, Mapping[str, Tensor]],
    own_loss: OwnLoss,
    world: World,
) -> dict[str, Tensor]:
    """The same for a loss that each rank takes of its own embeddings."""
    gradient = {side: torch.zeros_like(e_nD) for side, e_nD in embedding.items()}
    for rank, rows in rows_of_rank.items():
        own = {side: embedding[side][rows[side].to(world.device)] for side in SIDES}
        of_rank = _of_whole(config, own, probe.of_rank(rank).batch(), own_loss, world)
        for side in SIDES:
            gradient[side][rows[side].to(world.device)] = of_rank[side] / world.world_size
    return gradient


def _replayed(
    config: RunConfig,
    module: Embedder,
    probe: Probe,
    rows_of_rank: Mapping[int, Mapping[str, Tensor]],
    world: World,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(side, rows in the global batch, embeddings) of each mini-batch of each rank, drawn as the cached step draws."""
    groups_W = {rank: groups_of(probe.of_rank(rank).batch().mini_batches) for rank in range(world.world_size)}
    for rank, rows in rows_of_rank.items():
        batch = probe.of_rank(rank).batch()
        counts = [len(group) for group in groups_W[rank]]
        if probe.dealing.same_modalities:
            counts = [max(map(len, of_group)) for of_group in zip(*groups_W.values(), strict=True)]
        for turn in turns_of(batch, groups_W[rank], counts, 0.0, (config.seed, batch.step, rank)):
            if turn.counts:
                torch.manual_seed(turn.seed)
                mini = turn.mini_batch
                e_nD = module(to_device(mini.features, world.device))
                yield mini.side, rows[mini.side][torch.from_numpy(mini.rows)], e_nD


def _rows_of_ranks(probe: Probe, whole: RankBatch) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Where each rank's queries and documents stand in the global batch; ranks that only keep step are left out."""
    place_of_pair = {int(pair): place for place, pair in enumerate(whole.pairs_b)}
    first_negative = len(whole.pairs_b)
    negatives_of: list[list[int]] = [[] for _ in whole.pairs_b]
    for place, owner in enumerate(whole.owner_p[first_negative:].tolist(), first_negative):
        negatives_of[owner].append(place)
    world_size = probe.dealing.world_size
    for rank in range(world_size):
        dealt = probe.of_rank(rank).dealing.slice_of(probe.order, whole.step)
        if dealt.borrowed:
            continue
        pairs = [place_of_pair[int(pair)] for pair in dealt.pairs_b]
        documents = [*pairs, *(place for pair in pairs for place in negatives_of[pair])]
        yield rank, {"query": torch.tensor(pairs), "document": torch.tensor(documents)}


def _in_order(pieces: list[tuple[str, Tensor, Tensor]], side: str) -> Tensor:
    """The embeddings of a side by their rows in the global batch."""
    rows = torch.cat([rows_n for of, rows_n, _ in pieces if of == side])
    e_nD = torch.cat([e_nD for of, _, e_nD in pieces if of == side])
    return e_nD[rows.argsort().to(e_nD.device)]


def _sizes(batch: RankBatch) -> Sizes:
    return Sizes([len(batch.pairs_b)], [len(batch.page_hash_p)], [batch.answers_bm.shape[1]])
