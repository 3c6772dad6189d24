"""Is the cached step exact for this model, this loss and this strategy? A few of the run's own pairs, one SGD step.

The tests of farnear answer that for its own models. A user's model may hold what no cache can replay: a layer that
looks at its whole mini-batch (BatchNorm), random numbers from elsewhere than torch, a loss that remembers its last
call. So the doctor asks it of the model that is to be trained, with everything that the run file switches on:

    plain gradient of the batch, on rank 0 (`farnear.training.plain_gradient`)
    the same batch by the cached step under the strategy, one step of SGD with the run's clipping
    error = | update - expected update | / | expected update |        (over all parameters together)
            or the relative difference of both gradients' norms before clipping, if that is more

SGD, because AdamW magnifies rounding where a gradient is near zero. The step is made about as long as the weights
themselves, so that their own rounding does not drown it; the model is thrown away afterwards.

In half precision the plain gradient loses something too. There the error is that from the plain fp32 gradient, and the
bound is the one that is documented, or a multiple of what the plain gradient loses in that precision.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from farnear.config import RunConfig
from farnear.data.batch import RankBatch
from farnear.data.dealing import SIDES, Dealing
from farnear.data.loader import TrainLoader
from farnear.data.order import Order
from farnear.data.run_order import plan_settings
from farnear.errors import UserError
from farnear.loss.own import load_own_loss
from farnear.model.embedder import Embedder, Preprocessing
from farnear.model.frozen import has_dropout
from farnear.model.load import cast_weights, load_model
from farnear.model.pixels import page_tokens
from farnear.model.trainable import checkpoint_activations, choose_trainable
from farnear.parallel.strategy import NonFiniteGradientError, Strategy
from farnear.parallel.world import World, on_main_rank
from farnear.sections import TrainingConfig
from farnear.training.cache import CachedStep
from farnear.training.embedders import EmbedderKind
from farnear.training.engine import build_model, build_step
from farnear.training.plain_gradient import Probe, plain_gradient
from farnear.training.resume import first_progress
from farnear.training.shards import RunData
from farnear.training.step import NonFiniteLossError, StepFigures
from farnear.training.watch import Watch

# Rounding alone gives 1e-6 with fp32 on tiny models; a deep model adds some of its own. What is wrong gives 1e-2 on.
BOUND_FP32 = 1e-4
# docs/precision.md
BOUND_BF16, BOUND_FP16 = 3e-2, 5e-3
_OVER_PLAIN = 1.5
# With weights in bf16 the sums over mini-batches and the update itself are rounded too.
_OVER_PLAIN_BF16_WEIGHTS = 3.0
# Attention that computes in half precision only, which the fp32 gradient cannot use.
_HALF_ONLY = ("flash_attention_2", "flash_attention_3", "varlen")
# fp16 leaves out steps until it has found a scale.
_MOST_OVERFLOWS = 20
_MOST_INPUTS_AT_ONCE = 16
_SECONDS_OF_DECODING = 2.0


@dataclass(frozen=True)
class GradientReport:
    """What was found.

    Attributes:
        error: Of the cached update; None where the plain gradient did not fit on the device.
        bound: Above which it is wrong, and where that comes from.
        mini_batches: In which each rank took the batch.
        seconds: Of a later step of one mini-batch of pages a rank, with ``pairs_in_step`` pairs a rank.
    """

    error: float | None
    bound: float
    bound_from: str
    precision: str
    pairs: int
    mini_batches: int
    seconds: float
    pairs_in_step: int


@dataclass(frozen=True)
class _Plain:
    """Rank 0's: gradient and weights by name, and the norms that every rank is told."""

    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]
    norm: float
    norm_of_weights: float
    error_in_half: float


