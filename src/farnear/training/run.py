"""A run from its configuration to its export.

    check the launch and the run folder -> index the shards -> find the place in their order -> load the model, and a
    checkpoint if there is one -> say what follows from all this -> measure -> train -> measure -> export -> sum up

Each part of that is a function here or in the module it names; `farnear.training.loop` is the middle. What a run folder
holds is not touched before everything that may refuse the run has been asked.
"""

import json
import multiprocessing
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import forkserver
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

import farnear
from farnear.config import RunConfig, dump_config, load_config
from farnear.data.dealing import Dealing
from farnear.data.faults import Fault
from farnear.data.index import modality_name
from farnear.data.loader import TrainLoader
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.quotas import Schedule
from farnear.data.remote import shown
from farnear.errors import UserError
from farnear.files import replace_text
from farnear.loss.own import load_own_loss
from farnear.model.embedder import Preprocessing
from farnear.model.export import export_model
from farnear.model.load import embedding_dimension
from farnear.model.pixels import page_tokens
from farnear.parallel.strategy import LossScale, Strategy
from farnear.parallel.trackers import Trackers
from farnear.parallel.world import World, on_main_rank, start_world, stop_world
from farnear.retrieve.evaluate import evaluate
from farnear.run_folder import Resume, RunFolder, check_start, claimed
from farnear.sections import TrainingConfig
from farnear.training.cache import CachedStep
from farnear.training.checkpoint import (
    Progress,
    find_checkpoint,
    folder_name,
    load_state,
    open_checkpoint,
    retain,
    save_checkpoint,
)
from farnear.training.choices import Choices
from farnear.training.describe import derived_numbers
from farnear.training.engine import build_model, build_step
from farnear.training.loop import Parts, train
from farnear.training.metrics import ProgressLines, append_line, cut_after
from farnear.training.optim import learning_rate_schedule, steps_of
from farnear.training.quarantine import Quarantine
from farnear.training.resume import (
    agree_on_order,
    first_progress,
    new_course,
    refuse_shorter_run,
    with_best_that_compares,
    with_place,
)
from farnear.training.scale import LearnedScale, TrainedState
from farnear.training.shards import RunData, open_data
from farnear.training.summary import write_summary
from farnear.wording import counted


@dataclass(frozen=True)
class Run:
    """What the phases of a run share.

    Attributes:
        total_steps: Of the whole run, from its first step.
        step: The gradient of a batch.
        choices: Made for it by the memory that was found.
        scale: Trained beside the model, if it is.
        state: What a checkpoint holds.
        dims: Dimensions that are measured, the full one among them, largest first.
    """

    config: RunConfig
    world: World
    folder: RunFolder
    data: RunData
    order: Order
    total_steps: int
    model: SentenceTransformer
    preprocess: Preprocessing
    strategy: Strategy
    step: CachedStep
    choices: Choices
    scale: LearnedScale | None
    state: TrainedState
    dims: tuple[int, ...]
    trackers: Trackers


def run_training(config: RunConfig, resume: Resume | None = None) -> dict[str, Any]:
    """Train, evaluate, export on the ranks that the launcher started; see `farnear.train`."""
    world = start_world(config)
    try:
        return train_in(world, config, resume)
    finally:
        stop_world()


def train_in(world: World, config: RunConfig, resume: Resume | None = None) -> dict[str, Any]:
    """One run in a process group that stands already."""
    folder = RunFolder(Path(config.output_dir))
    with ExitStack() as claim:
        on_main_rank(world, lambda: _claim(folder, resume, claim))
        return _train(world, config, resume)


def _claim(folder: RunFolder, resume: Resume | None, claim: ExitStack) -> None:
    check_start(folder.path, resume)
    claim.enter_context(claimed(folder))


def _train(world: World, config: RunConfig, resume: Resume | None) -> dict[str, Any]:
    started = perf_counter()
    run, progress = open_run(config, resume, world)
    parts = loop_parts(run)
    if world.is_main:
        print(derived_numbers(parts, run.data, run.model, run.preprocess), flush=True)
        if progress.step:
            left = counted(parts.total_steps - progress.step, "step")
            print(
                f"continuing from {folder_name(progress.step)}: {left} to go{new_course(parts, progress)}", flush=True
            )
    if config.evaluation.eval_on_start and progress.step == 0:
        measure(run, "before", 0)
    progress = train(parts, progress)
    if config.training.load_best_model_at_end and progress.best_step is not None:
        best = run.folder.checkpoints / folder_name(progress.best_step)
        load_state(open_checkpoint(best), run.state)
    measure(run, "after", progress.step)
    export(run)
    run.trackers.close()
    if world.is_main:
        print(f"exported {run.folder.export}", flush=True)
    return on_main_rank(
        world, lambda: write_summary(config, run.folder, world.world_size, perf_counter() - started, run.data.train)
    )


