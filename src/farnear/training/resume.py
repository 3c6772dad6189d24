"""Where a run begins, and whether the checkpoint that it continues from fits the run file.

The cursor of a checkpoint is a number of steps. It means the same pairs again only where the same shards, in the same
order, are cut into batches of the same size; so whatever decides that is kept beside it and compared here, and another
value is refused by name. The rest of the run file may change: the learning rate's course, the evaluation, the strategy,
the number of ranks.
"""

from collections.abc import Mapping
from dataclasses import replace

from farnear.config import RunConfig
from farnear.data.order import Order
from farnear.errors import UserError
from farnear.model.base import base_commit
from farnear.model.hub import is_folder
from farnear.parallel.collectives import gather_objects
from farnear.parallel.world import World, on_main_rank
from farnear.run_folder import Resume, RunFolder
from farnear.training.checkpoint import Checkpoint, Progress, folder_name, whole_checkpoint
from farnear.training.loop import Parts
from farnear.training.shards import RunData
from farnear.wording import counted


def first_progress(config: RunConfig, data: RunData, checkpoint: Checkpoint | None) -> Progress:
    """Where to begin.

    Raises:
        UserError: The checkpoint's order of pairs is not the run file's, so its place in it means nothing.
    """
    fresh = Progress(
        0, config.seed, config.training.global_batch_size, data.train.fingerprint, measured_by=measured_by(config, data)
    )
    if checkpoint is None:
        return fresh
    saved = checkpoint.progress
    for name, key in (
        ("seed", "seed"),
        ("global_batch_size", "training.global_batch_size"),
        ("fingerprint", "data.train (the shards' content)"),
    ):
        if getattr(saved, name) != getattr(fresh, name):
            raise UserError(
                f"checkpoint {checkpoint.folder} was made with another {key} ({getattr(saved, name)}, now "
                f"{getattr(fresh, name)}), so its place in the order of pairs is lost; restore it, or start in a new "
                "output_dir"
            )
    return saved


def commits_of(bases: Mapping[str, Mapping[str, str | None]]) -> dict[str, str]:
    """The commits of what `Progress` keeps of base models."""
    return {key: commit for key, base in bases.items() if (commit := base["commit"]) is not None}


def bases_of(config: RunConfig, checkpoint: Checkpoint | None) -> dict[str, dict[str, str | None]]:
    """Name, revision and commit of the base models on the hub, as `Progress` keeps them: by the key that names each.

    A run holds on to the commits that it began with, wherever a branch has moved since.

    Raises:
        UserError: The run file names another model or revision than the checkpoint's, and with it another commit; or
            the model cannot be found.
    """
    saved = checkpoint.progress.bases if checkpoint else {}
    found = {}
    for key, model in config.model.by_key.items():
        if is_folder(model.name_or_path):
            continue
        before = saved.get(key, {})
        named: dict[str, str | None] = {"name": model.name_or_path, "revision": model.revision}
        if before and all(before[part] == value for part, value in named.items()):
            found[key] = dict(before)
            continue
        commit = base_commit(model)
        if checkpoint and before and commit != before["commit"]:
            revision = f"{key.removesuffix('.name_or_path')}.revision"
            raise UserError(
                f"checkpoint {checkpoint.folder} was trained from {before['name']} at commit {before['commit']}, and "
                f"the run file's {model.name_or_path} is at {commit} ({revision}: {model.revision}); set {revision}: "
                f"{before['commit']} to go on, or start in a new output_dir"
            )
        found[key] = {**named, "commit": commit}
    return found


def measured_by(config: RunConfig, data: RunData) -> str:
    """What evaluations during the run measure, and on what."""
    return f"{config.evaluation.metric_for_best_model} on {data.sample.fingerprint}" if data.sample else ""


