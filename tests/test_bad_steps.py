"""Numbers that have gone wrong: left out, rolled back or the end, alike on every rank, and the pairs are named."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoints import change_manifest
from exactness import parameters_split
from faults import state_of as state
from ranks import run_ranks
from test_resume import losses
from tiny_runs import make_inputs, run_config

from farnear.errors import RunStoppedError, UserError
from farnear.parallel.fsdp2 import Fsdp2
from farnear.parallel.replicated import Replicated
from farnear.parallel.world import World, start_world, stop_world
from farnear.parallel.zero import Zero
from farnear.sections import TrainingConfig
from farnear.training import bad_steps
from farnear.training.bad_steps import MOST_ROLLBACKS, MOST_SKIPPED_IN_A_ROW, BadSteps, Numbers, is_spike
from farnear.training.cache import CachedStep
from farnear.training.run import train_in
from farnear.training.step import NonFiniteLossError

ALONE = World(0, 1, torch.device("cpu"))
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("bad"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What is a spike


@pytest.mark.parametrize(
    ("losses_before", "loss", "threshold", "expected"),
    [
        ([2.0, 1.9, 2.1, 2.0, 1.95, 2.05, 2.0], 9.0, 5.0, False),  # too few to tell
        ([2.0, 1.9, 2.1, 2.0, 1.95, 2.05, 2.0, 2.0], 9.0, 5.0, True),
        ([2.0, 1.9, 2.1, 2.0, 1.95, 2.05, 2.0, 2.0], 2.15, 5.0, False),
        ([2.0, 1.9, 2.1, 2.0, 1.95, 2.05, 2.0, 2.0], -9.0, 5.0, False),  # a fall is none
        ([2.0] * 8, 2.05, 5.0, False),  # of a spread of nothing everything is a multiple
        ([2.0] * 8, 2.11, 5.0, True),
        ([2.0, 1.9, 2.1, 2.0, 1.95, 2.05, 90.0, 80.0], 9.0, 5.0, True),  # those that were odd before hide nothing
    ],
)
def test_a_spike_lies_apart_from_the_losses_before(
    losses_before: list[float], loss: float, threshold: float, expected: bool
) -> None:
    assert is_spike(losses_before, loss, threshold) is expected


def test_noise_is_no_spike_and_a_jump_is() -> None:
    generator = np.random.default_rng(0)
    losses_before = list(3.0 + 0.2 * generator.standard_normal(50))
    found = [is_spike(losses_before, 3.0 + 0.2 * z, 6.0) for z in generator.standard_normal(10_000)]
    assert sum(found) == 0
    assert is_spike(losses_before, 3.0 + 0.2 * 9, 6.0)


# What becomes of it


def judge_of(tmp_path: Path, rollbacks: list[int], **keys: Any) -> BadSteps:
    def roll_back() -> tuple[int, Numbers] | None:
        rollbacks.append(1)
        return (4, Numbers(losses=(1.0,) * 8)) if keys.get("checkpoint", True) else None

    training = TrainingConfig(**{key: value for key, value in keys.items() if key != "checkpoint"})
    return BadSteps(
        training, tmp_path / "bad_steps.jsonl", lambda step: [f"a.tar/{step}", "b.tar/x"], roll_back, is_main=True
    )


def figures(step: int, loss: float | None, left_out: str | None = None) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": 1.0, "left_out": left_out}


def test_a_step_is_left_out_up_to_so_many_in_a_row(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, [], on_non_finite="skip")
    numbers = Numbers()
    for step in range(1, MOST_SKIPPED_IN_A_ROW + 1):
        _, numbers = judge.judge(figures(step, None, "loss"), numbers)
    _, numbers = judge.judge(figures(50, 2.0), numbers)
    assert numbers.skipped_in_a_row == 0
    with pytest.raises(RunStoppedError, match=f"for the {MOST_SKIPPED_IN_A_ROW + 1}th time in a row"):
        for step in range(51, 52 + MOST_SKIPPED_IN_A_ROW):
            _, numbers = judge.judge(figures(step, 2.0, "gradient"), numbers)
    told = lines(tmp_path / "bad_steps.jsonl")
    assert len(told) == 2 * MOST_SKIPPED_IN_A_ROW + 1
    assert told[0] == {
        "step": 1,
        "what": "loss",
        "action": "skip",
        "loss": None,
        "grad_norm": 1.0,
        "keys": ["a.tar/0", "b.tar/x"],
    }


def test_a_run_that_is_to_stop_stops_with_the_keys(tmp_path: Path) -> None:
    with pytest.raises(
        RunStoppedError,
        match=r"step 7: the gradient is not finite \(the loss is 2\.0000\), so .* names: a\.tar/6 b\.tar/x",
    ):
        judge_of(tmp_path, []).judge(figures(7, 2.0, "gradient"), Numbers())
    assert lines(tmp_path / "bad_steps.jsonl")[0]["action"] == "stop"


def test_a_spike_rolls_back_a_few_times_and_then_stops(tmp_path: Path) -> None:
    rollbacks: list[int] = []
    judge = judge_of(tmp_path, rollbacks, loss_spike_threshold=5.0)
    numbers = Numbers(losses=(1.0,) * 8)
    told, numbers = judge.judge(figures(7, 9.0), numbers)
    assert told["rolled_back_to"] == 4
    assert (numbers.rollbacks, numbers.rolled_back_at, len(numbers.losses)) == (1, 7, 8)
    told, numbers = judge.judge(figures(9, 9.0), numbers)
    # Steps 5 to 7 are told already.
    assert [line["step"] for line in lines(tmp_path / "bad_steps.jsonl")] == [5, 6, 7, 8, 9]
    assert [line["loss"] for line in lines(tmp_path / "bad_steps.jsonl")] == [None, None, 9.0, None, 9.0]
    _, numbers = judge.judge(figures(10, 1.0), numbers)
    assert len(numbers.losses) == 9
    _, numbers = judge.judge(figures(11, 9.0), numbers)
    assert sum(rollbacks) == numbers.rollbacks == MOST_ROLLBACKS
    with pytest.raises(RunStoppedError, match=rf"is a spike over 1\.0000 before it, after {MOST_ROLLBACKS} rollbacks"):
        judge.judge(figures(12, 9.0), numbers)


def test_a_spike_without_a_checkpoint_and_one_that_is_to_stop_end_the_run(tmp_path: Path) -> None:
    numbers = Numbers(losses=(1.0,) * 8)
    with pytest.raises(RunStoppedError, match="there is no checkpoint to go back to; save more often"):
        judge_of(tmp_path, [], loss_spike_threshold=5.0, checkpoint=False).judge(figures(7, 9.0), numbers)
    rollbacks: list[int] = []
    with pytest.raises(RunStoppedError, match=r"is a spike over 1\.0000 before it; lower training\.learning_rate"):
        judge_of(tmp_path, rollbacks, loss_spike_threshold=5.0, on_loss_spike="stop").judge(figures(7, 9.0), numbers)
    assert not rollbacks
    # Nothing is remembered where nobody asks for it.
    assert judge_of(tmp_path, [], on_non_finite="skip").judge(figures(7, 9.0), Numbers())[1] == Numbers()


@pytest.mark.parametrize("keys", [{"on_loss_spike": "stop"}, {"loss_spike_window": 60}])
def test_what_needs_a_threshold_says_so(folder: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(keys))} is set, but loss_spike_threshold is not"):
        run_config(folder, "unused", training=keys)


# In a run, under every strategy


@contextmanager
def broken_steps() -> Iterator[None]:
    """Step 2 has a loss that is not finite, step 3 a gradient, on rank 1 alone."""
    now = [0]
    real_agree, real_loss = CachedStep._agree, CachedStep._loss

    def agree(self: CachedStep, batch: Any, told: Any) -> Any:
        now[0] = batch.step + 1
        return real_agree(self, batch, told)

    def loss(self: CachedStep, *arguments: Any) -> Any:
        outcome = real_loss(self, *arguments)
        if now[0] == 2:
            arguments[4].loss = math.inf
            raise NonFiniteLossError
        return outcome

    def breaking(real: Any) -> Any:
        def backward(self: Any, surrogate: torch.Tensor) -> None:
            real(self, surrogate * (math.inf if now[0] == 3 and dist.get_rank() == 1 else 1.0))

        return backward

    with patch.object(CachedStep, "_agree", agree), patch.object(CachedStep, "_loss", loss), ExitStack() as stack:
        for strategy in (Fsdp2, Replicated, Zero):
            stack.enter_context(patch.object(strategy, "backward", breaking(strategy.backward)))
        yield


def leave_out(rank: int, world_size: int, folder: Path) -> None:
    """Two steps are broken; each strategy trains on as if they had not been taken."""
    world = start_world(run_config(folder, "unused", strategy="zero2"))
    for strategy in STRATEGIES:
        training = {"on_non_finite": "skip", "keep_graphs": 0.5}
        with parameters_split(strategy):
            with broken_steps():
                train_in(world, run_config(folder, strategy, strategy=strategy, training=training))
            if rank == 0:
                jumped(folder / strategy, 1, 3, folder / f"{strategy}-again")
            dist.barrier()
            train_in(world, run_config(folder, f"{strategy}-again", strategy=strategy, training=training), "newest")
    stop_world()


def jumped(run: Path, step: int, to: int, copy: Path) -> None:
    """The slow reference: a run that stands after the steps that were left out, with the weights before them."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name != f"step-{step:08d}":
            shutil.rmtree(path)
    moved = copy / "checkpoints" / f"step-{to:08d}"
    (copy / "checkpoints" / f"step-{step:08d}").rename(moved)
    change_manifest(moved, lambda manifest: manifest["progress"].update(step=to, plan_hash=""))