def open_run(config: RunConfig, resume: Resume | None, world: World) -> tuple[Run, Progress]:
    """Everything that must be there before the first step, and where the run stands.

    Raises:
        UserError: The run folder, the shards, the model or the checkpoint do not fit the run file.
    """
    if config.data.dataloader_num_workers:
        prepare_workers()
    folder = RunFolder(Path(config.output_dir))
    checkpoint = find_checkpoint(folder.checkpoints) if resume else None
    data = open_data(config.data, config.evaluation, world)
    progress = first_progress(config, data, checkpoint)
    # Plans lie beside the index, where every rank of the node finds them.
    order = Order(data.train, plan_settings(config), data.train.path.parent if data.train.path else folder.path)
    total_steps = steps_in_all(config.training, order.schedule)
    refuse_shorter_run(config, total_steps, progress)
    agree_on_order(config, order, total_steps, progress)
    own_loss = load_own_loss(config.loss.function) if config.loss.function else None
    built = build_model(config, world)
    model, strategy = built.model, built.strategy
    scale = LearnedScale(config.loss, config.training) if config.loss.learn_scale else None
    state = TrainedState(strategy, built.shapes, scale, is_main=world.is_main, frozen_hash=built.frozen_hash)
    if checkpoint is not None:
        load_state(checkpoint, state)
        if strategy.loss_scale is not None and checkpoint.progress.loss_scale is not None:
            strategy.loss_scale = LossScale(**checkpoint.progress.loss_scale)
    refuse_unsupported(model, config, data)
    dims = measured_dims(config, embedding_dimension(model))
    if checkpoint is not None:
        progress = with_best_that_compares(progress, config, data, folder, world)
    on_main_rank(world, lambda: prepare_folder(config, folder, progress.step, data.train.faults))
    trackers = Trackers(config.training.report_to if world.is_main else (), folder.path, config.model_dump(mode="json"))
    step, choices = build_step(config, data.train, built, own_loss, progress, world)
    progress = replace(progress, choices=asdict(choices))
    run = Run(
        config,
        world,
        folder,
        data,
        order,
        total_steps,
        model,
        built.preprocess,
        strategy,
        step,
        choices,
        scale,
        state,
        dims,
        trackers,
    )
    return run, progress


def prepare_workers() -> None:
    """Start the process that workers are forked from: it imports what they need once, while the model is loaded."""
    multiprocessing.set_forkserver_preload(["farnear.data.loader", "farnear.model.embedder"])
    forkserver.ensure_running()


def plan_settings(config: RunConfig) -> PlanSettings:
    """What the run file says about the order of the pairs."""
    return PlanSettings(
        seed=config.seed,
        global_batch_size=config.training.global_batch_size,
        weights=config.data.weights,
        mixing=config.data.mixing,
        tail=config.data.tail,
        shards_per_window=config.data.shards_per_window,
    )


def steps_in_all(training: TrainingConfig, schedule: Schedule) -> int:
    """max_steps, or those of the epochs, the last of which may be a fraction; at least one."""
    if training.max_steps > 0:
        return training.max_steps
    epochs = training.num_train_epochs
    before = schedule.steps_before(int(epochs))
    return max(1, before + round((epochs - int(epochs)) * (schedule.steps_before(int(epochs) + 1) - before)))


def refuse_unsupported(model: SentenceTransformer, config: RunConfig, data: RunData) -> None:
    """Raise UserError for shards that hold what the model does not take, before its first batch would fail."""
    for index in (data.train, *([data.whole.index] if data.whole else [])):
        for modality in sorted({modality_name(int(bits)) for bits in np.unique(index.input_modality_I)}):
            # sentence-transformers' name: a word, or several sorted ones.
            name: Any = tuple(modality.split("+")) if "+" in modality else modality
            if not model.supports(name):
                raise UserError(
                    f"the shards hold inputs of the kind {modality}, which model {config.model.name_or_path} does not "
                    f"take (modalities: {', '.join(map(str, model.modalities))}); take another model, or leave those "
                    "samples out"
                )


