"""What computes a run: its model, the strategy around it, and the cached step with what the run chooses for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from farnear.config import RunConfig
from farnear.loss.own import OwnLoss
from farnear.model.attention_choice import check_attention
from farnear.model.features import FeatureMerger
from farnear.model.frozen import FrozenOutputs, has_dropout
from farnear.model.pairs import PairPicker
from farnear.model.pixels import page_tokens
from farnear.model.towers import leave_out_unreached
from farnear.model.trainable import checkpoint_activations, choose_trainable, frozen_hash, store_frozen_in
from farnear.parallel.strategy import Forward, Strategy, build_strategy
from farnear.parallel.world import World, on_main_rank
from farnear.retrieve.inference import Inference, nothing
from farnear.sections import TrainingConfig
from farnear.training.cache import CachedStep
from farnear.training.checkpoint import Progress
from farnear.training.choices import Choices, choose
from farnear.training.kind import Kind
from farnear.training.optim import build_optimizer
from farnear.training.shards import RunData
from farnear.training.watch import Watch


@dataclass(frozen=True)
class BuiltModel:
    """A model and what stands around it.

    Attributes:
        model: A sequence of sentence-transformers' modules.
        preprocess: From inputs to its features.
        strategy: Trains it.
        frozen: Keeps outputs of its frozen parts.
        shapes: Of what is trained, by name.
        frozen_hash: Stands for what is not.
    """

    model: Any
    preprocess: Any
    strategy: Strategy
    frozen: FrozenOutputs
    shapes: dict[str, torch.Size]
    frozen_hash: str

    def inference(
        self,
        config: RunConfig,
        world: World,
        *,
        pick: PairPicker | None = None,
        between: Callable[[], None] = nothing,
        moved: Callable[[], None] = nothing,
        told: Callable[[str, int, int], None] = nothing,
    ) -> Inference:
        """The model under its strategy as it embeds or scores; see `inference_of`."""
        return inference_of(
            config,
            self.strategy,
            self.model,
            self.preprocess,
            world,
            pick=pick,
            between=between,
            moved=moved,
            told=told,
        )


MakeOptimizer = Callable[[nn.Module, TrainingConfig], torch.optim.Optimizer]


def build_model(
    config: RunConfig, kind: Kind, world: World, make_optimizer: MakeOptimizer = build_optimizer
) -> BuiltModel:
    """The run file's model under its strategy. A collective."""
    training = config.training
    check_attention(config.model, world.device, half_precision=training.precision != "fp32")
    # Where each rank holds a part of the parameters, rank 0 hands the parts out.
    is_spread = config.strategy in ("zero3", "fsdp2")
    model = kind.load(
        dtype=torch.bfloat16 if training.pure_bf16 else torch.float32,
        with_weights=world.is_main or not is_spread,
    )
    preprocess = kind.preprocessing(model)
    choose_trainable(model, config.model, seed=config.seed)
    hash_of_frozen = on_main_rank(world, lambda: frozen_hash(model))
    if (training.bf16 or training.fp16) and config.strategy in ("single", "ddp"):
        # ZeRO and FSDP2 take all weights in one type.
        store_frozen_in(torch.bfloat16 if training.bf16 else torch.float16, model)
    if training.gradient_checkpointing:
        checkpoint_activations(model)
    leave_out_unreached(model)
    module = kind.wrap(model)
    if not is_spread:
        module.to(world.device)
    # Taken now: ZeRO-3 leaves parameters without a shape.
    shapes = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.requires_grad}
    # Before the strategy hangs hooks on the modules.
    frozen = FrozenOutputs(module)
    strategy = build_strategy(config, module, make_optimizer(module, training), world)
    return BuiltModel(model, preprocess, strategy, frozen, shapes, hash_of_frozen)


def inference_of(
    config: RunConfig,
    forward: Forward,
    model: Any,
    preprocess: Any,
    world: World,
    *,
    pick: PairPicker | None = None,
    between: Callable[[], None] = nothing,
    moved: Callable[[], None] = nothing,
    told: Callable[[str, int, int], None] = nothing,
) -> Inference:
    """A model as it embeds or scores, in the run file's batches.

    Args:
        forward: The strategy that trains the model, or what only computes with it.
        model, preprocess: As `BuiltModel` has them.
        pick, between, moved, told: As in `Inference`.
    """
    batch_size, num_workers = config.evaluation.per_device_eval_batch_size, config.data.dataloader_num_workers
    return Inference(
        forward, world, preprocess, page_tokens(model), batch_size, num_workers, pick, between, moved, told
    )


def build_step(
    config: RunConfig,
    data: RunData,
    built: BuiltModel,
    own_loss: OwnLoss | None,
    progress: Progress,
    world: World,
    watch: Watch,
) -> tuple[CachedStep, Choices]:
    """The step and the choices in it, those of the checkpoint where ``progress`` has some. A collective."""
    pairs = -(-min(config.training.global_batch_size, len(data.train)) // world.world_size)
    negatives = float(data.negatives.counts(config.data.num_negatives).mean())
    documents = np.concatenate([data.train.positives, data.negatives.rows])
    if config.mining.refresh_every is not None:
        # Once the run has mined again: any document may be a negative.
        negatives, documents = max(negatives, float(config.negatives_of_refresh)), data.train.documents()
    merger = FeatureMerger(built.model)
    built.strategy.train(True)
    choices = choose(
        config.training,
        progress.choices,
        built.strategy,
        built.preprocess,
        merger,
        data.train,
        documents,
        page_tokens(built.model),
        world,
        inputs_per_rank={"query": pairs, "document": round(pairs * (1 + negatives))},
        has_dropout=has_dropout(built.model),
        has_frozen_parts=bool(built.frozen.names),
    )
    built.frozen.budget_bytes = choices.frozen_bytes
    step = CachedStep(
        built.strategy,
        world,
        config.loss,
        config.seed,
        own_loss,
        keep_graphs=choices.keep_graphs,
        together=choices.together,
        merge=merger,
        frozen=built.frozen,
        cast_once=casts_kept(config, world),
        watch=watch,
    )
    return step, choices


def casts_kept(config: RunConfig, world: World) -> Callable[[], AbstractContextManager[Any]]:
    """What keeps the weights' casts through a pass, unless weights are spread over ranks: all casts would not fit."""
    training = config.training
    if not (training.bf16 or training.fp16) or config.strategy not in ("single", "ddp", "zero1", "zero2"):
        return nullcontext
    # The module's own autocast lies within this one, and casts are forgotten when the outermost ends.
    return partial(torch.autocast, world.device.type, torch.bfloat16 if training.bf16 else torch.float16)
