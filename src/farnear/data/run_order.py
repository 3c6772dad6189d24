"""What the run file says about the order of the pairs, and how many steps follow from it."""

from farnear.config import RunConfig
from farnear.data.plan import PlanSettings
from farnear.data.quotas import Schedule
from farnear.sections import TrainingConfig


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
