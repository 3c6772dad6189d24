"""The step of a reranker: lists of pages scored by a cross-encoder; no score leaves the rank that has the list.

A list is whole on one rank, so its loss needs no other rank. What ranks agree on beforehand is how many lists count in
all, by which each one's loss is divided, and where a forward is a collective, how many forwards there will be: one
exchange. Another one sums the figures. Everything else is between a rank and its strategy.

    see     each page goes through the vision tower, once, without a graph
    score   each entry, a query with a page, goes through the language model on the features of its page
            whole lists: loss and backward at once, mini-batch after mini-batch
            lists that fit no mini-batch: scores without a graph, loss, and again with one (the gradient cache)
    look    each page goes through the tower again, with a graph, and takes the gradient that all its entries left

The features of a page stand between the two halves as the embeddings of a gradient cache do between model and loss: a
leaf that the backwards of all entries add their gradients to, whichever lists they are in. With four negatives of the
batch in each list a page is in five of them, and the tower runs twice and a half a page where it ran five times.

Where the tower cannot be run apart, entries go through the model as a whole. The sum of the gradients is that of the
whole batch either way, under every strategy, for the reasons that `farnear.training.cache` gives: one reduction at the
end, random masks by position, the same forwards on every rank.

Shapes: E entries and b lists of this rank, n entries of a turn.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from farnear.data.list_dealing import ListBatch, PairFeatures
from farnear.loss.listwise import list_losses, lists_that_count
from farnear.model.embedder import to_device
from farnear.model.image_features import images_apart
from farnear.model.pairs import PairPicker, image_features_of_job
from farnear.parallel.collectives import all_reduce_sum, exchange_ints, row_weight
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World
from farnear.reranker_section import RerankerConfig
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

Images = dict[int, tuple[Tensor, ...]]
"""Of each job, what the language model takes of each of its images."""


@dataclass(frozen=True)
class ListGradient:
    """What a step leaves beside the gradient; the same on every rank.

    Attributes:
        reaches_weights: There is always something that trains.
        dlog_scale: There is no scale to train.
    """

    reaches_weights: bool = True
    dlog_scale: float = 0.0


@dataclass(frozen=True)
class Turn:
    """One forward, and where it trains, its backward.

    Attributes:
        part: "see" or "score".
        job: Whose images are seen, or, where entries go through the whole model, whose features these are.
        entries: That are scored.
        counts: False where the rank only keeps step with others.
        keeps_graph: Whether the first of two forwards leaves its graph for the second.
    """

    part: str
    kind: str
    position: int
    job: int
    entries: Int64
    seed: int
    counts: bool
    keeps_graph: bool

    @property
    def group(self) -> tuple[str, str]:
        """Turns of one group visit the same modules."""
        return self.part, self.kind


@dataclass(frozen=True)
class RerankStep:
    """What every step has in common.

    Attributes:
        reranker: The objective.
        seed: Of every dropout mask.
        pick: Makes a turn's features of those of jobs. None: entries go through the model as a whole, a job a turn.
        keep_graphs: Share of the turns that are computed twice, the last of each group, that keep their first graph.
        cast_once: As in `CachedStep`.
        watch: Is told where the step is.
    """

    strategy: Strategy
    world: World
    reranker: RerankerConfig
    seed: int
    pick: PairPicker | None = None
    keep_graphs: float = 0.0
    cast_once: Callable[[], AbstractContextManager[Any]] = nullcontext
    watch: Watch = field(default_factory=Watch)
    # Whether a gradient reaches the weights from a group, and its FLOPs a token.
    _trains: dict[tuple[str, str], bool] = field(default_factory=dict)
    _flops_per_token: dict[tuple[str, str], float] = field(default_factory=dict)

    def gradient(self, batch: ListBatch, figures: StepFigures) -> ListGradient:
        """Leave the gradient of the global batch's mean loss over lists, reduced over ranks, in the strategy.

        Args:
            figures: Filled on the way, so that what is known stands there when the step fails.

        Raises:
            NonFiniteLossError: On every rank, where scores are computed before the gradient. Elsewhere the gradient is
                not finite either, which the strategy's step says.
        """
        self.world.traffic.start()
        with self.world.traffic.exchange():
            counts_b = self._lists_that_count(batch)
            turns = self._agree(batch, counts_b, figures)
        seen = [turn for turn in turns if turn.part == "see"]
        scored = [turn for turn in turns if turn.part == "score"]
        with timed(figures, "pass_one"):
            images, graphs = self._see(seen, batch, figures)
        for turn in scored:
            self._look_at(turn, batch, images)
        self._count_flops(turns, batch, figures)
        weight_b = counts_b.to(self.world.device).float() * row_weight(figures.pairs)
        if batch.whole_lists:
            with timed(figures, "pass_two"), self.strategy.accumulate():
                loss = self._score_whole_lists(scored, batch, images, weight_b)
                self._take_back(seen, batch, images, graphs)
                self.watch.at("reduce")
            self._tell(loss, figures)
        else:
            with timed(figures, "pass_one"):
                score_E, score_graphs = self._score(scored, batch, images)
            with timed(figures, "loss"):
                loss, gradient_E = self._loss(score_E, batch, weight_b)
                self._tell(loss, figures)
            if not math.isfinite(figures.loss):
                raise NonFiniteLossError
            with timed(figures, "pass_two"), self.strategy.accumulate():
                self._score_again(scored, batch, images, score_graphs, gradient_E)
                self._take_back(seen, batch, images, graphs)
                self.watch.at("reduce")
        return ListGradient()

    def _lists_that_count(self, batch: ListBatch) -> Tensor:
        list_e, valid_e, teacher_e = map(torch.from_numpy, (batch.list_e, batch.valid_e, batch.teacher_e))
        return lists_that_count(list_e, valid_e, teacher_e, self.reranker, num_lists=len(batch.pairs_b))

    def _agree(self, batch: ListBatch, counts_b: Tensor, figures: StepFigures) -> list[Turn]:
        """What this rank does, and what all ranks have. One exchange."""
        groups = self._groups(batch)
        counts = [len(jobs) for _, jobs in groups] if self.strategy.forward_is_collective else []
        tokens = count_tokens([job.features for job in batch.jobs])
        scored = int((batch.valid_e & counts_b.numpy()[batch.list_e]).sum())
        held = [int(counts_b.sum()), scored, len(batch.quarantined), *tokens]
        of_rank = exchange_ints([*held, *counts], self.world.device)
        lists_W, entries_W, quarantined_W, tokens_W, padding_W, *counts_W = zip(*of_rank, strict=True)
        figures.pairs, figures.scored, figures.quarantined = sum(lists_W), sum(entries_W), sum(quarantined_W)
        figures.tokens, figures.padding, figures.masked = sum(tokens_W), sum(padding_W), batch.left_out
        turns_of_groups = [max(of_group) for of_group in counts_W] or [len(own) for _, own in groups]
        turns: list[Turn] = []
        for ((part, kind), own), count in zip(groups, turns_of_groups, strict=True):
            first_kept = count - int(self.keep_graphs * count)
            for place in range(count):
                job, entries = own[place] if place < len(own) else own[0]
                position = len(turns)
                seed = turn_seed(self.seed, batch.step, self.world.rank, position)
                counts_here = place < len(own) and len(entries) > 0
                turns.append(Turn(part, kind, position, job, entries, seed, counts_here, place >= first_kept))
        return turns

    def _groups(self, batch: ListBatch) -> list[tuple[tuple[str, str], list[tuple[int, Int64]]]]:
        """The (job, entries) of each group's turns, in an order that all ranks have."""
        jobs = [(number, job.entries) for number, job in enumerate(batch.jobs)]

        def kind_of(one: tuple[int, Int64]) -> str:
            return batch.jobs[one[0]].kind

        by_kind = [(kind, list(of_kind)) for kind, of_kind in groupby(jobs, key=kind_of)]
        if self.pick is None:
            return [(("score", kind), of_kind) for kind, of_kind in by_kind]
        with_images = [(kind, of_kind) for kind, of_kind in by_kind if kind != "text"]
        turns = [(-1, entries) for entries in batch.turns]
        return [*((("see", kind), of_kind) for kind, of_kind in with_images), (("score", "pair"), turns)]

    def _see(self, turns: Sequence[Turn], batch: ListBatch, figures: StepFigures) -> tuple[Images, dict[int, Any]]:
        """The features of each job's images as leaves, and by its position each turn's output that has a graph."""
        for turn in turns:
            self._look_at(turn, batch, {})
        images: Images = {}
        graphs: dict[int, Any] = {}
        for turn, output in self._first_forwards(turns, batch, {}, graphs):
            if turn.counts:
                trains = self._trains[turn.group]
                # fp32, in which the gradients of many entries are added up.
                images[turn.job] = tuple(one.detach().float().requires_grad_(trains) for one in output)
        figures.kept_graphs = len(graphs)
        return images, graphs

    def _score_whole_lists(self, turns: Sequence[Turn], batch: ListBatch, images: Images, weight_b: Tensor) -> Tensor:
        """Loss and backward of turn after turn. The sum of the weighted losses of this rank's lists."""
        total = torch.zeros((), device=self.world.device)
        for turn, score_n in self._second_forwards(turns, batch, images, {}):
            loss = score_n.float().sum() * 0.0
            if turn.counts:
                loss = self._weighted_loss(score_n.float(), turn.entries, batch, weight_b)
                total += loss.detach()
            backward_of(self.strategy, loss)
        return total

    def _score(self, turns: Sequence[Turn], batch: ListBatch, images: Images) -> tuple[Tensor, dict[int, Any]]:
        """The scores of all entries, and by its position each turn's that has a graph."""
        score_E = torch.zeros(len(batch.list_e), device=self.world.device)
        graphs: dict[int, Any] = {}
        for turn, score_n in self._first_forwards(turns, batch, images, graphs):
            if turn.counts:
                score_E[torch.from_numpy(turn.entries).to(self.world.device)] = score_n.detach().float()
        return score_E, graphs

    def _loss(self, score_E: Tensor, batch: ListBatch, weight_b: Tensor) -> tuple[Tensor, Tensor]:
        self.watch.at("loss", pairs=batch.pairs_b)
        score_E.requires_grad_()
        loss = self._weighted_loss(score_E, np.arange(len(batch.list_e)), batch, weight_b)
        (gradient_E,) = torch.autograd.grad(loss, score_E)
        return loss.detach(), gradient_E

    def _score_again(
        self, turns: Sequence[Turn], batch: ListBatch, images: Images, graphs: dict[int, Any], gradient_E: Tensor
    ) -> None:
        for turn, score_n in self._second_forwards(turns, batch, images, graphs):
            weight_n = torch.zeros_like(score_n, dtype=torch.float32)
            if turn.counts:
                weight_n = gradient_E[torch.from_numpy(turn.entries).to(self.world.device)]
            backward_of(self.strategy, (score_n.float() * weight_n).sum())

    def _take_back(self, turns: Sequence[Turn], batch: ListBatch, images: Images, graphs: dict[int, Any]) -> None:
        """Backward through the tower, from the gradients that the entries left at its features."""
        # Backwards have multiplied them by fp16's loss scale, and this one will again.
        scale = self.strategy.loss_scale.scale if self.strategy.loss_scale else 1.0
        training = [turn for turn in turns if self._trains[turn.group]]
        for turn, output in self._second_forwards(training, batch, {}, graphs):
            leaves = images[turn.job] if turn.counts else (None,) * len(output)
            surrogate = torch.zeros((), device=self.world.device)
            for one, leaf in zip(output, leaves, strict=True):
                # An image of entries that do not count, or that a rank repeats, has no gradient.
                told = leaf.grad / scale if leaf is not None and leaf.grad is not None else 0.0
                surrogate = surrogate + (one.float() * told).sum()
            backward_of(self.strategy, surrogate)

    def _first_forwards(
        self, turns: Sequence[Turn], batch: ListBatch, images: Images, graphs: dict[int, Any]
    ) -> Iterator[tuple[Turn, Any]]:
        """What each turn gives, without a graph, or with one that is left in ``graphs`` by the turn's position."""
        for keeps_graph, of_both in groupby(turns, self._keeps_graph):
            with self.cast_once():
                for turn in of_both:
                    self._at("pass one", turn, batch)
                    with torch.set_grad_enabled(keeps_graph):
                        output = self._forward(turn, batch, images)
                    if keeps_graph:
                        graphs[turn.position] = output
                    yield turn, output

    def _second_forwards(
        self, turns: Sequence[Turn], batch: ListBatch, images: Images, graphs: dict[int, Any]
    ) -> Iterator[tuple[Turn, Any]]:
        """What each turn gives, with a graph: kept ones first, as each backward frees what the next forward needs."""
        with self.cast_once():
            for turn in sorted(turns, key=lambda turn: turn.position not in graphs):
                self._at("pass two", turn, batch)
                output = graphs.pop(turn.position, None)
                yield turn, self._forward(turn, batch, images) if output is None else output

    def _weighted_loss(self, score_n: Tensor, entries: Int64, batch: ListBatch, weight_b: Tensor) -> Tensor:
        """The sum of the losses of the lists that some entries make up, each by its weight."""
        own, place_n = np.unique(batch.list_e[entries], return_inverse=True)
        list_n, valid_n, teacher_n, lists = (
            torch.from_numpy(x).to(self.world.device)
            for x in (place_n, batch.valid_e[entries], batch.teacher_e[entries], own)
        )
        loss_l = list_losses(score_n, list_n, valid_n, teacher_n, self.reranker, num_lists=len(own))
        return loss_l @ weight_b[lists]

    def _tell(self, loss: Tensor, figures: StepFigures) -> None:
        """The mean loss over all ranks' lists, and how evenly they work. One exchange."""
        sums = torch.zeros(1 + self.world.world_size, device=self.world.device)
        sums[0] = loss / self.world.world_size
        sums[1 + self.world.rank] = figures.seconds["pass_one"]
        with self.world.traffic.exchange():
            told = all_reduce_sum(sums).tolist()
        figures.loss, figures.longest_rank = told[0], longest_over_mean(told[1:])

    def _look_at(self, turn: Turn, batch: ListBatch, images: Images) -> None:
        """See in a forward of its own what has a gradient: a step must do the same whether or not it is the first."""
        if turn.group in self._trains:
            return
        self._at("first look", turn, batch)
        with FlopCounterMode(display=False) as counter:
            output = self._forward(turn, batch, images)
        self._trains[turn.group] = any(one.requires_grad for one in _tensors(output))
        flops = counter.get_total_flops() * (3 if self._trains[turn.group] else 1)
        self._flops_per_token[turn.group] = flops / max(self._tokens(turn, batch), 1)

    def _count_flops(self, turns: Sequence[Turn], batch: ListBatch, figures: StepFigures) -> None:
        figures.model_flops = sum(self._tokens(turn, batch) * self._flops_per_token[turn.group] for turn in turns)

    def _tokens(self, turn: Turn, batch: ListBatch) -> int:
        if turn.job >= 0:
            return sum(count_tokens([batch.jobs[turn.job].features]))
        return int(sum(_length(batch.jobs[batch.job_e[entry]], int(batch.place_e[entry])) for entry in turn.entries))

    def _keeps_graph(self, turn: Turn) -> bool:
        return turn.keeps_graph and self._trains[turn.group]

    def _forward(self, turn: Turn, batch: ListBatch, images: Images) -> Any:
        torch.manual_seed(turn.seed)
        if turn.part == "see":
            features = image_features_of_job(batch.jobs[turn.job].features)
            seen = self.strategy.forward(to_device(features, self.world.device))
            return images_apart(seen, features["image_grid_thw"])
        if turn.job >= 0:
            return self.strategy.forward(to_device(batch.jobs[turn.job].features, self.world.device))
        picks = [(int(batch.job_e[entry]), int(batch.place_e[entry])) for entry in turn.entries]
        assert self.pick is not None
        features, occurrences = self.pick([job.features for job in batch.jobs], picks)
        on_device = to_device(features, self.world.device)
        if occurrences:
            on_device["image_features"] = tuple(images[job][image] for job, image in occurrences)
        return self.strategy.forward(on_device)

    def _at(self, phase: str, turn: Turn, batch: ListBatch) -> None:
        pairs = batch.pairs_b[np.unique(batch.list_e[turn.entries])] if turn.counts else batch.pairs_b[:0]
        self.watch.at(phase, mini_batch=turn.position + 1, pairs=pairs)


def _tensors(output: Any) -> Iterator[Tensor]:
    yield from output if isinstance(output, tuple) else (output,)


def _length(job: PairFeatures, place: int) -> int:
    """Tokens of a pair."""
    mask = job.features.get("attention_mask")
    return int(mask[place].sum()) if mask is not None else job.features["input_ids"].shape[-1]