@pytest.fixture(scope="module")
def left_out(folder: Path) -> Path:
    run_ranks(leave_out, 2, folder)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_is_left_out_changes_nothing(left_out: Path, strategy: str) -> None:
    run, again = left_out / strategy, left_out / f"{strategy}-again"
    saved = [state(run / "checkpoints" / f"step-{number:08d}") for number in (1, 2, 3)]
    assert all(np.array_equal(saved[0][key], later[key]) for key in saved[0] for later in saved[1:])
    metrics = lines(run / "metrics.jsonl")
    assert [line["left_out"] for line in metrics] == [None, "loss", "gradient", None, None, None]
    assert [line["grad_norm"] is None for line in metrics[:4]] == [False, True, True, False]
    assert losses(run)[3:] == losses(again)[3:]
    ends = [state(path / "checkpoints" / "step-00000006") for path in (run, again)]
    assert all(np.array_equal(ends[0][key], ends[1][key]) for key in ends[0])
    told = [(one["step"], one["what"], one["action"], len(one["keys"])) for one in lines(run / "bad_steps.jsonl")]
    assert told == [(2, "loss", "skip", 8), (3, "gradient", "skip", metrics[2]["pairs"])]
    assert json.loads((run / "summary.json").read_text())["left_out"] == 2


def roll_back_in(rank: int, world_size: int, folder: Path) -> None:
    """A spike in step 5, with a checkpoint of step 3: steps 4 and 5 are left out."""
    world = start_world(run_config(folder, "unused", strategy="zero2"))
    spikes: list[bool] = []

    def once(losses: Any, loss: float, threshold: float) -> bool:
        return len(losses) == 4 and bool(spikes and spikes.pop())

    with patch.object(bad_steps, "is_spike", once):
        for strategy in STRATEGIES:
            training = {"loss_spike_threshold": 5.0, "save_steps": 3, "max_steps": 8}
            spikes[:] = [True]
            with parameters_split(strategy):
                train_in(world, run_config(folder, f"{strategy}-spike", strategy=strategy, training=training))
                if rank == 0:
                    jumped(folder / f"{strategy}-spike", 3, 5, folder / f"{strategy}-jump")
                dist.barrier()
                config = run_config(folder, f"{strategy}-jump", strategy=strategy, training=training)
                train_in(world, config, "newest")
    stop_world()


