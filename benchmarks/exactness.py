"""Is the cached, distributed gradient the plain one? Every strategy, number of ranks and awkward batch, one SGD step.

    python benchmarks/exactness.py                 all cases, under fifteen minutes on two cores
    python benchmarks/exactness.py --slice         the few that run in `make test`

The reference is a single process that puts the whole global batch through the model at once, with a loss written out
below from its definition: no cache, no mini-batches, no ranks, none of farnear's loss or collectives. Both sides take
one SGD step from the same weights, with clipping off and on, and the relative error of the update is

    | update - reference update | / | reference update |        (over all parameters together)

SGD, because AdamW magnifies rounding wherever a gradient is near zero; AdamW is compared on its own, five steps from
equal injected gradients. ZeRO-3 is made to split parameters from 1,000 elements on, as in a large model; left alone it
would keep all of these whole. The last line is JSON. Exit code 1 when a bound is broken.
"""

import argparse
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dense_loss import dense_distillation, dense_loss
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from farnear.config import RunConfig, parse_config
from farnear.data.batch import MiniBatch, RankBatch
from farnear.data.budget import cut
from farnear.data.dealing import SIDES
from farnear.loss.false_negatives import BatchFacts
from farnear.model.embedder import Embedder, Preprocessing, to_device
from farnear.model.features import FeatureMerger
from farnear.model.frozen import FrozenOutputs
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.model.trainable import choose_trainable
from farnear.parallel.strategy import Strategy, build_strategy
from farnear.parallel.world import World
from farnear.sections import LossConfig, ModelConfig
from farnear.training.cache import CachedStep
from farnear.training.step import StepFigures, turn_seed

BOUND_FP32 = 1e-5
# bf16 has 8 bits of mantissa; this is the rounding of the forward and backward, measured and then committed.
BOUND_BF16 = 3e-2
BOUND_FP16 = 5e-3
BOUND_ADAMW = 1e-6
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# A strategy with something switched on: what a run file says about it.
VARIANTS: dict[str, dict[str, Any]] = {
    "fsdp2-nodes": {"strategy": "fsdp2", "shard_within": "node"},
    "zero2-mini_batch": {"strategy": "zero2", "training": {"reduce": "mini_batch"}},
    "zero3-mini_batch": {"strategy": "zero3", "training": {"reduce": "mini_batch"}},
    "fsdp2-mini_batch": {"strategy": "fsdp2", "training": {"reduce": "mini_batch"}},
    "zero3-offload": {"strategy": "zero3"},
    "zero3-offload-mini_batch": {"strategy": "zero3", "training": {"reduce": "mini_batch"}},
    "zero3-reshard_step": {"strategy": "zero3", "training": {"reshard": "step"}},
    "fsdp2-reshard_step": {"strategy": "fsdp2", "training": {"reshard": "step"}},
}
WORLD_SIZES = (1, 2, 3, 4)
SEED = 7
SPLIT_CONFIG = Path(__file__).with_name("zero3_split.json")
OFFLOAD_CONFIG = Path(__file__).with_name("zero3_offload_split.json")
CPU = torch.device("cpu")
SCALE = "loss.log_scale"


@dataclass(frozen=True)
class Case:
    """A batch and an objective.

    Attributes:
        pairs: G.
        mini_batch_size: Of farnear's side; the reference has none.
        loss: Section `loss` of a run file.
        uneven_pages: Pages of different sizes in one mini-batch.
        duplicate_page: Two pairs, on different ranks where there are several, share a page.
        text_pages: The last pages are text, so that the last page mini-batch leaves out the vision tower.
        invalid_rank: All rows of the last rank are invalid (of the last pair, when there is one rank).
        hard_negatives: Hard negative pages of every second pair.
        dropout: Attention dropout of the model.
        num_tokens: Mini-batches are cut by this many tokens, in order of their cost, not by their number.
        keep_graphs, together: As in `CachedStep`.
        frozen_bytes: What outputs of frozen parts may take.
        freeze, lora: As in the section `model` of a run file.
        own_loss: Whether the objective is given as a function of the user's own.
    """

    name: str
    pairs: int = 6
    mini_batch_size: int = 2
    loss: LossConfig = field(default_factory=LossConfig)
    uneven_pages: bool = False
    duplicate_page: bool = False
    text_pages: bool = False
    invalid_rank: bool = False
    hard_negatives: bool = False
    dropout: float = 0.0
    num_tokens: int | None = None
    keep_graphs: float = 0.0
    together: int = 1
    frozen_bytes: int = 1 << 30
    freeze: tuple[str, ...] = ()
    lora: bool = False
    own_loss: bool = False


