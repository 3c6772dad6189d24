"""Numbers that have gone wrong: a loss or gradient that is not finite, a loss far above those before it.

Both are known to every rank alike, so what is done about them is, too. A step whose loss or gradient is not finite has
changed no weight, and may be left out (`training.on_non_finite: skip`). A spike of the loss has: the weights go back to
the last checkpoint, and the training goes on with the next batch, so that the pairs from the checkpoint to the spike
are left out (as in Chowdhery et al. 2022, arXiv:2204.02311, section 5.1). Either way `bad_steps.jsonl` names the pairs.

A spike is a loss that lies further above the median of the last ones than ``loss_spike_threshold`` times their spread,
the median distance from that median, scaled to be a standard deviation where losses are normally distributed. Unlike
mean and deviation, neither moves for a few odd values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from farnear.errors import RunStoppedError
from farnear.sections import TrainingConfig
from farnear.training.metrics import append_line
from farnear.wording import some_of

MOST_SKIPPED_IN_A_ROW = 10
MOST_ROLLBACKS = 3

_LOSSES_NEEDED = 8
_SPREAD_OF_NORMAL = 1.4826
# Losses that hardly move, as at the end of a training, have a spread of nearly nothing, of which all is a multiple.
_LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Numbers:
    """What is remembered of the steps so far, and saved with a checkpoint.

    Attributes:
        losses: Of the last good steps.
        skipped_in_a_row: Steps left out since the last good one.
        rollbacks: Of the whole run.
        rolled_back_at: The step of the last one.
    """

    losses: Sequence[float] = ()
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    rolled_back_at: int = 0


class BadSteps:
    """Says what becomes of each step.

    Args:
        path: `bad_steps.jsonl`, which rank 0 writes.
        keys_of_batch: The pairs of a 0-based step's global batch.
        roll_back: Brings the weights to the newest checkpoint; its step and what it remembers, None where there is no
            checkpoint. A collective.
    """

    def __init__(
        self,
        training: TrainingConfig,
        path: Path,
        keys_of_batch: Callable[[int], Sequence[str]],
        roll_back: Callable[[], tuple[int, Numbers] | None],
        *,
        is_main: bool,
    ) -> None:
        self._training, self._path, self._keys_of_batch = training, path, keys_of_batch
        self._roll_back, self._is_main = roll_back, is_main

    def judge(self, figures: dict[str, Any], numbers: Numbers) -> tuple[dict[str, Any], Numbers]:
        """The figures of a step, with ``rolled_back_to`` where that was done, and what is remembered after it.

        A collective, whose outcome is the same on every rank.

        Raises:
            RunStoppedError: The run file, or patience, says that this is the end.
        """
        if figures["left_out"]:
            return figures, self._left_out(figures, numbers)
        threshold, loss = self._training.loss_spike_threshold, figures["loss"]
        if threshold is not None and is_spike(numbers.losses, loss, threshold):
            return self._rolled_back(figures, numbers)
        losses = (*numbers.losses, loss)[-self._training.loss_spike_window :] if threshold is not None else ()
        return figures, replace(numbers, losses=losses, skipped_in_a_row=0)

    def _left_out(self, figures: dict[str, Any], numbers: Numbers) -> Numbers:
        what, step = figures["left_out"], figures["step"]
        loss = "" if figures["loss"] is None else f" (the loss is {figures['loss']:.4f})"
        told = f"step {step}: the {what} is not finite{loss}, so nothing was updated"
        if self._training.on_non_finite == "stop":
            self._note(figures, what, "stop", step)
            raise RunStoppedError(
                f"{told}; lower training.learning_rate, set training.on_non_finite: skip, or look at the pairs of the "
                f"batch, which {self._path} names: {some_of(self._keys_of_batch(step - 1))}"
            )
        numbers = replace(numbers, skipped_in_a_row=numbers.skipped_in_a_row + 1)
        self._note(figures, what, "skip", step)
        if numbers.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise RunStoppedError(
                f"{told}, for the {numbers.skipped_in_a_row}th time in a row; lower training.learning_rate, remove "
                f"the checkpoints of those steps, and --resume; {self._path} names the pairs"
            )
        if self._is_main:
            print(f"{told}; the step is left out, {self._path} names its pairs", flush=True)
        return numbers

    def _rolled_back(self, figures: dict[str, Any], numbers: Numbers) -> tuple[dict[str, Any], Numbers]:
        step = figures["step"]
        told = f"step {step}: the loss {figures['loss']:.4f} is a spike over {median(numbers.losses):.4f} before it"
        advice = "lower training.learning_rate, or raise training.loss_spike_threshold"
        if self._training.on_loss_spike == "stop":
            self._note(figures, "spike", "stop", step)
            raise RunStoppedError(f"{told}; {advice}; {self._path} names its pairs")
        if numbers.rollbacks == MOST_ROLLBACKS:
            self._note(figures, "spike", "stop", step)
            raise RunStoppedError(f"{told}, after {MOST_ROLLBACKS} rollbacks; {advice}")
        found = self._roll_back()
        if found is None:
            self._note(figures, "spike", "stop", step)
            raise RunStoppedError(f"{told}, and there is no checkpoint to go back to; save more often, or {advice}")
        back_to, then = found
        # Those up to the last rollback, if it went back as far, are noted already.
        for skipped in range(max(back_to, numbers.rolled_back_at) + 1, step + 1):
            self._note(figures if skipped == step else {}, "spike", "rollback", skipped)
        if self._is_main:
            print(
                f"{told}: back to the weights of step {back_to}, and on with step {step + 1}; {self._path} names the "
                "pairs that are left out",
                flush=True,
            )
        return {**figures, "rolled_back_to": back_to}, replace(
            then, rollbacks=numbers.rollbacks + 1, rolled_back_at=step
        )

    def _note(self, figures: dict[str, Any], what: str, action: str, step: int) -> None:
        if self._is_main:
            facts = {"loss": figures.get("loss"), "grad_norm": figures.get("grad_norm")}
            keys = list(self._keys_of_batch(step - 1))
            append_line(self._path, {"step": step, "what": what, "action": action, **facts, "keys": keys})


def is_spike(losses: Sequence[float], loss: float, threshold: float) -> bool:
    """Whether a loss lies apart from those before it."""
    if len(losses) < _LOSSES_NEEDED:
        return False
    middle = median(losses)
    spread = max(_SPREAD_OF_NORMAL * median(abs(one - middle) for one in losses), _LEAST_SPREAD * abs(middle))
    return loss > middle + threshold * spread
