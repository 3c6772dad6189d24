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
- where a forward is a collective (ZeRO-3, FSDP2), ranks agree on the number of mini-batches of each side beforehand,
  and a short rank repeats one of its own with gradient zero. Pages come before queries on every rank, so that all
  ranks visit the same modules in the same order.

With the forward as 1 and the backward as 2 this costs 4 where an uncached step costs 3. Three things bring it down:

- mini-batches may keep their graph from pass one, as many as fit in memory, and are not embedded again: with a
  fraction f of them the step costs 4 - f;
- without dropout several mini-batches go through pass one together (`farnear.model.features`);
- what a frozen part of the model gives in pass one is kept for pass two (`farnear.model.frozen`);
- under mixed precision the weights are cast once for all mini-batches of a pass, not once for each.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from farnear.data.batch import MiniBatch, RankBatch
from farnear.data.dealing import SIDES
from farnear.loss.own import OwnLoss
from farnear.model.embedder import to_device
from farnear.model.frozen import FrozenOutputs
from farnear.parallel.collectives import exchange_ints
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World
from farnear.sections import LossConfig
from farnear.training.objective import EmbeddingGradient, Sizes, embedding_gradient, own_loss_gradient, taught_lists
from farnear.training.step import (
    NonFiniteLossError,
    StepFigures,
    backward_of,
    count_tokens,
    longest_over_mean,
    timed,
    turn_seed,
)
from farnear.training.watch import Int64, Watch


@dataclass(frozen=True)
class Turn:
    """One mini-batch's place in both passes.

    Attributes:
        pairs: Rows of the index that its inputs belong to.
        counts: False where the rank only keeps step with others.
        keeps_graph: Whether pass one is to leave its graph for pass two.
    """

    position: int
    mini_batch: MiniBatch
    pairs: Int64
    seed: int
    counts: bool
    keeps_graph: bool

    @property
    def group(self) -> tuple[str, str]:
        """Turns of one group visit the same modules."""
        return self.mini_batch.side, self.mini_batch.modality