CASES = (
    Case("plain"),
    Case("matryoshka", loss=LossConfig(matryoshka_dims=(64, 32, 16), matryoshka_weights=(1.0, 0.5, 2.0))),
    Case("uneven_pages", uneven_pages=True),
    Case("duplicate_page", duplicate_page=True),
    Case("invalid_rank", invalid_rank=True),
    Case("last_without_images", text_pages=True),
    Case("undivided", pairs=7),
    Case("hard_negatives", hard_negatives=True),
    Case("fewer_pairs_than_ranks", pairs=2),
)
DROPOUT_CASES = (
    Case("dropout_whole", mini_batch_size=6, dropout=0.1),
    Case("dropout_mini_batches", mini_batch_size=2, dropout=0.1),
    # Where the pages leave out the tower, and where what is frozen draws too.
    Case("dropout_frozen", freeze=("visual", "embed_tokens", "language_model.layers.0"), dropout=0.1),
)
SYMMETRIC = ("query_to_doc", "doc_to_query")
ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
# What makes the step faster or smaller, and the rest of the objective.
ENGINE_CASES = (
    Case("half_kept", keep_graphs=0.5, uneven_pages=True),
    Case("all_kept", keep_graphs=1.0, hard_negatives=True),
    Case("kept_without_images", keep_graphs=0.7, text_pages=True),
    Case("by_tokens", num_tokens=40, uneven_pages=True, pairs=7),
    Case("three_at_once", together=3, uneven_pages=True, mini_batch_size=1),
    Case("frozen_tower", freeze=("visual",), hard_negatives=True),
    Case("frozen_tower_half_kept", freeze=("visual",), keep_graphs=0.5, uneven_pages=True),
    # What fits differs between the ranks, and where a forward is a collective they must go on doing the same.
    Case("frozen_outputs_fit_in_part", freeze=("visual",), pairs=7, frozen_bytes=20_000),
    Case("frozen_language", freeze=("language_model",)),
    Case("lora", lora=True, uneven_pages=True),
    Case("lora_half_kept", lora=True, keep_graphs=0.5),
    Case("symmetric", loss=LossConfig(directions=SYMMETRIC, partition_mode="per_direction"), pairs=7),
    Case(
        "all_directions",
        loss=LossConfig(directions=ALL_DIRECTIONS, matryoshka_dims=(64, 16)),
        pairs=7,
        hard_negatives=True,
        invalid_rank=True,
    ),
    Case(
        "hardness",
        loss=LossConfig(hardness_mode="all_negatives", hardness_strength=5.0, margin=-0.01),
        hard_negatives=True,
        duplicate_page=True,
    ),
    Case("learned_scale", loss=LossConfig(learn_scale=True, matryoshka_dims=(64, 16)), invalid_rank=True),
    Case("own_loss", own_loss=True, pairs=7),
    # Ranks have unequal numbers of lists: none where its pairs are invalid.
    Case(
        "distillation",
        pairs=7,
        loss=LossConfig(
            distillation="listwise_distillation",
            distillation_weight=3.0,
            distillation_temperature=2.0,
            learn_scale=True,
            matryoshka_dims=(64, 16),
            matryoshka_weights=(1.0, 0.5),
        ),
        hard_negatives=True,
        invalid_rank=True,
    ),
    Case(
        "distillation_alone",
        loss=LossConfig(distillation="margin_mse", contrastive_weight=0.0),
        hard_negatives=True,
        uneven_pages=True,
    ),
)
ENGINE_WORLD_SIZES = (1, 2)
# Of each number of ranks: the cases that run in `make test`.
SLICE = {
    1: ("dropout_frozen",),
    2: ("matryoshka", "last_without_images", "all_directions", "frozen_tower_half_kept"),
}
# What a variant may get wrong: when gradients are reduced, and how many mini-batches a rank has. W = 4 is theirs alone.
CASES_OF_VARIANTS = ("last_without_images", "fewer_pairs_than_ranks", "undivided")
SLICE_OF_VARIANTS = ("last_without_images",)


