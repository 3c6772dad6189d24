"""The loop, on a page: batch, gradient, step, record; evaluate and save when due.

Everything with more than one way to go lives elsewhere: order in the plan, gradients in the cache, ranks in the
strategy, files in the checkpoint. `farnear.training.run` puts the parts together.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from farnear.config import RunConfig
from farnear.data.loader import RankBatch, TrainLoader
from farnear.errors import RunStoppedError
from farnear.parallel.collectives import gather_values
from farnear.parallel.strategy import NonFiniteGradientError, Strategy
from farnear.parallel.world import World
from farnear.training.cache import NonFiniteLossError, StepFigures, cached_gradient
from farnear.training.checkpoint import Progress
from farnear.training.metrics import peak_memory_bytes
from farnear.training.quarantine import Quarantine


@dataclass(frozen=True)
class Parts:
    """What the loop turns.

    Attributes:
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
    try:
        cached_gradient(parts.strategy, batch, parts.config.loss, figures, seed=parts.config.seed, world=parts.world)
        before_step = perf_counter()
        grad_norm = parts.strategy.step(learning_rate)
    except (NonFiniteLossError, NonFiniteGradientError) as error:
        what = "loss" if isinstance(error, NonFiniteLossError) else "gradient"
        keys = parts.loader.keys_of_batch(batch.step)
        raise RunStoppedError(
            f"step {batch.step + 1}: the {what} is not finite (loss {figures.loss}), so nothing was updated; lower "
            f"training.learning_rate, or look at the pairs of the batch: {' '.join(keys)}"
        ) from error
    now = perf_counter()
    seconds = {"data": batch.seconds_waited, **figures.seconds, "optimizer": now - before_step}
    scale = parts.strategy.loss_scale
    of_rank = gather_values((figures.own_seconds, figures.tokens, len(batch.quarantined)), parts.world.device)
    own_seconds_W, tokens_W, quarantined_W = zip(*of_rank, strict=True)
    if sum(quarantined_W):
        parts.quarantine.add(batch.step + 1, batch.quarantined)
    return {
        "step": batch.step + 1,
        "epoch": batch.epoch,
        "loss": figures.loss,
        "lr": learning_rate,
        "grad_norm": grad_norm,
        **({"loss_scale": scale.scale, "skipped": scale.skipped} if scale else {}),
        "pairs": figures.pairs,
        "pairs_per_s": figures.pairs / (batch.seconds_waited + now - started),
        "masked": figures.masked,
        "quarantined": int(sum(quarantined_W)),
        "tokens": int(sum(tokens_W)),
        "longest_rank": max(own_seconds_W) * len(own_seconds_W) / max(sum(own_seconds_W), 1e-9),
        "peak_memory_bytes": peak_memory_bytes(parts.world.device),
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
    }


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
