"""The loop, on a page: batch, gradient, step, record; evaluate, save, mine and stop when due.

Everything with more than one way to go lives elsewhere: order in the plan, gradients in the cache, ranks in the
strategy, files in the saver, signals in the guard, bad numbers in their own module. `farnear.training.run` puts the
parts together.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, NoReturn

from farnear.config import RunConfig
from farnear.data.batch import RankBatch
from farnear.data.list_dealing import ListBatch
from farnear.data.loader import TrainLoader
from farnear.errors import RunInterruptedError
from farnear.parallel.strategy import NonFiniteGradientError, Strategy
from farnear.parallel.world import World
from farnear.training.bad_steps import BadSteps
from farnear.training.checkpoint import Progress, folder_name
from farnear.training.choices import Choices
from farnear.training.guard import Asked, Guard, StopAskedError
from farnear.training.kind import Gradient
from farnear.training.metrics import model_flops_utilisation, peak_memory_bytes
from farnear.training.quarantine import Quarantine
from farnear.training.saving import Saver
from farnear.training.scale import LearnedScale
from farnear.training.step import NonFiniteLossError, StepFigures
from farnear.training.watch import Watch


@dataclass(frozen=True)
class Parts:
    """What the loop turns.

    Attributes:
        gradient: Of a batch.
        choices: Made for it by the memory that was found.
        scale: Trained beside the model, if it is.
        learning_rate: Of a 0-based step.
        quarantine: Takes the pairs that could not be used.
        bad_steps: Says what becomes of steps whose numbers have gone wrong.
        record: Takes the figures of each step.
        evaluate: Measures the sample and returns the metric that decides which checkpoint is best.
        save: Has a checkpoint published; True where its step was due for one.
        mine_again: Has the steps to come use hard negatives by the model as it is.
        export: Writes the model as it is.
        hurry: Called when the first step is done: from now on nobody takes minutes alone.
        eval_steps, save_steps, refresh_steps: Intervals in steps; None means never.
    """

    config: RunConfig
    world: World
    strategy: Strategy
    loader: TrainLoader[Any, Any]
    gradient: Gradient
    choices: Choices
    scale: LearnedScale | None
    learning_rate: Callable[[int], float]
    quarantine: Quarantine
    bad_steps: BadSteps
    guard: Guard
    watch: Watch
    saver: Saver
    record: Callable[[dict[str, Any]], None]
    evaluate: Callable[[int], float]
    save: Callable[[Progress, bool], None]
    mine_again: Callable[[Progress], Progress]
    export: Callable[[int], None]
    hurry: Callable[[], None]
    total_steps: int
    eval_steps: int | None
    save_steps: int | None
    refresh_steps: int | None


def train(parts: Parts, progress: Progress) -> Progress:
    """Train from where ``progress`` stands to the last step, which is always saved.

    Raises:
        RunInterruptedError: On every rank, after a signal: the step that it came in is saved.
    """
    parts.strategy.train(True)
    if progress.step:
        # An evaluation that the end of the run before has broken off.
        progress = evaluate_and_save(parts, progress)
    first_step = progress.step
    while progress.step < parts.total_steps:
        progress = mine_when_due(parts, progress)
        parts.watch.at("data", step=progress.step + 1)
        # Nothing is read ahead of the next mining, which decides about the batches after it.
        for batch in parts.loader.batches(progress.step, next_mining(parts, progress.step)):
            figures, numbers = parts.bad_steps.judge(train_step(parts, batch), progress.numbers)
            parts.record(figures)
            parts.quarantine.stop_if_too_many(batch.step + 1)
            scale = asdict(parts.strategy.loss_scale) if parts.strategy.loss_scale else None
            progress = replace(progress, step=batch.step + 1, loss_scale=scale, numbers=numbers)
            if batch.step == first_step:
                parts.hurry()
            progress = evaluate_and_save(parts, progress)
            parts.watch.at("data", step=progress.step + 1)
    parts.watch.at("end of training", step=progress.step)
    parts.saver.finish()
    return progress


def next_mining(parts: Parts, step: int) -> int:
    """The step after which is mined again, or the last."""
    interval = parts.refresh_steps
    return parts.total_steps if interval is None else min(parts.total_steps, (step // interval + 1) * interval)


def mine_when_due(parts: Parts, progress: Progress) -> Progress:
    """Mine after a step's checkpoint, which a resume begins with again: an end in between loses and changes nothing.

    Raises:
        RunInterruptedError: On every rank, after a signal, when the step is saved.
    """
    if not progress.step or not _is_due(progress.step, parts.refresh_steps):
        return progress
    try:
        return parts.mine_again(progress)
    except StopAskedError as stop:
        save_and_stop(parts, progress, stop.asked)


def evaluate_and_save(parts: Parts, progress: Progress) -> Progress:
    """What follows a step, each when it is due; and the end of the run, when a signal asks for it.

    Raises:
        RunInterruptedError: On every rank, when what was done is saved.
    """
    parts.watch.at("look for signals")
    asked = parts.guard.ask(save_failed=parts.saver.failed)
    if asked.save_failed:
        parts.saver.finish()  # raises it, on every rank
    is_best = False
    if asked.signal is None and _is_due(progress.step, parts.eval_steps) and progress.evaluated_step != progress.step:
        try:
            metric = parts.evaluate(progress.step)
        except StopAskedError as stop:
            asked = stop.asked
        else:
            progress = replace(progress, evaluated_step=progress.step)
            is_best = progress.best_metric is None or metric > progress.best_metric
            if is_best:
                progress = replace(progress, best_metric=metric, best_step=progress.step)
    is_due = _is_due(progress.step, parts.save_steps) or progress.step == parts.total_steps
    if is_best:
        # Before the checkpoint that says so: where this is killed, the evaluation comes again, and the export with it.
        parts.export(progress.step)
    if asked.signal:
        save_and_stop(parts, progress, asked, is_due)
    if is_due or is_best:
        parts.save(progress, is_due)
    return progress


def save_and_stop(parts: Parts, progress: Progress, asked: Asked, is_due: bool = False) -> NoReturn:
    """End the run because of a signal, once a checkpoint is published."""
    step = progress.step
    if parts.world.is_main:
        print(f"{asked}: saving step {step}, then stopping", flush=True)
    parts.save(progress, is_due)
    parts.saver.finish()
    raise RunInterruptedError(
        f"stopped by {asked} after step {step}, saved in {folder_name(step)}; the same command with --resume continues"
    )


def train_step(parts: Parts, batch: RankBatch | ListBatch) -> dict[str, Any]:
    """One optimizer step; its figures. Where ``left_out`` names what was not finite, no weight has changed."""
    parts.watch.at("exchange", step=batch.step + 1, pairs=batch.pairs_b)
    started = perf_counter()
    figures = StepFigures()
    learning_rate = parts.learning_rate(batch.step)
    grad_norm, left_out = math.nan, None
    try:
        outcome = parts.gradient(batch, figures)
        before_update = perf_counter()
        parts.watch.at("update")
        grad_norm = parts.strategy.step(learning_rate) if outcome.reaches_weights else 0.0
        if parts.scale is not None and not math.isnan(grad_norm):  # as it is where fp16 left the step out
            parts.scale.step(outcome.dlog_scale, learning_rate / parts.config.training.learning_rate)
    except NonFiniteLossError:
        before_update, left_out = perf_counter(), "loss"
    except NonFiniteGradientError:
        left_out = "gradient"
    now = perf_counter()
    seconds = {"data": batch.seconds_waited, **figures.seconds, "optimizer": now - before_update}
    loss_scale = parts.strategy.loss_scale
    if figures.quarantined:
        parts.quarantine.add(batch.step + 1, batch.quarantined)
    return {
        "step": batch.step + 1,
        "epoch": batch.epoch,
        "loss": figures.loss if math.isfinite(figures.loss) else None,
        **(
            {"distillation": figures.distillation, "distilled": figures.distilled}
            if figures.distillation is not None
            else {}
        ),
        "lr": learning_rate,
        "grad_norm": grad_norm,
        "left_out": left_out,
        **({"loss_scale": loss_scale.scale, "skipped": loss_scale.skipped} if loss_scale else {}),
        "scale": figures.scale,
        "pairs": figures.pairs,
        **({"scored": figures.scored} if figures.scored else {}),
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
