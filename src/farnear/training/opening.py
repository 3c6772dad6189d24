"""Opening a run: everything that must be there before the first step, and where the run stands.

    index the shards -> find the place in their order -> load the model, and a checkpoint if there is one -> choose

What the run folder holds, but for `status.json`, is not touched before everything that may refuse the run has been
asked.
"""

import json
import multiprocessing
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import xxhash

import farnear
from farnear.config import RunConfig, dump_config, load_config
from farnear.course import Course
from farnear.data.faults import Fault
from farnear.data.order import Order
from farnear.data.remote import shown
from farnear.data.run_order import plan_settings, steps_in_all
from farnear.files import readable_lines, replace_text
from farnear.model.base import at_commits
from farnear.model.card_facts import CardFacts
from farnear.model.export import heal_export
from farnear.parallel.strategy import LossScale, Strategy
from farnear.parallel.trackers import Told, Trackers
from farnear.parallel.world import World, on_main_rank
from farnear.processes import deaf_children
from farnear.run_folder import Resume, RunFolder
from farnear.status import write_status
from farnear.tracking import refuse_missing_trackers
from farnear.training.cards import facts_of_run
from farnear.training.checkpoint import Checkpoint, Progress, checkpoint_to_resume, folder_name
from farnear.training.choices import Choices
from farnear.training.embedders import EmbedderKind
from farnear.training.engine import BuiltModel, build_model
from farnear.training.guard import Guard
from farnear.training.kind import Gradient, Kind, Setting
from farnear.training.metrics import cut_after
from farnear.training.mined import negatives_of_checkpoint
from farnear.training.optim import steps_of
from farnear.training.rerankers import RerankerKind
from farnear.training.restoring import load_state
from farnear.training.resume import (
    agree_on_order,
    bases_of,
    commits_of,
    first_progress,
    refuse_shorter_run,
    with_best_that_compares,
)
from farnear.training.retention import Retention, set_aside
from farnear.training.saving import Saver, point_at_best
from farnear.training.scale import LearnedScale, TrainedState
from farnear.training.shards import RunData, open_data
from farnear.training.terminal import Terminal
from farnear.training.watch import Watch
from farnear.wording import counted


@dataclass(frozen=True)
class Run:
    """What the phases of a run share.

    Attributes:
        course: Of the whole run, from its first step.
        kind: What is trained.
        gradient: Of a batch.
        choices: Made for it by the memory that was found.
        scale: Trained beside the model, if it is.
        state: What a checkpoint holds.
        saver: Publishes it.
        guard: Knows when the run is to stop.
        watch: Is told where it is.
        terminal: Shows it.
        facts: For the cards of what it exports.
    """

    config: RunConfig
    world: World
    folder: RunFolder
    data: RunData
    order: Order
    course: Course
    kind: Kind
    built: BuiltModel
    gradient: Gradient
    choices: Choices
    scale: LearnedScale | None
    state: TrainedState
    saver: Saver
    guard: Guard
    watch: Watch
    terminal: Terminal
    trackers: Trackers
    facts: CardFacts

    @property
    def strategy(self) -> Strategy:
        return self.built.strategy


