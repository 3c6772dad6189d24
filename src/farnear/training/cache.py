"""The gradient-cached step: a contrastive batch of any size through a model that holds a few pages at a time.

Every pair of a contrastive batch is a negative for every other, so the loss needs all embeddings at once, while the
graphs of all forwards never fit. The gradient cache (Gao et al. 2021, arXiv:2101.06983) splits the chain rule at the
embeddings:

    pass one    embed every mini-batch without a graph
    loss        gather the pages of all ranks; loss; gradient of each embedding
    pass two    embed every mini-batch again, with a graph, and backward <embedding, its gradient>

The sum of pass two's gradients is the gradient of the whole batch. It is exact under every strategy because

- all backwards of a step add up on the rank before one reduction (`Strategy.accumulate`);
- each mini-batch's dropout is drawn from a seed of its own, (seed, step, rank, position), set before it in both passes:
  nothing is recorded, nothing can be forgotten, and a resumed run draws what the uninterrupted one would have drawn;
- where a forward is a collective (ZeRO-3), ranks agree on the number of mini-batches of each side beforehand, and a
  short rank repeats one of its own with gradient zero. Pages come before queries on every rank, so that all ranks
  visit the same modules in the same order.

The scale of the gradient is decided in `farnear.parallel.collectives`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from farnear.config import LossConfig
from farnear.data.loader import MiniBatch, RankBatch
from farnear.loss.contrastive import Columns, contrastive_loss, false_negatives
from farnear.model.embedder import to_device
from farnear.parallel.collectives import agree_on_max, all_reduce_sum, gather_rows, rank_loss_divisor
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World

SIDES = ("document", "query")


class NonFiniteLossError(ArithmeticError):
    """The loss of the global batch is inf or nan. Raised on every rank alike."""


@dataclass
class StepFigures:
    """What one step tells about itself.

    Attributes:
        loss: Mean over the valid rows of the global batch.
        pairs: Valid rows of the global batch.
        masked: Places of the score matrix, over all ranks, that were left out as false negatives.
        tokens: Tokens in this rank's mini-batches, image placeholders included and padding left out.
        seconds: Of this rank, by phase.
        own_seconds: This rank's forwards and backwards, without waiting for others in the reduction.
    """

    loss: float = float("nan")
    pairs: int = 0
    masked: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    own_seconds: float = 0.0


@dataclass(frozen=True)
class Turn:
    """One mini-batch's place in both passes; ``counts`` is False where the rank only keeps step with others."""

    mini_batch: MiniBatch
    seed: int
    counts: bool


