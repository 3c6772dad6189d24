"""The cached step of a run, with what the run chooses for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from farnear.config import RunConfig
from farnear.data.index import Index
from farnear.loss.own import OwnLoss
from farnear.model.embedder import Preprocessing
from farnear.model.features import FeatureMerger
from farnear.model.frozen import FrozenOutputs, has_dropout
from farnear.model.pixels import page_tokens
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World
from farnear.training.cache import CachedStep
from farnear.training.checkpoint import Progress
from farnear.training.choices import Choices, choose


def build_step(
    config: RunConfig,
    index: Index,
    model: SentenceTransformer,
    preprocess: Preprocessing,
    strategy: Strategy,
    frozen: FrozenOutputs | None,
    own_loss: OwnLoss | None,
    progress: Progress,
    world: World,
) -> tuple[CachedStep, Choices]:
    """The step and the choices in it, those of the checkpoint where ``progress`` has some. A collective."""
    pairs = -(-min(config.training.global_batch_size, len(index)) // world.world_size)
    negatives = len(index.negatives) / len(index) if config.data.num_negatives != 0 else 0.0
    merger = FeatureMerger(model)
    has_frozen_parts = frozen is not None and bool(frozen.names)
    strategy.train(True)
    choices = choose(
        config.training,
        progress.choices,
        strategy,
        preprocess,
        merger,
        index,
        page_tokens(model),
        world,
        inputs_per_rank={"query": pairs, "document": round(pairs * (1 + negatives))},
        has_dropout=has_dropout(model),
        has_frozen_parts=has_frozen_parts,
    )
    if frozen is not None:
        frozen.budget_bytes = choices.frozen_bytes
    step = CachedStep(
        strategy,
        world,
        config.loss,
        config.seed,
        own_loss,
        keep_graphs=choices.keep_graphs,
        together=choices.together,
        merge=merger,
        frozen=frozen if has_frozen_parts and choices.frozen_bytes else None,
        cast_once=casts_kept(config, world),
    )
    return step, choices


def casts_kept(config: RunConfig, world: World) -> Callable[[], AbstractContextManager[Any]]:
    """What keeps the weights' casts through a pass, unless weights are spread over ranks: all casts would not fit."""
    training = config.training
    if not (training.bf16 or training.fp16) or config.strategy not in ("single", "ddp", "zero1", "zero2"):
        return nullcontext
    # The module's own autocast lies within this one, and casts are forgotten when the outermost ends.
    return partial(torch.autocast, world.device.type, torch.bfloat16 if training.bf16 else torch.float16)
