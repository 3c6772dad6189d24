"""A run from its configuration to its export.

    claim the run folder -> open the run -> say what follows from the run file -> measure -> train -> measure -> export
    -> sum up

Each part of that is a function here or in the module it names; `farnear.training.opening` is what comes before the
first step, `farnear.training.loop` the middle. Around all of it stand the watchdog, the guard that hears signals, and
`status.json`, which says how it ended.
"""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import Any

from farnear.config import RunConfig
from farnear.data.loader import TrainLoader
from farnear.errors import RunInterruptedError, RunStoppedError, UserError
from farnear.files import readable_lines, remove_drafts
from farnear.outcome import tell
from farnear.parallel.world import PATIENCE, World, on_main_rank, start_world, stop_world, tells_of_a_lost_rank, tighten
from farnear.run_folder import Resume, RunFolder, check_start, claimed
from farnear.signals import Signals
from farnear.status import write_failure, write_status
from farnear.training.bad_steps import BadSteps, Numbers
from farnear.training.cards import licences_in_words, run_card
from farnear.training.checkpoint import Progress, checkpoint_to_resume, folder_name, whole_checkpoint
from farnear.training.describe import derived_numbers
from farnear.training.guard import Guard, StopAskedError
from farnear.training.kind import Setting
from farnear.training.loop import Parts, train
from farnear.training.metrics import append_line
from farnear.training.opening import Run, open_run, set_all_aside, set_loss_scale
from farnear.training.optim import learning_rate_schedule
from farnear.training.quarantine import Quarantine
from farnear.training.refresh import mine_again
from farnear.training.restoring import load_state
from farnear.training.resume import commits_of, new_course, with_place
from farnear.training.saving import point_at_best
from farnear.training.showing import leave_gallery, leave_report
from farnear.training.summary import write_summary
from farnear.training.terminal import Terminal
from farnear.training.watch import Watch
from farnear.training.watchdog import SHARE_OF_TIMEOUT, Watchdog, clear_heartbeats
from farnear.wording import counted

_OF_A_SOURCE = re.compile(r"\[[^\]\s]*:\d+\]\s*")


def run_training(config: RunConfig, resume: Resume | None = None, signals: Signals | None = None) -> dict[str, Any]:
    """Train, evaluate, export on the ranks that the launcher started; see `farnear.train`."""
    world = start_world(config)
    try:
        return train_in(world, config, resume, signals)
    finally:
        stop_world()


def train_in(
    world: World, config: RunConfig, resume: Resume | None = None, signals: Signals | None = None
) -> dict[str, Any]:
    """One run in a process group that stands already.

    Raises:
        RunInterruptedError: On every rank, after a signal.
    """
    folder = RunFolder(Path(config.output_dir))
    watch = Watch(PATIENCE.total_seconds())
    terminal = Terminal(watch, is_main=world.is_main)
    with ExitStack() as stack:
        on_main_rank(world, lambda: _claim(folder, resume, stack))
        stack.enter_context(Watchdog(watch, folder, world.rank, world.world_size, _end_hung(folder, terminal)))
        stack.enter_context(terminal)
        started, run = perf_counter(), None
        try:
            run, progress = open_run(config, resume, world, Guard(world, signals), watch, terminal)
            return _train(run, progress, started)
        except BaseException as error:
            told = _told(error, world, watch)
            write_failure(folder, told, None if isinstance(told, UserError) else world.rank)
            # A run that was refused leaves what is there as it is.
            if world.is_main and run is not None and isinstance(told, Exception):
                leave_report(folder)
            if told is error:
                raise
            raise told from error


def _told(error: BaseException, world: World, watch: Watch) -> BaseException:
    """What a run ends with: the error that ended it, or the line that says what it means."""
    if isinstance(error, StopAskedError):
        return RunInterruptedError(
            f"stopped by {error} outside of the training's steps, where nothing is lost; the same command with "
            "--resume auto continues"
        )
    if tells_of_a_lost_rank(error):
        # Where in its own source a library met it is of no use to anybody.
        why = shorten(_OF_A_SOURCE.sub("", str(error).splitlines()[0]), 200, placeholder="...")
        return RunStoppedError(
            f"rank {world.rank} has lost another rank in {watch.place} ({why}); what that one met is told above, "
            "unless it was killed (out of memory?); the same command with --resume auto continues"
        )
    return error