def open_run(
    config: RunConfig,
    resume: Resume | None,
    world: World,
    guard: Guard | None = None,
    watch: Watch | None = None,
    terminal: Terminal | None = None,
) -> tuple[Run, Progress]:
    """Everything that must be there before the first step, and where the run stands. A collective.

    Raises:
        UserError: The run folder, the shards, the model or the checkpoint do not fit the run file.
        StopAskedError: A signal has come. Nothing is done that would have to be saved.
    """
    guard, watch = guard or Guard(world), watch or Watch()
    refuse_missing_trackers(config.training.report_to)

    def begin(part: str) -> None:
        watch.at(part, step=0)
        guard.stop_if_asked()

    if config.data.dataloader_num_workers:
        prepare_workers()
    folder = RunFolder(Path(config.output_dir))
    begin("checkpoint: verify")
    verify = config.training.verify_checkpoints
    checkpoint, damaged = checkpoint_to_resume(folder.checkpoints, resume, world, verify=verify)
    begin("shards")
    data = open_data(config.data, config.evaluation, world)
    watch.name_of_pair = data.train.pair_id
    progress = first_progress(config, data, checkpoint)
    if checkpoint is not None and (mined := negatives_of_checkpoint(checkpoint, folder, data.train, world)):
        data = replace(data, negatives=mined)
    # Plans lie beside the index, where every rank of the node finds them.
    order = Order(data.train, plan_settings(config), data.train.path.parent if data.train.path else folder.path)
    total_steps = steps_in_all(config.training, order.schedule)
    refuse_shorter_run(config, total_steps, progress)
    agree_on_order(config, order, total_steps, progress)
    begin("model")
    progress = replace(progress, bases=on_main_rank(world, lambda: bases_of(config, checkpoint)))
    held = held_to_commit(config, progress)
    kind: Kind = EmbedderKind(held) if held.reranker is None else RerankerKind(held, held.reranker)
    built = build_model(held, kind, world)
    strategy, scale = built.strategy, kind.scale()
    state = TrainedState(strategy, built.shapes, scale, is_main=world.is_main, frozen_hash=built.frozen_hash)
    if checkpoint is not None:
        begin("checkpoint: load")
        load_state(checkpoint, state, world)
        set_loss_scale(strategy, checkpoint.progress)
        if world.is_main:
            tell_of_other_ranks(checkpoint, config, world)
    kind.refuse(built.model, data)
    begin("first stage")
    searched = partial(watch.at, "first stage: search")
    kind.prepare(data, Setting(world, folder.path, guard.stop_if_asked, searched, watch.counts("first stage")))
    if checkpoint is not None:
        progress = with_best_that_compares(progress, config, data, folder, resume, world)
    begin("run folder")
    course, trackers = course_of_run(config, order, total_steps, data, world), Trackers()

    def prepare() -> None:
        told = what_was_told(folder) if progress.step else Told()
        prepare_folder(config, folder, progress, course, data.train.faults, damaged)
        trackers.start(config.training.report_to, folder, config.model_dump(mode="json"), progress.step, told)

    on_main_rank(world, prepare)
    about = about_the_run(config)
    commits = commits_of(progress.bases)
    how: dict[str, Any] = {"total_steps": total_steps, "commits": commits, "versions": about["versions"]}
    facts = on_main_rank(world, lambda: facts_of_run(config, data, built, world, **how))
    on_main_rank(world, lambda: replace_text(folder.card, facts.model_dump_json(indent=1) + "\n"))
    begin("choices")
    gradient, choices = kind.step(built, data, progress, world, watch, scale)
    progress = replace(progress, choices=asdict(choices))
    training = config.training
    saver = Saver(
        folder.checkpoints,
        world,
        Retention(training.save_total_limit, training.keep_every_n_steps),
        about,
        watch,
        in_background=training.async_save,
        saved_step=progress.step,
    )
    run = Run(
        config=config,
        world=world,
        folder=folder,
        data=data,
        order=order,
        course=course,
        kind=kind,
        built=built,
        gradient=gradient,
        choices=choices,
        scale=scale,
        state=state,
        saver=saver,
        guard=guard,
        watch=watch,
        terminal=terminal or Terminal(watch, is_main=world.is_main),
        trackers=trackers,
        facts=facts,
    )
    return run, progress


def held_to_commit(config: RunConfig, progress: Progress) -> RunConfig:
    """The run file with its base models at the commits that are trained; what is written down stays as it was said."""
    return config.model_copy(update={"model": at_commits(config.model, commits_of(progress.bases))})


def course_of_run(config: RunConfig, order: Order, total_steps: int, data: RunData, world: World) -> Course:
    """What the run goes through."""
    return Course(
        total_steps=total_steps,
        epochs=order.schedule.epoch_of(total_steps - 1) + 1,
        ranks=world.world_size,
        eval_steps=steps_of(config.evaluation.eval_steps, total_steps),
        save_steps=steps_of(config.training.save_steps, total_steps),
        refresh_steps=steps_of(config.mining.refresh_every, total_steps),
        evaluates=data.whole is not None,
    )