def with_best_that_compares(
    saved: Progress, config: RunConfig, data: RunData, folder: RunFolder, resume: Resume | None, world: World
) -> Progress:
    """The progress of a checkpoint, without its best evaluation where that is no measure for the evaluations to come.

    Raises:
        UserError: The best checkpoint will be needed at the end and is damaged, and "auto" was not asked for.
    """
    now = measured_by(config, data)
    if saved.best_step is None:
        return replace(saved, measured_by=now)
    best = folder.checkpoints / folder_name(saved.best_step)
    why = None
    if not on_main_rank(world, best.is_dir):
        why = "is gone"
    elif saved.measured_by != now:
        why = "was measured otherwise or on other pages"
    elif config.training.load_best_model_at_end:
        try:
            whole_checkpoint(best, world, verify=config.training.verify_checkpoints)
        except UserError as error:
            if resume != "auto":
                raise UserError(f"{error}; say --resume auto to go on without it") from None
            why = f"is damaged ({error})"
    if why is None:
        return saved
    if world.is_main:
        print(f"the best checkpoint so far, {best.name}, {why}: the best is chosen among the evaluations to come")
    return replace(saved, best_metric=None, best_step=None, measured_by=now)


def with_place(progress: Progress, order: Order, total_steps: int) -> Progress:
    """The progress with the epoch of its last step, the hash of that epoch's plan, and what decides all plans."""
    epoch = order.schedule.epoch_of(max(progress.step - 1, 0))
    decided_by = {
        "data.mixing": order.settings.mixing,
        "data.tail": order.settings.tail,
        "data.shards_per_window": order.settings.shards_per_window,
        "the sources' weights": list(order.schedule.shares),  # in whole numbers: 0.7 and 0.3 are what 7 and 3 are
    }
    plan_hash = order.plan(epoch).order_hash
    return replace(progress, order=decided_by, epoch=epoch, plan_hash=plan_hash, total_steps=total_steps)


def agree_on_order(config: RunConfig, order: Order, total_steps: int, progress: Progress) -> None:
    """Compare the plan that training starts with: between the ranks, and with the checkpoint's. A collective.

    Raises:
        UserError: The checkpoint's pairs came in another order, so its place in it means nothing.
        RuntimeError: Ranks have different plans.
    """
    here = with_place(progress, order, total_steps)
    hashes = gather_objects(here.plan_hash)
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the ranks have different plans of epoch {here.epoch} ({', '.join(hashes)})")
    if not progress.plan_hash:
        return
    checkpoint = f"the newest checkpoint in {config.output_dir} was made with"
    for name, saved in progress.order.items():
        # The plan of this epoch may be the same all the same, but those to come are not.
        if here.order.get(name) != saved:
            raise UserError(
                f"{checkpoint} another value of {name} ({saved}, now {here.order.get(name)}), so its place in the "
                "order of pairs is lost; restore it, or start in a new output_dir"
            )
    if progress.plan_hash != here.plan_hash:
        raise UserError(
            f"{checkpoint} another order of pairs (its plan of epoch {here.epoch} has the hash {progress.plan_hash}, "
            f"now {here.plan_hash}), so its place in it is lost; take the version of farnear that it was made with, or "
            "start in a new output_dir"
        )


def new_course(parts: Parts, progress: Progress) -> str:
    """What to say where a run is to be longer or shorter than when its checkpoint was saved."""
    if progress.total_steps is None or progress.total_steps == parts.total_steps:
        return ""
    return (
        f"; it was to take {counted(progress.total_steps, 'step')} and takes {parts.total_steps:,} now, so the "
        f"learning rate goes on at {parts.learning_rate(progress.step):.2e}, on the course of a run of that length"
    )


def refuse_shorter_run(config: RunConfig, total_steps: int, progress: Progress) -> None:
    """A checkpoint beyond the last step could only be evaluated again, as something that it is not.

    Raises:
        UserError: The run file asks for fewer steps than the checkpoint has taken.
    """
    if progress.step > total_steps:
        raise UserError(
            f"the newest checkpoint in {config.output_dir} has taken {progress.step} steps, but the run file "
            f"asks for {total_steps}; raise training.max_steps or num_train_epochs, or set another output_dir"
        )
