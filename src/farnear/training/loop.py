"""The loop, on a page: batch, gradient, step, record; evaluate and save when due.

Everything with more than one way to go lives elsewhere: order in the plan, gradients in the cache, ranks in the
strategy, files in the checkpoint. `farnear.training.run` puts the parts together.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from farnear.config import RunConfig
from farnear.data.loader import RankBatch, TrainLoader
from farnear.errors import RunStoppedError
from farnear.parallel.strategy import NonFiniteGradientError, Strategy
from farnear.parallel.world import World
from farnear.training.cache import CachedStep, NonFiniteLossError, StepFigures
from farnear.training.checkpoint import Progress
from farnear.training.choices import Choices
from farnear.training.metrics import model_flops_utilisation, peak_memory_bytes
from farnear.training.quarantine import Quarantine
from farnear.training.scale import LearnedScale


@dataclass(frozen=True)
class Parts:
    """What the loop turns.

    Attributes:
        step: The gradient of a batch.
        choices: Made for it by the memory that was found.
        scale: Trained beside the model, if it is.
        learning_rate: Of a 0-based step.
        quarantine: Takes the pairs that could not be used.
        record: Takes the figures of each step.
        evaluate: Measures the sample and returns the metric that decides which checkpoint is best.
        save: Publishes a checkpoint; True where it is saved only because it is the best.
        eval_steps, save_steps: Intervals in steps; None means never.
    """

    config: RunConfig
    world: World
    strategy: Strategy
    loader: TrainLoader
    step: CachedStep
    choices: Choices
    scale: LearnedScale | None
    learning_rate: Callable[[int], float]
    quarantine: Quarantine
    record: Callable[[dict[str, Any]], None]
    evaluate: Callable[[int], float]
    save: Callable[[Progress, bool], None]
    total_steps: int
    eval_steps: int | None
    save_steps: int | None


def train(parts: Parts, progress: Progress) -> Progress:
    """Train from where ``progress`` stands to the last step, which is always saved."""
    parts.strategy.train(True)
    for batch in parts.loader.batches(progress.step, parts.total_steps):
        parts.record(train_step(parts, batch))
        parts.quarantine.stop_if_too_many(batch.step + 1)
        scale = parts.strategy.loss_scale
        progress = replace(progress, step=batch.step + 1, loss_scale=asdict(scale) if scale else None)
        is_best = False
        if _is_due(progress.step, parts.eval_steps):
            metric = parts.evaluate(progress.step)
            is_best = progress.best_metric is None or metric > progress.best_metric
            if is_best:
                progress = replace(progress, best_metric=metric, best_step=progress.step)
        is_due = _is_due(progress.step, parts.save_steps) or progress.step == parts.total_steps
        if is_due or is_best:
            parts.save(progress, not is_due)
    return progress


def train_step(parts: Parts, batch: RankBatch) -> dict[str, Any]:
    """One optimizer step; its figures.

    Raises:
        RunStoppedError: On every rank, when the loss or the gradient is not finite. No weight has changed.
    """
    started = perf_counter()
    figures = StepFigures()
    learning_rate = parts.learning_rate(batch.step)
    scale = parts.config.loss.scale if parts.scale is None else parts.scale.value
    try:
        outcome = parts.step.gradient(batch, figures, scale=scale)
        before_update = perf_counter()
        grad_norm = parts.strategy.step(learning_rate) if outcome.reaches_weights else 0.0
        if parts.scale is not None and not math.isnan(grad_norm):  # as it is where fp16 left the step out
            parts.scale.step(outcome.dlog_scale, learning_rate / parts.config.training.learning_rate)
    except (NonFiniteLossError, NonFiniteGradientError) as error:
        what = "loss" if isinstance(error, NonFiniteLossError) else "gradient"
        keys = parts.loader.keys_of_batch(batch.step)
        raise RunStoppedError(
            f"step {batch.step + 1}: the {what} is not finite (loss {figures.loss}), so nothing was updated; lower "
            f"training.learning_rate, or look at the pairs of the batch: {' '.join(keys)}"
        ) from error
    now = perf_counter()
    seconds = {"data": batch.seconds_waited, **figures.seconds, "optimizer": now - before_update}
    loss_scale = parts.strategy.loss_scale
    if figures.quarantined:
        parts.quarantine.add(batch.step + 1, batch.quarantined)
    return {
        "step": batch.step + 1,
        "epoch": batch.epoch,
        "loss": figures.loss,
        "lr": learning_rate,
        "grad_norm": grad_norm,
        **({"loss_scale": loss_scale.scale, "skipped": loss_scale.skipped} if loss_scale else {}),
        "scale": None if parts.config.loss.function else scale,
        "pairs": figures.pairs,
        "pairs_per_s": figures.pairs / (batch.seconds_waited + now - started),
        "masked": figures.masked,
        "beyond_margin": figures.beyond_margin,
        "quarantined": figures.quarantined,
        "tokens": figures.tokens,
        "padding_share": figures.padding / max(figures.tokens + figures.padding, 1),
        "kept_graphs": figures.kept_graphs,
        "frozen_bytes": figures.frozen_bytes,
        "longest_rank": figures.longest_rank,
        "model_flops": figures.model_flops,
        "mfu": model_flops_utilisation(figures.model_flops, figures.seconds, parts.world.device),
        "collectives": parts.world.traffic.as_plain(),
        "peak_memory_bytes": peak_memory_bytes(parts.world.device),
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
    }


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