def _claim(folder: RunFolder, resume: Resume | None, claim: ExitStack) -> None:
    check_start(folder.path, resume)
    claim.enter_context(claimed(folder))
    clear_heartbeats(folder)
    remove_drafts(folder.path)
    write_status(folder, "running", step=None)


def _end_hung(folder: RunFolder, terminal: Terminal) -> Callable[[RunStoppedError | None], None]:
    def end(error: RunStoppedError | None) -> None:
        terminal.close()
        if error is not None:
            write_failure(folder, error)
            tell(error)
        # The training's thread cannot be got out of a collective.
        os._exit(RunStoppedError.exit_code)

    return end


def _train(run: Run, progress: Progress, started: float) -> dict[str, Any]:
    config, world, watch = run.config, run.world, run.watch
    with run.saver, run.trackers:
        parts = loop_parts(run)
        if world.is_main:
            print(derived_numbers(parts, run.data, run.built), flush=True)
            print(f"{'licence':>10}  {licences_in_words(config, run.facts)}", flush=True)
            if progress.step:
                left = counted(parts.total_steps - progress.step, "step")
                print(
                    f"continuing from {folder_name(progress.step)}: {left} to go{new_course(parts, progress)}",
                    flush=True,
                )
        if config.evaluation.eval_on_start and progress.step == 0:
            measure(run, "before", 0)
        progress = train(parts, progress)
        exported_step, best = progress.step, progress.best_step
        if config.training.load_best_model_at_end and best is not None and load_best(run, best):
            exported_step = best
        measure(run, "after", progress.step)
        export(run, exported_step, after=True)
        watch.at("summary")
        with watch.patient():
            run.trackers.close()
    with watch.patient():
        if world.is_main:
            print(f"exported {run.folder.export}", flush=True)
        seconds = perf_counter() - started
        return on_main_rank(world, lambda: finish(run, progress, exported_step, seconds))


def load_best(run: Run, step: int) -> bool:
    """Bring the weights to the best checkpoint's; where it has been damaged, say so and keep the last. A collective."""
    run.watch.at("checkpoint: load the best")
    best = run.folder.checkpoints / folder_name(step)
    with run.watch.patient():
        try:
            checkpoint = whole_checkpoint(best, run.world, verify=run.config.training.verify_checkpoints)
        except UserError as error:
            if run.world.is_main:
                print(f"{error}: the last model is measured and exported in place of the best", flush=True)
            return False
        load_state(checkpoint, run.state, run.world)
    return True


def finish(run: Run, progress: Progress, exported_step: int, seconds: float) -> dict[str, Any]:
    """Sum the run up, and say that it is finished."""
    summary = write_summary(
        run.config,
        run.folder,
        run.world.world_size,
        seconds,
        run.data.train,
        exported_step=exported_step,
        base_commits=commits_of(progress.bases),
    )
    write_status(run.folder, "finished", step=progress.step, **run.course.as_plain(), exit_code=0)
    if report := leave_report(run.folder):
        print(f"report {report}", flush=True)
    return summary


def loop_parts(run: Run) -> Parts:
    """What the loop turns."""
    config, world, training, course = run.config, run.world, run.config.training, run.course
    total_steps = course.total_steps
    loader = TrainLoader(
        run.order,
        run.kind.dealing(run.data, run.built, run.choices, world),
        run.data.store,
        run.built.preprocess,
        num_workers=config.data.dataloader_num_workers,
        prefetch_factor=config.data.dataloader_prefetch_factor,
        prefetch_shards=config.data.remote_prefetch_shards,
        pin_memory=world.device.type == "cuda",
    )
    run.terminal.pace.take(
        evaluations=readable_lines(run.folder.evaluations),
        minings=readable_lines(run.folder.minings),
        saves=readable_lines(run.folder.saves),
    )
    run.terminal.begin(course, training.logging_steps)

    def record(figures: dict[str, Any]) -> None:
        if world.is_main:
            append_line(run.folder.metrics, figures)
            run.terminal.step(figures)
            run.trackers.log_step(figures)

    def mined_again(progress: Progress) -> Progress:
        started = perf_counter()
        negatives, progress = mine_again(run, progress)
        run.terminal.pace.took("mining", perf_counter() - started)
        loader.deal_by(run.kind.dealing(replace(run.data, negatives=negatives), run.built, run.choices, world))
        return progress

    def hurry() -> None:
        tighten(world, timedelta(seconds=training.ddp_timeout))
        run.watch.limit = SHARE_OF_TIMEOUT * training.ddp_timeout

    return Parts(
        config=config,
        world=world,
        strategy=run.strategy,
        loader=loader,
        gradient=run.gradient,
        choices=run.choices,
        scale=run.scale,
        learning_rate=learning_rate_schedule(training, total_steps),
        quarantine=Quarantine(run.folder.quarantine, run.data.train, config.data.max_bad_fraction, world),
        bad_steps=BadSteps(
            training, run.folder.bad_steps, loader.keys_of_batch, lambda: roll_back(run), is_main=world.is_main
        ),
        guard=run.guard,
        watch=run.watch,
        saver=run.saver,
        record=record,
        evaluate=lambda step: measure(run, "during", step),
        save=lambda progress, is_due: save(run, with_place(progress, run.order, total_steps), periodic=is_due),
        mine_again=mined_again,
        export=lambda step: export(run, step),
        hurry=hurry,
        total_steps=total_steps,
        eval_steps=course.eval_steps,
        save_steps=course.save_steps,
        refresh_steps=course.refresh_steps,
    )