@dataclass(frozen=True)
class CachedStep:
    """What every step has in common.

    Attributes:
        loss: The objective.
        own_loss: What ``loss.function`` names.
        seed: Of every dropout mask.
        keep_graphs: Share of the mini-batches, the last of each group, that keep their graph from pass one.
        together: Most mini-batches that go through pass one at once; 1 where dropout has to be replayed.
        merge: Makes one mini-batch's features of several; needed where ``together`` is above 1.
        frozen: Keeps outputs of frozen parts.
        cast_once: A context in which autocast keeps its casts of the weights. It is never open across a change between
            forwards with and without graph: a cast made without would be taken for one with, and hide its weight.
        watch: Is told where the step is.
    """

    strategy: Strategy
    world: World
    loss: LossConfig
    seed: int
    own_loss: OwnLoss | None = None
    keep_graphs: float = 0.0
    together: int = 1
    merge: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None
    frozen: FrozenOutputs | None = None
    cast_once: Callable[[], AbstractContextManager[Any]] = nullcontext
    watch: Watch = field(default_factory=Watch)
    # Whether a gradient reaches the weights from a group: not where everything that it goes through is frozen.
    _trains: dict[tuple[str, str], bool] = field(default_factory=dict)
    # Frozen parts that a group goes through.
    _meets: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    _flops_per_unit: dict[tuple[str, str], float] = field(default_factory=dict)

    def gradient(self, batch: RankBatch, figures: StepFigures, *, scale: float) -> EmbeddingGradient:
        """Leave the gradient of the global batch's mean loss, reduced over ranks, in the strategy.

        Args:
            figures: Filled on the way, so that what is known stands there when the step fails.
            scale: Factor on the cosine similarities.

        Raises:
            NonFiniteLossError: On every rank, before pass two.
        """
        self.world.traffic.start()
        with self.world.traffic.exchange():
            turns, sizes = self._agree(batch, figures)
        for group in dict.fromkeys(turn.group for turn in turns):
            if group not in self._trains:
                self._look_at(next(turn for turn in turns if turn.group == group))
        figures.model_flops = sum(_units(turn.mini_batch) * self._flops_per_unit[turn.group] for turn in turns)
        with timed(figures, "pass_one"):
            embedding, graphs = self._pass_one(turns)
        figures.kept_graphs, figures.frozen_bytes = len(graphs), self.frozen.kept_bytes if self.frozen else 0
        self.watch.at("loss", pairs=batch.pairs_b)
        with timed(figures, "loss"), self.world.traffic.exchange():
            outcome = self._loss(embedding, turns, batch, sizes, figures, scale)
        with timed(figures, "pass_two"):
            # Where every rank's mini-batches go through frozen parts alone there is no gradient, and no strategy has
            # a way to reduce none.
            if outcome.reaches_weights:
                self._pass_two(turns, graphs, outcome)
        return outcome

    def _agree(self, batch: RankBatch, figures: StepFigures) -> tuple[list[Turn], Sizes]:
        """What this rank does in both passes, and what each rank holds. One exchange."""
        groups = groups_of(batch.mini_batches)
        # Ranks have the same groups where it matters, and then they take the same number of turns in each.
        counts = [len(group) for group in groups] if self.strategy.forward_is_collective else []
        # The mean over lists with a teacher's scores is one of all ranks' lists: how many, all know before the loss.
        lists = int(taught_lists(batch, torch.device("cpu")).counts(self.loss).sum()) if self.loss.distillation else 0
        held = [len(batch.pairs_b), len(batch.page_hash_p), batch.answers_bm.shape[1], lists, len(batch.quarantined)]
        of_rank = exchange_ints(
            [*held, *count_tokens([mini_batch.features for mini_batch in batch.mini_batches]), *counts],
            self.world.device,
        )
        pairs_W, documents_W, answers_W, lists_W, quarantined_W, tokens_W, padding_W, *counts_W = zip(
            *of_rank, strict=True
        )
        figures.quarantined, figures.tokens, figures.padding = sum(quarantined_W), sum(tokens_W), sum(padding_W)
        turns_of_groups = [max(of_group) for of_group in counts_W] or [len(group) for group in groups]
        scope = (self.seed, batch.step, self.world.rank)
        turns = list(turns_of(batch, groups, turns_of_groups, self.keep_graphs, scope))
        return turns, Sizes(pairs_W, documents_W, answers_W, lists_W)

    def _look_at(self, turn: Turn) -> None:
        """See in a forward of its own what has a gradient: a step must do the same whether or not it is the first."""
        self.watch.at("first look", pairs=turn.pairs)
        context = self.frozen.looking() if self.frozen else nullcontext()
        with context, FlopCounterMode(display=False) as counter:
            trains = self._embed(turn.mini_batch.features, turn.seed).requires_grad
        self._trains[turn.group] = trains
        self._meets[turn.group] = set(self.frozen.met) if self.frozen else set()
        forward = counter.get_total_flops()
        flops = float(forward)
        if trains:
            of_parts = counter.get_flop_counts()
            names = self.frozen.names if self.frozen else ()
            once = sum(
                sum(of_parts[part].values()) for part in of_parts if part.endswith(tuple(f".{n}" for n in names))
            )
            # The gradient of the inputs, and that of the weights as far as they train.
            flops = once + (forward - once) * (2 + (self.frozen.trained_share if self.frozen else 1.0))
        self._flops_per_unit[turn.group] = flops / _units(turn.mini_batch)

    def _pass_one(self, turns: Sequence[Turn]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """Embeddings of each side in the order of their rows, and by its position each embedding that has a graph."""
        if self.frozen is not None:
            self.frozen.forget()
        graphs: dict[int, Tensor] = {}
        embedded: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        rows: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for keeps_graph, bundles in groupby(self._bundles(turns), lambda bundle: self._keeps_graph(bundle[0])):
            with self.cast_once():
                for bundle in bundles:
                    self._at("pass one", bundle[0])
                    for turn, e_nD in zip(bundle, self._embed_bundle(bundle, keeps_graph), strict=True):
                        if keeps_graph:
                            graphs[turn.position] = e_nD
                        if turn.counts:
                            embedded[turn.mini_batch.side].append(e_nD.detach())
                            rows[turn.mini_batch.side].append(torch.from_numpy(turn.mini_batch.rows))
        # Mini-batches are cut by cost, so their rows interleave.
        place = {side: torch.cat(rows[side]).argsort().to(self.world.device) for side in SIDES}
        return {side: torch.cat(embedded[side])[place[side]] for side in SIDES}, graphs

    def _bundles(self, turns: Sequence[Turn]) -> Iterator[list[Turn]]:
        """Turns that go through pass one together: of one group, and those whose graph or outputs are kept alone."""
        for _, of_group in groupby(turns, key=lambda turn: turn.group):
            waiting: list[Turn] = []
            for turn in of_group:
                is_alone = self._keeps_graph(turn) or self._records(turn)
                if waiting and (is_alone or len(waiting) == self.together):
                    yield waiting
                    waiting = []
                if is_alone:
                    yield [turn]
                else:
                    waiting.append(turn)
            if waiting:
                yield waiting

    def _embed_bundle(self, bundle: Sequence[Turn], keeps_graph: bool) -> Sequence[Tensor]:
        if len(bundle) > 1:
            assert self.merge is not None
            features = self.merge([turn.mini_batch.features for turn in bundle])
            with torch.no_grad():
                e_nD = self._embed(features, bundle[0].seed)
            return e_nD.split([turn.mini_batch.inputs for turn in bundle])
        turn = bundle[0]
        context = self.frozen.recording(turn.position) if self.frozen and self._records(turn) else nullcontext()
        with torch.set_grad_enabled(keeps_graph), context:
            return [self._embed(turn.mini_batch.features, turn.seed)]

    def _keeps_graph(self, turn: Turn) -> bool:
        return turn.keeps_graph and self._trains[turn.group]

    def _records(self, turn: Turn) -> bool:
        if self.frozen is None or not self.frozen.budget_bytes or not self._meets[turn.group] & self.frozen.names:
            return False
        return self._trains[turn.group] and not turn.keeps_graph

    def _loss(
        self,
        embedding: dict[str, Tensor],
        turns: Sequence[Turn],
        batch: RankBatch,
        sizes: Sizes,
        figures: StepFigures,
        scale: float,
    ) -> EmbeddingGradient:
        told = (
            figures.seconds["pass_one"],
            any(self._trains[turn.group] for turn in turns),
            self.frozen.kept_turns if self.frozen else 0,
        )
        if self.own_loss is None:
            outcome = embedding_gradient(embedding, batch, sizes, self.loss, self.world, scale=scale, told=told)
        else:
            outcome = own_loss_gradient(self.own_loss, embedding, batch, sizes, self.loss, self.world, told=told)
        figures.loss, figures.pairs = outcome.loss, outcome.pairs
        figures.distillation, figures.distilled = outcome.distillation, outcome.lists
        figures.masked, figures.beyond_margin = outcome.masked, outcome.beyond_margin
        seconds_W, _, _ = zip(*outcome.told_Wn, strict=True)
        figures.longest_rank = longest_over_mean(seconds_W)
        if not math.isfinite(outcome.loss):
            raise NonFiniteLossError
        return outcome

    def _pass_two(self, turns: Sequence[Turn], graphs: dict[int, Tensor], outcome: EmbeddingGradient) -> None:
        training = [turn for turn in turns if self._trains[turn.group]]
        # Kept graphs first: each backward frees the memory that the next forward may need.
        training.sort(key=lambda turn: turn.position not in graphs)
        given_again = self._turns_given_again(turns, outcome)
        with self.strategy.accumulate(), self.cast_once():
            for turn in training:
                self._at("pass two", turn)
                e_nD = graphs.pop(turn.position, None)
                if e_nD is None:
                    is_given = self.frozen is not None and turn.position in given_again
                    with self.frozen.replaying(turn.position) if self.frozen and is_given else nullcontext():
                        e_nD = self._embed(turn.mini_batch.features, turn.seed)
                surrogate = e_nD.float().sum() * 0.0
                if turn.counts:
                    rows = torch.from_numpy(turn.mini_batch.rows).to(self.world.device)
                    surrogate = (e_nD.float() * outcome.of_side[turn.mini_batch.side][rows]).sum()
                backward_of(self.strategy, surrogate)
            self.watch.at("reduce")

    def _turns_given_again(self, turns: Sequence[Turn], outcome: EmbeddingGradient) -> set[int]:
        """The turns for which outputs of frozen parts are not computed again: on every rank, where ranks keep step."""
        kept_W = [int(kept) for _, _, kept in outcome.told_Wn]
        kept = min(kept_W) if self.strategy.forward_is_collective else kept_W[self.world.rank]
        return {turn.position for turn in [turn for turn in turns if self._records(turn)][:kept]}

    def _at(self, phase: str, turn: Turn) -> None:
        self.watch.at(phase, mini_batch=turn.position + 1, pairs=turn.pairs)

    def _embed(self, features: dict[str, Any], seed: int) -> Tensor:
        torch.manual_seed(seed)
        return self.strategy.forward(to_device(features, self.world.device))


def _units(mini_batch: MiniBatch) -> int:
    """What a mini-batch's cost is told by: its tokens, or its inputs where a processor makes none of them."""
    return sum(count_tokens([mini_batch.features])) or mini_batch.inputs


def groups_of(mini_batches: Sequence[MiniBatch]) -> list[list[MiniBatch]]:
    """In the loader's order, which is the same on every rank: pages before queries, one modality after the other."""
    groups: dict[tuple[str, str], list[MiniBatch]] = {}
    for mini_batch in mini_batches:
        groups.setdefault((mini_batch.side, mini_batch.modality), []).append(mini_batch)
    return list(groups.values())


def turns_of(
    batch: RankBatch,
    groups: Sequence[Sequence[MiniBatch]],
    counts: Sequence[int],
    keep_graphs: float,
    scope: tuple[int, ...],
) -> Iterator[Turn]:
    """As many turns of each group as ``counts`` says; a rank with fewer mini-batches repeats its first for nothing."""
    position = 0
    for own, count in zip(groups, counts, strict=True):
        # Of each group: queries come last and cost little, so their graphs alone would be worth little.
        first_kept = count - int(keep_graphs * count)
        for place in range(count):
            mini_batch = own[place] if place < len(own) else own[0]
            counts_here = place < len(own) and len(mini_batch.rows) > 0
            rows = batch.owner_p[mini_batch.rows] if mini_batch.side == "document" else mini_batch.rows
            seed = turn_seed(*scope, position)
            yield Turn(position, mini_batch, batch.pairs_b[rows], seed, counts_here, place >= first_kept)
            position += 1