def loop_parts(run: Run) -> Parts:
    """What the loop turns."""
    config, world, training, total_steps = run.config, run.world, run.config.training, run.total_steps
    loader = TrainLoader(
        run.order,
        Dealing(
            rank=world.rank,
            world_size=world.world_size,
            page_tokens=page_tokens(run.model),
            mini_batch_size=training.mini_batch_size_of,
            mini_batch_num_tokens=run.choices.mini_batch_num_tokens,
            num_negatives=config.data.num_negatives,
            same_modalities=run.strategy.forward_is_collective,
        ),
        run.data.store,
        run.preprocess,
        num_workers=config.data.dataloader_num_workers,
        prefetch_factor=config.data.dataloader_prefetch_factor,
        prefetch_shards=config.data.remote_prefetch_shards,
        pin_memory=world.device.type == "cuda",
    )
    lines = ProgressLines(total_steps, training.logging_steps)

    def record(figures: dict[str, Any]) -> None:
        if world.is_main:
            append_line(run.folder.metrics, figures)
            lines.show(figures)
            run.trackers.log(figures, figures["step"])

    return Parts(
        config=config,
        world=world,
        strategy=run.strategy,
        loader=loader,
        step=run.step,
        choices=run.choices,
        scale=run.scale,
        learning_rate=learning_rate_schedule(training, total_steps),
        quarantine=Quarantine(run.folder.quarantine, run.data.train, config.data.max_bad_fraction, world),
        record=record,
        evaluate=lambda step: measure(run, "during", step),
        save=lambda progress, as_best: save(run, with_place(progress, run.order, total_steps), as_best),
        total_steps=total_steps,
        eval_steps=steps_of(config.evaluation.eval_steps, total_steps),
        save_steps=steps_of(training.save_steps, total_steps),
    )


def measure(run: Run, kind: str, step: int) -> float:
    """Evaluate everything ("before", "after") or the sample ("during"); the deciding metric at the full dimension."""
    task = run.data.sample if kind == "during" else run.data.whole
    if task is None:
        return float("nan")
    measures = evaluate(
        task,
        run.strategy,
        run.world,
        run.preprocess,
        page_tokens(run.model),
        run.dims,
        batch_size=run.config.evaluation.per_device_eval_batch_size,
        num_workers=run.config.data.dataloader_num_workers,
    )
    if run.world.is_main:
        size = {"queries": len(task.relevant), "pages": task.pages}
        append_line(run.folder.evaluations, {"step": step, "kind": kind, **size, "metrics": measures})
        run.trackers.log({"eval": measures}, step)
        figures = "  ".join(f"{dim}: {of_dim['ndcg@10']:.4f}" for dim, of_dim in measures.items())
        print(
            f"nDCG@10 {kind} training by dim  {figures}  ({task.pages} pages, {len(task.relevant)} queries)", flush=True
        )
    return measures[str(run.dims[0])][run.config.evaluation.metric_for_best_model]


def save(run: Run, progress: Progress, as_best: bool = False) -> None:
    """Publish a checkpoint, point `best` at the best one, remove what is beyond save_total_limit.

    Args:
        as_best: Whether it is saved only because it is the best, and goes when it is no more.
    """
    about = {"strategy": run.config.strategy, "versions": library_versions(), "saved_as_best": as_best}
    path = save_checkpoint(run.folder.checkpoints, run.state, progress, run.world, about)
    if run.world.is_main:
        if progress.best_step is not None:
            replace_text(run.folder.path / "best", folder_name(progress.best_step) + "\n")
        retain(run.folder.checkpoints, run.config.training.save_total_limit, progress.best_step)
        print(f"saved {path}{', the best so far' if progress.best_step == progress.step else ''}", flush=True)


def export(run: Run) -> None:
    """Write the folder that `SentenceTransformer(path)` loads: what was trained, and all else from the base model."""
    weights = {name.removeprefix("model."): weight for name, weight in run.strategy.full_weights().items()}
    on_main_rank(run.world, lambda: export_model(run.config.model, weights, run.folder.export))


def measured_dims(config: RunConfig, full: int) -> tuple[int, ...]:
    """The Matryoshka dims and the full dimension, largest first.

    Raises:
        UserError: A dim is larger than the embedding.
    """
    dims: Sequence[int] = config.loss.matryoshka_dims or ()
    if dims and max(dims) > full:
        raise UserError(
            f"loss.matryoshka_dims names {', '.join(str(dim) for dim in dims if dim > full)}, but the embeddings of "
            f"{config.model.name_or_path} have {full} dimensions; take out what is above"
        )
    return tuple(sorted({*dims, full}, reverse=True))


def prepare_folder(config: RunConfig, folder: RunFolder, step: int, faults: Sequence[Fault]) -> None:
    """Save the resolved run file, check that it loads to the same config, and cut the records back to ``step``.

    What a training that starts, at step 0, finds there is of one that did not reach its first checkpoint. The
    ``faults`` are those of the training shards.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    replace_text(folder.config, dump_config(config))
    if load_config(folder.config) != config:
        raise RuntimeError(f"{folder.config} does not load to the config it was saved from")
    for records in (folder.metrics, folder.evaluations, folder.quarantine):
        if step:
            cut_after(records, step)
        else:
            records.unlink(missing_ok=True)
    told = [{**asdict(fault), "shard": shown(fault.shard)} for fault in faults]
    replace_text(folder.faults, "".join(json.dumps(record) + "\n" for record in told))
    folder.summary.unlink(missing_ok=True)


def library_versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    names = ("torch", "transformers", "sentence-transformers", "accelerate")
    return {
        "python": platform.python_version(),
        "farnear": farnear.__version__,
        **{name: version(name) for name in names},
    }