def cached_gradient(
    strategy: Strategy, batch: RankBatch, loss: LossConfig, figures: StepFigures, *, seed: int, world: World
) -> None:
    """Leave the gradient of the global batch's mean loss, reduced over ranks, in the strategy.

    Args:
        figures: Filled on the way, so that what is known stands there when the step fails.

    Raises:
        NonFiniteLossError: On every rank, before pass two.
    """
    turns = agree_on_turns(strategy, batch, seed, world)
    with _timed(figures, "pass_one"), torch.no_grad():
        embedding = _embed_all(strategy, batch, turns, world)
    with _timed(figures, "loss"):
        gradient = _gradient_of_embeddings(embedding, batch, loss, world, figures)
    with _timed(figures, "pass_two"), strategy.accumulate():
        started = perf_counter()
        for turn in turns:
            e_nD = _embed(strategy, turn, world)
            if turn.counts:
                rows = torch.from_numpy(turn.mini_batch.rows).to(world.device)
                strategy.backward((e_nD.float() * gradient[turn.mini_batch.side][rows]).sum())
            else:
                strategy.backward(e_nD.float().sum() * 0.0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        figures.own_seconds = figures.seconds["pass_one"] + perf_counter() - started


def agree_on_turns(strategy: Strategy, batch: RankBatch, seed: int, world: World) -> list[Turn]:
    """The order of this rank's mini-batches, padded where every rank must take the same number of turns."""
    # In the loader's order, which is the same on every rank: pages before queries, one modality after the other.
    groups = list(dict.fromkeys((mini_batch.side, mini_batch.modality) for mini_batch in batch.mini_batches))
    of_group = {
        group: [mini_batch for mini_batch in batch.mini_batches if (mini_batch.side, mini_batch.modality) == group]
        for group in groups
    }
    counts = [len(of_group[group]) for group in groups]
    if strategy.forward_is_collective:
        counts = agree_on_max(counts, world.device)
    turns: list[Turn] = []
    for group, count in zip(groups, counts, strict=True):
        own = of_group[group]
        for position in range(count):
            mini_batch = own[position] if position < len(own) else own[0]
            counts_here = position < len(own) and len(mini_batch.rows) > 0
            turns.append(Turn(mini_batch, turn_seed(seed, batch.step, world.rank, len(turns)), counts_here))
    return turns


def turn_seed(*scope: int) -> int:
    """A 63-bit seed that is a pure function of the integers it is for."""
    digest = hashlib.blake2b(repr(scope).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _embed(strategy: Strategy, turn: Turn, world: World) -> Tensor:
    torch.manual_seed(turn.seed)
    return strategy.embed(to_device(turn.mini_batch.features, world.device))


def _embed_all(strategy: Strategy, batch: RankBatch, turns: Sequence[Turn], world: World) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    rows: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for turn in turns:
        e_nD = _embed(strategy, turn, world)
        if turn.counts:
            parts[turn.mini_batch.side].append(e_nD)
            rows[turn.mini_batch.side].append(torch.from_numpy(turn.mini_batch.rows))
    # Mini-batches are cut by cost, so their rows interleave.
    place = {side: torch.cat(rows[side]).argsort().to(world.device) for side in SIDES}
    return {side: torch.cat(parts[side])[place[side]] for side in SIDES}


def _gradient_of_embeddings(
    embedding: dict[str, Tensor], batch: RankBatch, loss: LossConfig, world: World, figures: StepFigures
) -> dict[str, Tensor]:
    # fp32 from here to the surrogate, whatever the model computed in.
    leaf = {side: e.float().requires_grad_() for side, e in embedding.items()}
    k_ND, offset = gather_rows(leaf["document"])
    columns = _gather_columns(batch, world.device)
    rows = slice(offset, offset + len(batch.valid_b))
    mask_bN = false_negatives(columns, rows, torch.from_numpy(batch.answers_bm).to(world.device))
    valid_b = columns.valid_N[rows]
    loss_b = contrastive_loss(
        leaf["query"],
        k_ND,
        mask_bN,
        offset,
        scale=loss.scale,
        dims=loss.matryoshka_dims,
        dim_weights=loss.matryoshka_weights,
    )
    loss_sum = torch.where(valid_b, loss_b, 0.0).sum()
    divisor = rank_loss_divisor(int(valid_b.sum()), world.device)
    figures.pairs = int((columns.is_positive_N & columns.valid_N).sum())
    mean_loss = all_reduce_sum(loss_sum.detach().clone()) / (divisor * world.world_size)
    figures.loss = float(mean_loss)
    if not torch.isfinite(mean_loss):
        raise NonFiniteLossError
    masked = (mask_bN & columns.valid_N[None, :])[valid_b].sum()
    figures.masked = int(all_reduce_sum(masked))
    figures.tokens = sum(_tokens(mini_batch) for mini_batch in batch.mini_batches)
    (loss_sum / divisor).backward()
    return {side: _gradient(tensor) for side, tensor in leaf.items()}


def _gather_columns(batch: RankBatch, device: torch.device) -> Columns:
    """One exchange of what the mask needs of every page: [p, 4] int64 a rank."""
    pairs, pages = len(batch.valid_b), len(batch.page_hash_p)
    facts_p4 = torch.zeros((pages, 4), dtype=torch.int64)
    facts_p4[:, 0] = torch.from_numpy(batch.page_hash_p)
    facts_p4[:pairs, 1] = torch.from_numpy(batch.query_hash_b)
    facts_p4[:pairs, 2] = 1
    facts_p4[:, 3] = torch.from_numpy(batch.page_valid_p)
    facts_N4, _ = gather_rows(facts_p4.to(device))
    page_hash_N, query_hash_N, is_positive_N, valid_N = facts_N4.unbind(1)
    return Columns(page_hash_N, query_hash_N, is_positive_N.bool(), valid_N.bool())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _tokens(mini_batch: MiniBatch) -> int:
    mask = mini_batch.features.get("attention_mask")
    return 0 if mask is None else int(mask.sum())


@contextmanager
def _timed(figures: StepFigures, phase: str) -> Iterator[None]:
    started = perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    figures.seconds[phase] = perf_counter() - started