@pytest.fixture(scope="module")
def rolled_back(folder: Path) -> Path:
    run_ranks(roll_back_in, 2, folder)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rollback_goes_on_after_the_spike_with_the_weights_of_the_checkpoint(
    rolled_back: Path, strategy: str
) -> None:
    run, jump = rolled_back / f"{strategy}-spike", rolled_back / f"{strategy}-jump"
    metrics = lines(run / "metrics.jsonl")
    assert [line.get("rolled_back_to") for line in metrics] == [None] * 4 + [3] + [None] * 3
    assert losses(run)[5:] == losses(jump)[5:]
    ends = [state(path / "checkpoints" / "step-00000008") for path in (run, jump)]
    assert all(np.array_equal(ends[0][key], ends[1][key]) for key in ends[0])
    told = lines(run / "bad_steps.jsonl")
    assert [(line["step"], line["action"]) for line in told] == [(4, "rollback"), (5, "rollback")]
    assert json.loads((run / "summary.json").read_text())["rollbacks"] == 1


def test_what_is_remembered_is_saved_with_a_checkpoint(folder: Path) -> None:
    training = {"loss_spike_threshold": 50.0, "max_steps": 2}
    train_in(ALONE, run_config(folder, "remembers", training=training))
    manifest = json.loads((folder / "remembers/checkpoints/step-00000002/manifest.json").read_text())
    remembered = Numbers(**manifest["progress"]["numbers"])
    assert list(remembered.losses) == [loss for _, loss, _ in losses(folder / "remembers")]
    assert replace(remembered, losses=()) == Numbers()
