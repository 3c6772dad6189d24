"""A slice of benchmarks/exactness.py: the distributed cached gradient is the plain one, and a wrong scale is seen."""

from typing import Any

import exactness
import pytest
import torch
from ranks import run_ranks
from torch import nn

from farnear.parallel.strategy import NonFiniteGradientError, build_strategy
from farnear.parallel.world import start_world, stop_world


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return exactness.run((1, 2), small=True)


@pytest.mark.parametrize("strategy", exactness.STRATEGIES)
def test_the_gradient_is_the_plain_one(results: list[dict[str, Any]], strategy: str) -> None:
    mine = [row for row in results if row["strategy"] == strategy]
    summary = exactness.summarise(mine)
    assert summary["cases"] == sum(map(len, exactness.SLICE.values()))
    assert summary["worst_relative_error"] <= exactness.BOUND_FP32
    assert summary["worst_relative_error_bf16"] <= exactness.BOUND_BF16
    assert summary["worst_relative_error_fp16"] <= exactness.BOUND_FP16
    assert summary["worst_relative_error_adamw"] <= exactness.BOUND_ADAMW
    # FSDP2 pads rows that no number of ranks divides.
    assert summary["reductions_per_step"] == pytest.approx({strategy: 1.0}, abs=0.01)


@pytest.mark.parametrize("variant", exactness.VARIANTS)
def test_the_gradient_of_a_variant_is_the_plain_one(results: list[dict[str, Any]], variant: str) -> None:
    mine = [row for row in results if row["strategy"] == variant]
    assert {(row["world_size"], row["case"]) for row in mine} == {(2, case) for case in exactness.SLICE_OF_VARIANTS}
    assert max(row["error"] for row in mine) <= exactness.BOUND_FP32
    # Gradients that are to stay partitioned meet after each of the mini-batches, as far as they are used in it.
    passes = exactness.summarise(mine)["reductions_per_step"][variant]
    assert passes > 1.5 if variant.endswith("mini_batch") else passes <= 1.01


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_parameters_that_are_kept_are_gathered_once(results: list[dict[str, Any]], strategy: str) -> None:
    def gathers(name: str) -> list[float]:
        of_case = [row for row in results if row["case"] in exactness.SLICE_OF_VARIANTS and row["world_size"] == 2]
        return [row["reductions"]["gathers"] for row in of_case if row["strategy"] == name]

    assert min(gathers(strategy)) > 5
    assert max(gathers(f"{strategy}-reshard_step")) < 1.1


def test_a_wrong_factor_would_be_seen() -> None:
    reference = {"w": torch.tensor([1.0, -2.0, 3.0])}
    assert exactness.relative_error({"w": 2 * reference["w"]}, reference) == pytest.approx(1.0)
    assert exactness.relative_error({"w": reference["w"] * (1 + 2e-5)}, reference) > exactness.BOUND_FP32
    # A parameter that the reference never touched must not move.
    assert exactness.relative_error({**reference, "v": torch.ones(1)}, reference) > 0.1


def one_bad_gradient(rank: int, world_size: int) -> None:
    """Rank 1 alone has an infinite gradient: every rank must stop, with its weights as they were."""
    world = start_world(exactness.run_config("zero2", "unused", 1.0))
    for name in (*exactness.STRATEGIES, *exactness.VARIANTS):
        module = exactness.Injected()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        with exactness.parameters_split(name):
            strategy = build_strategy(exactness.run_config(name, "unused", 1.0), module, optimizer, world)
        before = strategy.full_weights()
        bad = float("inf") if rank == 1 else 1.0
        gradients = [torch.full(shape, bad) for shape in ((171, 7), (3,), (4, 2, 3))]
        with strategy.accumulate():
            strategy.backward(strategy.forward({"gradients": gradients}))
        with pytest.raises(NonFiniteGradientError):
            strategy.step(0.1)
        after = strategy.full_weights()
        assert all(torch.equal(after[parameter], before[parameter]) for parameter in before)
    stop_world()


def test_a_non_finite_gradient_of_one_rank_stops_all() -> None:
    run_ranks(one_bad_gradient, 2)


class TwoTowers(nn.Module):
    """Like a model whose last mini-batch leaves out the vision tower."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(3, 512), nn.Linear(3, 512)

    def forward(self, features: dict[str, Any]) -> torch.Tensor:
        tower = self.image if features["image"] else self.text
        return tower(features["x"])


def step_without_images(rank: int, world_size: int) -> None:
    """A step with images, then one without: the image tower must see a zero gradient, not the last step's."""
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    for name in (*exactness.STRATEGIES, *exactness.VARIANTS):
        module = TwoTowers()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        with exactness.parameters_split(name):
            strategy = build_strategy(exactness.run_config(name, "unused", 0.0), module, optimizer, world)
        snapshots = []
        for image in (True, False):
            with strategy.accumulate():
                strategy.backward(strategy.forward({"image": image, "x": torch.ones(2, 3)}).sum())
            strategy.step(1.0)
            snapshots.append(strategy.full_weights())
        if rank == 0:
            assert torch.equal(snapshots[0]["image.weight"], snapshots[1]["image.weight"]), name
            assert not torch.equal(snapshots[0]["text.weight"], snapshots[1]["text.weight"]), name
    stop_world()


def test_a_tower_that_was_not_used_keeps_its_weights() -> None:
    run_ranks(step_without_images, 2)