def measure(run: Run, kind: str, step: int) -> float:
    """Evaluate everything ("before", "after") or the sample ("during"); the deciding metric at the full dimension.

    Raises:
        StopAskedError: On every rank, when a signal has come.
    """
    task = run.data.sample if kind == "during" else run.data.whole
    if task is None:
        return float("nan")

    started = perf_counter()
    setting = Setting(
        run.world,
        run.folder.path,
        between=run.guard.stop_if_asked,
        moved=lambda: run.watch.at("evaluation: search", step=step),
        told=run.watch.counts("evaluation", step),
        ranked=kind != "during",
    )
    found = run.kind.evaluate(task, run.built, setting)
    if run.world.is_main:
        record = {"step": step, "kind": kind, "queries": len(task.relevant), "pages": task.pages}
        record |= {"seconds": round(perf_counter() - started, 2), "metrics": found.measures, **found.more}
        append_line(run.folder.evaluations, record)
        run.terminal.pace.take(evaluations=[record])
        run.trackers.log_evaluation(kind, found.measures, step)
        print(f"nDCG@10 {kind} training {found.text}  ({task.pages} pages, {len(task.relevant)} queries)", flush=True)

    def show() -> None:
        if found.rankings is not None:
            moved = partial(run.watch.at, "evaluation: gallery", step=step)
            leave_gallery(run.folder, task, found.rankings, kind, step, moved)
        leave_report(run.folder)

    with run.watch.patient():
        on_main_rank(run.world, show)
    return found.measures[found.headline][run.config.evaluation.metric_for_best_model]


def save(run: Run, progress: Progress, *, periodic: bool) -> None:
    """Have a checkpoint published, and `best` point at the best one. A collective."""
    if progress.step != run.saver.saved_step:
        started = perf_counter()
        run.saver.save(run.state, progress, periodic=periodic)
        run.terminal.pace.took("save", perf_counter() - started)
    elif run.world.is_main:
        point_at_best(run.folder, progress)


def roll_back(run: Run) -> tuple[int, Numbers] | None:
    """Bring weights and moments to the newest checkpoint; its step, and what was remembered then. A collective."""
    run.saver.finish()
    run.watch.at("checkpoint: roll back")
    with run.watch.patient():
        verify = run.config.training.verify_checkpoints
        checkpoint, damaged = checkpoint_to_resume(run.folder.checkpoints, "auto", run.world, verify=verify)
        on_main_rank(run.world, lambda: set_all_aside(damaged))
        if checkpoint is None:
            return None
        load_state(checkpoint, run.state, run.world)
        set_loss_scale(run.strategy, checkpoint.progress)
    return checkpoint.progress.step, checkpoint.progress.numbers


def export(run: Run, step: int, *, after: bool = False) -> None:
    """Write the folder that `SentenceTransformer(path)` loads: what was trained, and all else from the base model.

    Args:
        step: That the weights are of.
        after: Whether they were measured after the training.
    """
    run.watch.at("export")
    folder = run.folder.export
    with run.watch.patient():
        weights = {name.removeprefix("model."): weight for name, weight in run.strategy.full_weights().items()}

        def write() -> None:
            card = run_card(run.config, run.folder, run.facts, step, name=folder.name, after=after)
            run.kind.export(weights, folder, card)

        on_main_rank(run.world, write)