@dataclass(frozen=True)
class GlobalBatch:
    """The whole batch as inputs: pages are the positives of all pairs; negatives[i] are pair i's hard negatives.

    ``teacher_2G`` are a teacher's scores of the positives and of the negatives, for the first pair nan.
    """

    queries: list[str]
    pages: list[Any]
    negatives: list[list[Any]]
    query_hash_G: np.ndarray
    page_hash_G: np.ndarray
    valid_G: np.ndarray
    teacher_2G: np.ndarray


def make_batch(case: Case, world_size: int) -> GlobalBatch:
    """The inputs of a case; random but the same everywhere."""
    random = np.random.default_rng(SEED)
    words = ["red", "blue", "bar", "pie", "chart", "revenue", "costs", "2019", "2021"]
    queries = [" ".join(random.choice(words, random.integers(2, 6))) + f" {i}" for i in range(case.pairs)]
    page_hash_G = np.arange(case.pairs, dtype=np.int64)
    valid_G = np.ones(case.pairs, dtype=bool)

    def page(i: int) -> Image.Image:
        height, width = (64 + 32 * (i % 3), 96) if case.uneven_pages else (64, 64)
        return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))

    pages: list[Any] = [page(i) for i in range(case.pairs)]
    negatives = [[page(i)] if case.hard_negatives and i % 2 == 0 else [] for i in range(case.pairs)]
    if case.duplicate_page:
        pages[-1], page_hash_G[-1] = pages[0], page_hash_G[0]
    for rank in range(world_size):
        mine = pairs_of_rank(case.pairs, rank, world_size)
        if case.text_pages:
            for i in mine[-((len(mine) + 1) % 2 + 1) :]:
                pages[i] = f"a page of text number {i}"
        if case.invalid_rank and rank == world_size - 1:
            valid_G[mine if world_size > 1 else mine[-1:]] = False
    teacher_2G = np.random.default_rng(SEED).normal(size=(2, case.pairs)).astype(np.float32)
    teacher_2G[1, 0] = np.nan
    query_hash_G = np.arange(case.pairs, dtype=np.int64) + 100
    return GlobalBatch(queries, pages, negatives, query_hash_G, page_hash_G, valid_G, teacher_2G)