def check_gradient(config: RunConfig, data: RunData, world: World, plans: Path) -> GradientReport:
    """Compare both gradients on the ranks that were started. A collective.

    Args:
        plans: A folder of all ranks, for the order of the pairs.

    Raises:
        UserError: The model cannot be loaded or trained as the run file says, or a gradient is not finite.
    """
    if config.reranker is not None:
        raise UserError(
            "the gradient of a reranker is not compared on a run's own model yet; say --skip gradient "
            "(benchmarks/exactness_reranker.py compares it on a small one)"
        )
    config = _without_trials(config)
    training = config.training
    own_loss = load_own_loss(config.loss.function) if config.loss.function else None
    pairs_per_rank, mini_batch = _small(world.world_size)
    kept: list[_Plain] = []

    def plain() -> tuple[float, float, float] | None:
        """The norms; the rest stays here."""
        found = _plain(config, data, world, plans, pairs_per_rank, mini_batch)
        kept.extend([found] if found else [])
        return (found.norm, found.norm_of_weights, found.error_in_half) if found else None

    norms = on_main_rank(world, plain)
    norm, norm_of_weights, error_in_half = norms or (1.0, 0.0, 0.0)
    if not 0 < norm < float("inf"):
        raise UserError(
            f"the plain gradient of {pairs_per_rank * world.world_size} pairs has norm {norm:g}, so there is nothing "
            "to train by; look at the loss, the frozen parts and the weights of the model"
        )
    kind = EmbedderKind(config)
    built = build_model(config, kind, world, lambda module, _: _sgd(module, training))
    kind.refuse(built.model, data)
    step, _ = build_step(config, data, built, own_loss, first_progress(config, data, None), world, Watch())
    about = (config, data, world, plans, built.model, built.preprocess)
    inputs = _inputs_at_once(training)
    scale = config.loss.scale
    seconds, pairs_in_step = _pace(step, built.strategy, _probe(*about, inputs, inputs), scale)
    probe = _probe(*about, pairs_per_rank, mini_batch)
    batch = probe.batch()
    clipping = min(1.0, training.max_grad_norm / (norm + 1e-6)) if training.max_grad_norm else 1.0
    learning_rate = norm_of_weights / (norm * clipping)
    cached_norm = _one_step(step, built.strategy, batch, scale, learning_rate=learning_rate)
    after = built.strategy.full_weights()
    error = None
    if kept:
        (reference,) = kept
        update = {name: reference.weights[name] - after[name].float() for name in reference.weights}
        wanted = {name: g_n * (learning_rate * clipping) for name, g_n in reference.gradient.items()}
        # Clipping hides a gradient's length, so that is compared before it.
        error = max(relative_error(update, wanted), abs(cached_norm - norm) / norm)
    precision, bound = _bound(training)
    times = _OVER_PLAIN_BF16_WEIGHTS if training.pure_bf16 else _OVER_PLAIN
    from_plain = times * error_in_half
    return GradientReport(
        error=error,
        bound=max(bound, from_plain),
        bound_from=f"{times:g} x what the plain one loses in {precision}" if from_plain > bound else f"for {precision}",
        precision=precision,
        pairs=len(probe.order.global_batch(0)),
        mini_batches=len(batch.mini_batches),
        seconds=seconds,
        pairs_in_step=pairs_in_step,
    )