def what_was_told(folder: RunFolder) -> Told:
    """What the records say that trackers have been told, before they are cut back."""
    steps = [int(record.get("step", 0)) for record in readable_lines(folder.metrics)[-1:]]
    evaluations = [
        (str(record.get("kind")), int(record.get("step", 0))) for record in readable_lines(folder.evaluations)
    ]
    return Told(max(steps, default=0), frozenset(evaluations))


def set_loss_scale(strategy: Strategy, saved: Progress) -> None:
    """Under training.fp16, go on at the loss scale of a checkpoint."""
    if strategy.loss_scale is not None and saved.loss_scale is not None:
        strategy.loss_scale = LossScale(**saved.loss_scale)


def tell_of_other_ranks(checkpoint: Checkpoint, config: RunConfig, world: World) -> None:
    """Say so where a run goes on otherwise than it was saved."""
    saved = checkpoint.manifest
    if (saved.strategy, saved.world_size) != (config.strategy, world.world_size):
        by = f"{saved.strategy} on {counted(saved.world_size, 'rank')}"
        print(
            f"{checkpoint.folder.name} was saved by {by}: state and batches to come are the same, losses differ "
            "by rounding",
            flush=True,
        )


def prepare_workers() -> None:
    """Start the process that workers are forked from: it imports what they need once, while the model is loaded."""
    multiprocessing.set_forkserver_preload(["farnear.data.loader", "farnear.model.embedder"])
    with deaf_children():
        forkserver.ensure_running()


def prepare_folder(
    config: RunConfig,
    folder: RunFolder,
    progress: Progress,
    course: Course,
    faults: Sequence[Fault],
    damaged: Mapping[Path, str],
) -> None:
    """Save the resolved run file, check that it loads to the same config, and cut the records back to where it stands.

    What a training that starts, at step 0, finds there is of one that did not reach its first checkpoint.

    Args:
        faults: Of the training shards.
        damaged: Checkpoints newer than that which are not whole, and why: they make room for those to come.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    replace_text(folder.config, dump_config(config))
    if load_config(folder.config) != config:
        raise RuntimeError(f"{folder.config} does not load to the config it was saved from")
    set_all_aside(damaged)
    step = progress.step
    if step:
        # A kill may have come before they were right, or what they named may be set aside.
        replace_text(folder.latest, folder_name(step) + "\n")
        folder.best.unlink(missing_ok=True)
        point_at_best(folder, progress)
    heal_export(folder.export)
    # An evaluation that was made up for, and not saved, comes again, and so does what was mined after the checkpoint.
    last_of = {folder.evaluations: progress.evaluated_step or 0, folder.minings: progress.mined_step or 0}
    by_step = (folder.metrics, folder.evaluations, folder.saves, folder.minings, folder.quarantine, folder.bad_steps)
    for records in by_step:
        if step:
            cut_after(records, last_of.get(records, step))
        else:
            records.unlink(missing_ok=True)
    if step:
        for file in folder.gallery.glob("after*"):
            file.unlink()
    else:
        shutil.rmtree(folder.gallery, ignore_errors=True)
    told = [{**asdict(fault), "shard": shown(fault.shard)} for fault in faults]
    replace_text(folder.faults, "".join(json.dumps(record) + "\n" for record in told))
    folder.summary.unlink(missing_ok=True)
    write_status(folder, "running", step=step, **course.as_plain())


def set_all_aside(damaged: Mapping[Path, str]) -> None:
    """Move damaged checkpoints out of the way of those to come, and say so.

    Args:
        damaged: What is wrong with each.
    """
    for checkpoint, fault in damaged.items():
        print(f"{fault}; going back before it, it stays as {set_aside(checkpoint)}", flush=True)


def about_the_run(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint was made with."""
    names = ["torch", "transformers", "sentence-transformers", "accelerate", "safetensors"]
    names += ["deepspeed"] * config.strategy.startswith("zero") + ["peft"] * (config.model.lora is not None)
    return {
        "strategy": config.strategy,
        "config_hash": xxhash.xxh3_128_hexdigest(dump_config(config).encode()),
        "versions": {
            "python": platform.python_version(),
            "farnear": farnear.__version__,
            **{name: version(name) for name in names},
        },
    }