def reference_gradient(model: SentenceTransformer, case: Case, batch: GlobalBatch) -> dict[str, Tensor]:
    """Gradient of the mean loss, the whole batch at once, from the definition."""
    preprocess = Preprocessing(model)
    model.train()

    def embed(inputs: list[Any], side: str, first_turn: int, at_once: int) -> Tensor:
        parts = []
        for turn, start in enumerate(range(0, len(inputs), at_once)):
            torch.manual_seed(turn_seed(SEED, 0, 0, first_turn + turn))
            features = to_device(preprocess(inputs[start : start + at_once], side), model.device)
            parts.append(model(features)["sentence_embedding"])
        return torch.cat(parts)

    # Only dropout makes the way the batch is cut matter: its masks are drawn per forward.
    at_once = case.mini_batch_size if case.dropout else len(batch.queries)
    negatives = [page for pages in batch.negatives for page in pages]
    turns_of_pages = -(-len(batch.pages) // at_once)
    # Text and images cannot share one call of the processor, so a mixed batch goes through in two.
    images = [i for i, page in enumerate(batch.pages) if not isinstance(page, str)]
    texts = [i for i, page in enumerate(batch.pages) if isinstance(page, str)]
    k = torch.empty(len(batch.pages), model.get_embedding_dimension() or 0)
    for positions in (images, texts):
        if positions:
            k = k.index_put(
                (torch.tensor(positions),), embed([batch.pages[i] for i in positions], "document", 0, at_once)
            )
    if negatives:
        k = torch.cat([k, embed(negatives, "document", 99, at_once)])
    q = embed(batch.queries, "query", turns_of_pages, at_once)

    facts = facts_of(batch)
    weight_B = facts.pair_valid_B / facts.pair_valid_B.sum()
    log_scale = torch.tensor(case.loss.scale).log().requires_grad_()
    if case.own_loss:
        softmax_loss(q, k, facts).backward()
    else:
        total = dense_loss(q, k, facts, slice(0, len(q)), weight_B, case.loss, log_scale.exp())
        if case.loss.distillation:
            own_N = torch.arange(len(k)) >= len(q)
            teacher_N = torch.from_numpy(batch.teacher_2G)[own_N.long(), facts.owner_N]
            distilled = dense_distillation(q, k, facts, teacher_N, case.loss, log_scale.exp())
            total = case.loss.contrastive_weight * total + case.loss.distillation_weight * distilled
        total.backward()
    gradient = {f"model.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {**gradient, SCALE: log_scale.grad} if case.loss.learn_scale else gradient


def facts_of(batch: GlobalBatch) -> BatchFacts:
    """What the loss knows of the batch; all hard negatives follow all positives."""
    pairs = len(batch.queries)
    owner = [i for i, negatives in enumerate(batch.negatives) for _ in negatives]
    return BatchFacts(
        query_hash_B=torch.from_numpy(batch.query_hash_G),
        pair_valid_B=torch.from_numpy(batch.valid_G),
        answers_Bm=torch.from_numpy(batch.page_hash_G[:, None]),
        positive_B=torch.arange(pairs),
        page_hash_N=torch.cat([torch.from_numpy(batch.page_hash_G), torch.arange(len(owner)) + 1000]),
        owner_N=torch.cat([torch.arange(pairs), torch.tensor(owner, dtype=torch.int64)]),
        page_valid_N=torch.cat([torch.from_numpy(batch.valid_G), torch.ones(len(owner), dtype=torch.bool)]),
    )


def softmax_loss(query_BD: Tensor, document_ND: Tensor, batch: BatchFacts) -> Tensor:
    """A loss of a user's own: each query against all documents, and nothing masked."""
    score_BN = 10.0 * nn.functional.normalize(query_BD, dim=1) @ document_ND.T
    return nn.functional.cross_entropy(score_BN, batch.positive_B)


def prepared_model(path: str, case: Case) -> SentenceTransformer:
    """The model of a case, with its adapters and frozen parts."""
    config = ModelConfig(name_or_path=path, freeze=case.freeze, lora={"r": 4} if case.lora else None)
    model = load_model(config)
    choose_trainable(model, config, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero, as it begins, the other matrix would have no gradient
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def pairs_of_rank(pairs: int, rank: int, world_size: int) -> np.ndarray:
    """A contiguous share; those of all ranks differ by one pair at most."""
    return np.arange(pairs * rank // world_size, pairs * (rank + 1) // world_size)


def rank_batch(case: Case, batch: GlobalBatch, model: SentenceTransformer, world: World) -> RankBatch:
    """This rank's slice of the batch, cut as the loader cuts it."""
    mine = pairs_of_rank(case.pairs, world.rank, world.world_size)
    borrowed = len(mine) == 0
    if borrowed:
        mine = np.array([0])
    preprocess = Preprocessing(model)
    negatives = [page for i in mine for page in batch.negatives[i] if not borrowed]
    owner_of_negatives = [place for place, i in enumerate(mine) for _ in batch.negatives[i] if not borrowed]
    inputs = {"document": [batch.pages[i] for i in mine] + negatives, "query": [batch.queries[i] for i in mine]}
    mini_batches = []
    for side in SIDES:
        for rows in mini_batch_rows(case, inputs[side]):
            chosen = [inputs[side][row] for row in rows]
            modality = "text" if side == "query" else "image"
            mini_batches.append(MiniBatch(side, modality, rows, preprocess(chosen, side), len(chosen)))
    valid_b = np.zeros(1, dtype=bool) if borrowed else batch.valid_G[mine]
    negative_hash = np.array([1000 + 100 * world.rank + j for j in range(len(negatives))], dtype=np.int64)
    page_hash_p = np.concatenate([batch.page_hash_G[mine], negative_hash])
    return RankBatch(
        step=0,
        epoch=0,
        pairs_b=mine,
        valid_b=valid_b,
        query_hash_b=batch.query_hash_G[mine],
        page_hash_p=page_hash_p,
        owner_p=np.concatenate([np.arange(len(mine)), np.array(owner_of_negatives, dtype=np.int64)]),
        page_valid_p=np.concatenate([valid_b, np.ones(len(negatives), dtype=bool)]),
        teacher_p=np.concatenate([batch.teacher_2G[0, mine], batch.teacher_2G[1, mine[owner_of_negatives]]]),
        answers_bm=batch.page_hash_G[mine, None],
        mini_batches=tuple(mini_batches),
        quarantined=(),
        seconds_waited=0.0,
    )


def mini_batch_rows(case: Case, inputs: list[Any]) -> list[np.ndarray]:
    """How a side's inputs are cut."""
    if case.num_tokens is None:
        return np.split(np.arange(len(inputs)), range(case.mini_batch_size, len(inputs), case.mini_batch_size))
    cost_n = np.array([len(x) // 4 if isinstance(x, str) else x.width * x.height // 1024 for x in inputs]) + 16
    return cut(cost_n, None, case.num_tokens)


def run_config(strategy: str, model: str, max_grad_norm: float, *, fp16: bool = False) -> RunConfig:
    """A run file of which only the strategy, or variant of one, and the clipping matter here."""
    keys = VARIANTS.get(strategy, {"strategy": strategy})
    return parse_config(
        {
            "output_dir": "unused",
            "model": {"name_or_path": model},
            "data": {"train": ["unused"]},
            **keys,
            "training": {"max_grad_norm": max_grad_norm, "fp16": fp16, **keys.get("training", {})},
        }
    )


@contextmanager
def parameters_split(strategy: str) -> Iterator[None]:
    """Strategies built inside split parameters over the ranks, where that is zero3, as they do in a large model.

    Where a variant is about nodes, there are two of them, or as many as ranks.
    """
    path = OFFLOAD_CONFIG if "offload" in strategy else SPLIT_CONFIG
    settings = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)} if strategy.startswith("zero3") else {}
    ranks_per_node = max(1, int(os.environ.get("WORLD_SIZE", 1)) // 2)
    with patch.dict(os.environ, {**settings, "LOCAL_WORLD_SIZE": str(ranks_per_node)}):
        yield


def cached_update(
    strategy_name: str,
    case: Case,
    model_path: str,
    batch: GlobalBatch,
    world: World,
    counts: dict[str, int],
    lr: float,
    clip: float,
    precision: str,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """farnear's update (old weights minus new) on rank 0, and what was reduced on the way."""
    model = prepared_model(model_path, case)
    mine = rank_batch(case, batch, model, world)
    module = Embedder(model, bf16=precision == "bf16", fp16=precision == "fp16")
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    frozen = FrozenOutputs(module, case.frozen_bytes) if case.freeze or case.lora else None
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    with parameters_split(strategy_name):
        config = run_config(strategy_name, model_path, clip, fp16=precision == "fp16")
        strategy = build_strategy(config, module, optimizer, world)
    strategy.train(True)
    step = CachedStep(
        strategy,
        world,
        case.loss,
        SEED,
        own_loss=softmax_loss if case.own_loss else None,
        keep_graphs=case.keep_graphs,
        together=case.together,
        merge=FeatureMerger(model),
        frozen=frozen,
    )
    figures = StepFigures()
    elements = sum(p.numel() for p in before.values())
    norm = float("nan")
    # fp16 leaves out steps until it has found a scale.
    while math.isnan(norm):
        counts.update(calls=0, elements=0, gathered=0)
        outcome = step.gradient(mine, figures, scale=case.loss.scale)
        reduced = {"calls": counts["calls"], "passes": round(counts["elements"] / elements, 3)}
        norm = strategy.step(lr)
    check_that_it_was_used(case, figures, frozen)
    reduced["gathers"] = round(counts["gathered"] / elements, 2)
    after = strategy.full_weights()
    update = {name: before[name] - after[name] for name in before} if after else {}
    if after and case.loss.learn_scale:
        update[SCALE] = torch.tensor(lr * outcome.dlog_scale)
    return update, reduced


def check_that_it_was_used(case: Case, figures: StepFigures, frozen: FrozenOutputs | None) -> None:
    """What a case is about must have happened: an optimisation that is not used is exact too."""
    if case.keep_graphs >= 0.5 and not figures.kept_graphs:
        raise RuntimeError(f"case {case.name}: no graph was kept")
    if case.freeze == ("visual",) and case.keep_graphs == 0 and not figures.frozen_bytes:
        raise RuntimeError(f"case {case.name}: no output of a frozen part was kept")
    if case.freeze == ("language_model",) and frozen is not None and any("language" in n for n in frozen.names):
        raise RuntimeError(f"case {case.name}: outputs were kept that a gradient has to pass")


def count_reductions() -> dict[str, int]:
    """From now on count the collectives that reduce gradients: those of more elements than any of the loss's.

    Gathers of parameters are counted apart. DeepSpeed keeps references to torch's functions from its start, so this
    comes before its first import.
    """
    counts = {"calls": 0, "elements": 0, "gathered": 0}
    reductions = {
        "all_reduce": 0,
        "reduce": 0,
        "reduce_scatter_tensor": 1,
        "reduce_scatter_single": 1,  # the same under its name of torch 2.15
        "reduce_scatter": 1,
        "all_to_all_single": 1,
    }
    gathers = {"all_gather_into_tensor": 0, "all_gather_single": 0}

    def counting(original: Callable[..., Any], position: int, gathers: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[position] if len(args) > position else list(kwargs.values())[position - len(args)]
            elements = sum(t.numel() for t in sent) if isinstance(sent, (list, tuple)) else sent.numel()
            if gathers:
                counts["gathered"] += elements
            elif elements > 4096:
                counts["calls"] += 1
                counts["elements"] += elements
            return original(*args, **kwargs)

        return call

    for name, position in {**reductions, **gathers}.items():
        if hasattr(dist, name):
            setattr(dist, name, counting(getattr(dist, name), position, name in gathers))
    return counts


def relative_error(update: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Norm of the difference over norm of the reference, all parameters as one vector."""
    difference = sum(
        float((update[n].double() - reference.get(n, torch.zeros(())).double()).square().sum()) for n in update
    )
    norm = sum(float(r.double().square().sum()) for r in reference.values())
    return (difference / norm) ** 0.5


class Injected(nn.Module):
    """Parameters of awkward shapes whose gradient is what the features say."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.a = nn.Parameter(torch.randn(171, 7, generator=generator))
        self.b = nn.Parameter(torch.randn(3, generator=generator))
        self.c = nn.Parameter(torch.randn(4, 2, 3, generator=generator))

    def forward(self, features: dict[str, Any]) -> Tensor:
        """<parameters, wanted gradients>."""
        return sum(
            ((p * g).sum() for p, g in zip((self.a, self.b, self.c), features["gradients"], strict=True)),
            torch.zeros(()),
        )


def adamw_error(strategy_name: str, world: World) -> float:
    """Five AdamW steps, weight decay, clipping, equal gradients: the fused AdamW against torch's plain one alone."""
    reference, module = Injected(), Injected()
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    plain = torch.optim.AdamW(reference.parameters(), **options)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, **options)
    with parameters_split(strategy_name):
        strategy: Strategy = build_strategy(run_config(strategy_name, "unused", 0.5), module, optimizer, world)
    generator = torch.Generator().manual_seed(SEED)
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    for step in range(5):
        lr = 1e-2 / (step + 1)
        gradients = [torch.randn(p.shape, generator=generator) for p in reference.parameters()]
        with strategy.accumulate():
            strategy.backward(strategy.forward({"gradients": gradients}))
        strategy.step(lr)
        for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        plain.param_groups[0]["lr"] = lr
        plain.step()
    after = strategy.full_weights()
    wanted = {name: start[name] - p.detach() for name, p in reference.named_parameters()}
    return relative_error({name: start[name] - after[name] for name in after}, wanted) if after else 0.0


def names_for(case: Case, world_size: int, small: bool) -> list[str]:
    """The strategies and variants that meet a case. Four ranks are for two nodes of two."""
    if small:
        variants = VARIANTS if world_size == 2 and case.name in SLICE_OF_VARIANTS else ()
        return [*(STRATEGIES if case.name in SLICE[world_size] else ()), *variants]
    variants = VARIANTS if world_size < 4 else ("fsdp2-nodes",)
    return [
        *(STRATEGIES if world_size < 4 else ()),
        *(variants if case.name in CASES_OF_VARIANTS else ()),
    ]


def join_ranks(rank: int, world_size: int, port: int) -> tuple[World, dict[str, int]]:
    """Become one of W processes of one thread each; the counts are those of `count_reductions`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    counts = count_reductions()
    dist.init_process_group("gloo")
    return World(rank, world_size, CPU), counts


def rank_main(rank: int, world_size: int, port: int, models: dict[float, str], small: bool, out: str) -> None:
    """One of W processes: all cases of this W, sharing the process group. Rank 0 writes the results."""
    world, counts = join_ranks(rank, world_size, port)
    results = []
    engine_cases = ENGINE_CASES if world_size in ENGINE_WORLD_SIZES else ()
    for case in (*CASES, *(DROPOUT_CASES if world_size == 1 else ()), *engine_cases):
        names = names_for(case, world_size, small)
        if not names:
            continue
        batch = make_batch(case, world_size)
        model = prepared_model(models[case.dropout], case)
        gradient = reference_gradient(model, case, batch)
        norm = float(torch.stack([g.norm() for name, g in gradient.items() if name != SCALE]).norm())
        # An update as large as the weights, so that their rounding does not drown it.
        trained = [p.detach().norm() for p in model.parameters() if p.requires_grad]
        lr = float(torch.stack(trained).norm()) / norm
        for name in names:
            # Clipped to 0.3 of the norm: a factor W, whatever W is, must not look like the clipping.
            is_plain = case in ENGINE_CASES and not case.loss.learn_scale
            for clip in (0.0,) if is_plain or (small and name in VARIANTS) else (0.0, 0.3 * norm):
                # The scale's gradient is outside of the norm that is clipped.
                wanted = {n: lr * (0.3 if clip and n != SCALE else 1.0) * g for n, g in gradient.items()}
                args = (name, case, models[case.dropout], batch, world, counts, lr, clip)
                halves = ("bf16", "fp16") if case.name in ("plain", "matryoshka") and not clip else ()
                row = {"strategy": name, "world_size": world_size, "case": case.name, "clip": bool(clip)}
                for precision in ("fp32", *halves):
                    update, reduced = cached_update(*args, precision)
                    error = relative_error(update, wanted) if update else 0.0
                    results.append({**row, "precision": precision, "error": error, "reductions": reduced})
    for name in STRATEGIES if world_size < 4 else ():
        row = {"strategy": name, "world_size": world_size, "case": "adamw", "clip": True, "precision": "fp32"}
        results.append({**row, "error": adamw_error(name, world), "reductions": {}})
    if rank == 0:
        Path(out).write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(world_sizes: tuple[int, ...], small: bool) -> list[dict[str, Any]]:
    """All cases at each W, in fresh processes a W."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        texts = ["red blue bar pie chart revenue costs 2019 2021 a page of text number"]
        models = {
            dropout: str(
                save_tiny_model(
                    Path(folder) / f"dropout-{dropout}",
                    texts=texts,
                    hidden_size=64,
                    num_layers=2,
                    attention_dropout=dropout,
                )
            )
            for dropout in (0.0, 0.1)
        }
        for world_size in world_sizes:
            out = str(Path(folder) / f"{world_size}.json")
            # Forked from one process that has imported everything: each rank would take ten seconds for that.
            multiprocessing.set_forkserver_preload(["sentence_transformers", "deepspeed", "farnear.training.cache"])
            arguments = (world_size, free_port(), models, small, out)
            mp.start_processes(rank_main, arguments, nprocs=world_size, start_method="forkserver")
            results += json.loads(Path(out).read_text(encoding="utf-8"))
    return results


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the last line."""
    fp32 = [r for r in results if r["precision"] == "fp32" and r["case"] != "adamw"]
    halves = {half: [r["error"] for r in results if r["precision"] == half] for half in ("bf16", "fp16")}
    keys = {(r["strategy"], r["world_size"], r["case"]) for r in fp32}
    reductions = {}
    for name in (*STRATEGIES, *VARIANTS):
        mine = [r["reductions"] for r in fp32 if r["strategy"] == name and r["world_size"] > 1]
        if mine:
            reductions[name] = max(r["passes"] for r in mine)
    return {
        "worst_relative_error": max(r["error"] for r in fp32),
        "worst_relative_error_bf16": max(halves["bf16"], default=None),
        "bound_bf16": BOUND_BF16,
        "worst_relative_error_fp16": max(halves["fp16"], default=None),
        "bound_fp16": BOUND_FP16,
        "worst_relative_error_adamw": max((r["error"] for r in results if r["case"] == "adamw"), default=None),
        "cases": len(keys),
        "reductions_per_step": reductions,
    }


def is_good(summary: dict[str, Any]) -> bool:
    """Whether every bound holds."""
    return bool(
        summary["worst_relative_error"] <= BOUND_FP32
        and (summary["worst_relative_error_bf16"] or 0.0) <= BOUND_BF16
        and (summary["worst_relative_error_fp16"] or 0.0) <= BOUND_FP16
        and (summary["worst_relative_error_adamw"] or 0.0) <= BOUND_ADAMW
    )


def main(
    text: str | None,
    run: Callable[[tuple[int, ...], bool], list[dict[str, Any]]],
    world_sizes: tuple[int, ...],
    summarise: Callable[[list[dict[str, Any]]], dict[str, Any]],
    is_good: Callable[[dict[str, Any]], bool],
) -> int:
    """Run, print, judge; for `exactness_reranker.py` too."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", action="store_true", help="a few cases at W = 1 and 2")
    options = parser.parse_args()
    results = run((1, 2) if options.slice else world_sizes, options.slice)
    for r in results:
        case = f"{r['case']}, clipped" if r.get("clip") else r["case"]
        bound = f" (at most {r['bound']:.1e})" if "bound" in r else ""
        print(f"{r['strategy']:24} W={r['world_size']} {case:32} {r['precision']} {r['error']:.1e}{bound}")
    summary = summarise(results)
    print(json.dumps(summary))
    return 0 if is_good(summary) else 1


if __name__ == "__main__":
    sys.exit(main(__doc__, run, WORLD_SIZES, summarise, is_good))