def measure_decoding(config: RunConfig, data: RunData, plans: Path) -> dict[str, float]:
    """Pairs a second that one core reads, decodes and prepares through the loader, and their documents each."""
    model = load_model(config.model, with_weights=False)
    inputs = _inputs_at_once(config.training)
    dealing = Dealing(
        rank=0, world_size=1, page_tokens=page_tokens(model), mini_batch_size=dict.fromkeys(SIDES, inputs)
    )
    dealing = replace(dealing, num_negatives=config.data.num_negatives, negatives=data.negatives)
    order = Order(data.train, replace(plan_settings(config), global_batch_size=inputs, tail="pad"), plans)
    loader = TrainLoader(order, dealing, data.store, Preprocessing(model), num_workers=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = documents = 0
    seconds = 0.0
    started = perf_counter()
    try:
        # Of an epoch at least the first batch, which opens files and fills caches, is not counted.
        with closing(loader.batches(0, 1 << 20)) as batches:
            for batch in batches:
                if batch.step:
                    pairs, documents = pairs + len(batch.pairs_b), documents + len(batch.page_hash_p)
                    seconds += batch.seconds_waited
                if pairs and perf_counter() - started > _SECONDS_OF_DECODING:
                    break
    finally:
        torch.set_num_threads(threads)
    return {"pairs_per_s": pairs / seconds, "documents_per_pair": documents / pairs}


def relative_error(update: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Norm of the difference over norm of what is wanted, all parameters as one vector."""
    difference = sum(float((update[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (difference / sum(float(w.double().square().sum()) for w in wanted.values())) ** 0.5


def _without_trials(config: RunConfig) -> RunConfig:
    """The run file with what a run would find out by filling the memory decided."""
    training = config.training
    decided = {
        "keep_graphs": 0.5 if training.keep_graphs == "auto" else training.keep_graphs,
        "mini_batch_num_tokens": None,
    }
    return config.model_copy(update={"training": training.model_copy(update=decided)})


def _inputs_at_once(training: TrainingConfig) -> int:
    """Pages in a mini-batch, as far as the run file says it in pages."""
    return min(training.mini_batch_size_of["document"] or 8, _MOST_INPUTS_AT_ONCE)


def _small(world_size: int) -> tuple[int, int]:
    """(pairs a rank, inputs of a mini-batch): several mini-batches a rank, and few pages in all."""
    return (4, 2) if world_size <= 4 else (2, 1) if world_size <= 16 else (1, 1)


def _plain(
    config: RunConfig, data: RunData, world: World, plans: Path, pairs_per_rank: int, mini_batch: int
) -> _Plain | None:
    """The plain gradient in fp32, and what it loses in half precision; None where the device has no room for it."""
    training = config.training
    settings = config.model
    if settings.attn_implementation in _HALF_ONLY:
        settings = settings.model_copy(update={"attn_implementation": "sdpa"})
    dtype = torch.bfloat16 if training.pure_bf16 else torch.float32
    model = load_model(settings, dtype=dtype, seed=config.seed)
    preprocess = Preprocessing(model)
    choose_trainable(model, settings, seed=config.seed)
    cast_weights(model, torch.float32)
    if training.gradient_checkpointing or world.device.type == "cuda":
        checkpoint_activations(model)
    module = Embedder(model, bf16=False).train()
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    probe = _probe(config, data, world, plans, model, preprocess, pairs_per_rank, mini_batch)
    own_loss = load_own_loss(config.loss.function) if config.loss.function else None
    replay = has_dropout(model)
    try:
        module.to(world.device)
        gradient = plain_gradient(config, module, probe, own_loss, world, replay=replay)
        error_in_half = 0.0
        if training.precision != "fp32":
            half = Embedder(model, bf16=not training.fp16, fp16=training.fp16).train()
            in_half = plain_gradient(config, half, probe, own_loss, world, replay=replay)
            error_in_half = relative_error(in_half, gradient)
    except torch.OutOfMemoryError:
        return None
    return _Plain(gradient, weights, _norm(gradient), _norm(weights), error_in_half)


def _probe(
    config: RunConfig,
    data: RunData,
    world: World,
    plans: Path,
    model: SentenceTransformer,
    preprocess: Preprocessing,
    pairs_per_rank: int,
    mini_batch: int,
) -> Probe:
    """The first pairs in the order of a run with so small batches."""
    settings = replace(plan_settings(config), global_batch_size=pairs_per_rank * world.world_size, tail="pad")
    dealing = Dealing(
        rank=world.rank,
        world_size=world.world_size,
        page_tokens=page_tokens(model),
        mini_batch_size=dict.fromkeys(SIDES, mini_batch),
        num_negatives=config.data.num_negatives,
        negatives=data.negatives,
        # As every strategy has it in `forward_is_collective`.
        same_modalities=config.strategy in ("zero3", "fsdp2") or config.training.reduce == "mini_batch",
    )
    return Probe(Order(data.train, settings, plans), dealing, data.store, preprocess)


def _pace(step: CachedStep, strategy: Strategy, probe: Probe, scale: float) -> tuple[float, int]:
    """(seconds of a step, its pairs on this rank): the second of two that change nothing."""
    batch = probe.batch()
    _one_step(step, strategy, batch, scale, learning_rate=0.0)
    started = perf_counter()
    _one_step(step, strategy, batch, scale, learning_rate=0.0)
    return perf_counter() - started, len(batch.pairs_b)


def _one_step(step: CachedStep, strategy: Strategy, batch: RankBatch, scale: float, *, learning_rate: float) -> float:
    """The gradient's norm before clipping."""
    try:
        for _ in range(_MOST_OVERFLOWS):
            step.gradient(batch, StepFigures(), scale=scale)
            if not math.isnan(norm := strategy.step(learning_rate)):
                return norm
    except (NonFiniteLossError, NonFiniteGradientError):
        pass
    raise UserError(
        "loss or gradient of the cached step is not finite on the run's first pairs; train with training.bf16 or in "
        "fp32, and look at the model's weights"
    )


def _bound(training: TrainingConfig) -> tuple[str, float]:
    if training.pure_bf16:
        return "bf16 weights", BOUND_BF16
    if training.bf16:
        return "bf16", BOUND_BF16
    return ("fp16", BOUND_FP16) if training.fp16 else ("fp32", BOUND_FP32)


def _sgd(module: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    del training
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)


def _norm(of_name: Mapping[str, Tensor]) -> float:
    return float(torch.stack([x.double().norm() for x in of_name.values()]).norm())
