"""What every strategy owes the cached step, on a small module with two towers: backwards in any order, any of them
without a tower, parameters that some or all ranks never use, unequal slices.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import exactness
import numpy as np
import pytest
import torch
from checkpoints import load_checkpoint, save_checkpoint
from ranks import run_ranks
from test_resume import state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farnear.errors import UserError
from farnear.parallel.fsdp2 import shard_mesh
from farnear.parallel.loss_scale import GOOD_STEPS_TO_DOUBLE
from farnear.parallel.strategy import LossScale, NonFiniteGradientError, Strategy, build_strategy
from farnear.parallel.world import World, start_world, stop_world
from farnear.training.scale import TrainedState

TURNS = 8
KEPT = range(4, TURNS)
WIDTH = 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def forward(self, x_nD: Tensor) -> Tensor:
        return x_nD + self.outer(self.inner(x_nD).tanh())


class Towers(nn.Module):
    """Like a vision-language model: images pass both towers, texts one; `rare` is used where the features say so."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.text = nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())
        self.rare, self.never = nn.Parameter(torch.ones(3, WIDTH)), nn.Linear(WIDTH, 3)

    def forward(self, features: dict[str, Any]) -> Tensor:
        x_nD = self.vision(features["x"]) if features["image"] else features["x"]
        if features["rare"]:
            x_nD = x_nD * self.rare.sum(0)
        for block in self.text:
            # As transformers does it under gradient_checkpointing.
            x_nD = checkpoint(block, x_nD, use_reentrant=False) if features["image"] else block(x_nD)
        return x_nD


def turns_of(rank: int, name: str) -> list[dict[str, Any]]:
    """The mini-batches of a rank; those of rank r hold r + 1 rows, and the last one to be run backward is a text."""
    generator = torch.Generator().manual_seed(rank)
    # DeepSpeed reduces in the order of the backward, which must then be the same everywhere.
    uses_rare = rank == 0 or (name.startswith("zero") and name.endswith("mini_batch"))
    return [
        {"x": torch.randn(rank + 1, WIDTH, generator=generator), "image": i % 4 < 2, "rare": uses_rare and i == 5}
        for i in range(TURNS)
    ]


def plain_gradient(world_size: int, name: str) -> dict[str, Tensor]:
    module = Towers()
    for rank in range(world_size):
        for features in turns_of(rank, name):
            (module(features).square().sum() / world_size).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}


def run_kept_first(strategy: Strategy, turns: list[dict[str, Any]]) -> None:
    """Pass one keeps the graphs of the last mini-batches; pass two runs those backward first."""
    kept = {}
    for i, features in enumerate(turns):
        with torch.set_grad_enabled(i in KEPT):
            kept[i] = strategy.forward(features)
    with strategy.accumulate():
        for i in KEPT:
            strategy.backward(kept.pop(i).square().sum())
        for i in range(KEPT.start):
            strategy.backward(strategy.forward(turns[i]).square().sum())


def gradients_in_any_order(rank: int, world_size: int, names: Iterable[str]) -> None:
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    for name in names:
        wanted = plain_gradient(world_size, name)
        strategy, before = towers_under(name, world)
        # The second step must not find anything of the first.
        with strategy.accumulate():
            strategy.backward(strategy.forward({**turns_of(rank, name)[0], "rare": True}).sum() * 1e3)
        strategy.step(0.0)
        run_kept_first(strategy, turns_of(rank, name))
        strategy.step(1.0)
        after = strategy.full_weights()
        if rank == 0:
            error = exactness.relative_error({n: before[n] - after[n] for n in after}, wanted)
            assert error < 1e-5, (name, error)
            assert torch.equal(before["never.weight"], after["never.weight"])
    stop_world()


def towers_under(
    name: str, world: World, optimizer_class: type[torch.optim.Optimizer] = torch.optim.SGD, **options: float
) -> tuple[Strategy, dict[str, Tensor]]:
    module = Towers()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = optimizer_class(module.parameters(), **{"lr": 1.0, **options})
    with exactness.parameters_split(name):
        return build_strategy(exactness.run_config(name, "unused", 0.0), module, optimizer, world), before


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_add_up_in_any_order(world_size: int) -> None:
    run_ranks(gradients_in_any_order, world_size, (*exactness.STRATEGIES, *exactness.VARIANTS))


def test_two_nodes_of_two_ranks_hold_a_copy_each() -> None:
    run_ranks(gradients_in_any_order, 4, ("fsdp2-nodes",))


def nodes_of_unequal_size(rank: int, world_size: int) -> None:
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    with pytest.raises(UserError, match=r"equally many ranks on each node.* the ranks were told 2, 2, 1; start"):
        shard_mesh(exactness.run_config("fsdp2-nodes", "unused", 0.0), world, {"LOCAL_WORLD_SIZE": "221"[rank]})
    with pytest.raises(UserError, match=r"the ranks were told nothing, nothing, nothing; .* or set shard_within=world"):
        shard_mesh(exactness.run_config("fsdp2-nodes", "unused", 0.0), world, {})
    stop_world()


def test_nodes_of_unequal_size_are_refused() -> None:
    run_ranks(nodes_of_unequal_size, 3)


class InHalf(nn.Module):
    """fp16 as `Embedder` does it."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers()

    def forward(self, features: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.towers(features)


def steps_in_half(rank: int, world_size: int, names: Iterable[str]) -> None:
    """Rank 1 alone overflows, until the scale is small enough for it."""
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    reference = InHalf()
    for r in range(world_size):
        (100 * reference(turns_of(r, "ddp")[0]).sum() * (r + 1) / world_size).backward()
    gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
    norm = float(torch.stack([g.norm() for g in gradient.values()]).norm())
    skipped = set()
    for name in names:
        module = InHalf()
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        config = exactness.run_config(name, "unused", norm / 2, fp16=True)
        with exactness.parameters_split(name):
            strategy = build_strategy(config, module, optimizer, world)
        norms = [float("nan")]
        while math.isnan(norms[-1]):
            assert all(torch.equal(w, before[n]) for n, w in strategy.full_weights().items()), name
            with strategy.accumulate():
                surrogate = 100 * strategy.forward(turns_of(rank, "ddp")[0]).float().sum() * (rank + 1)
                strategy.backward(surrogate)
            norms.append(strategy.step(1.0))
        now = strategy.loss_scale
        assert now == LossScale(2.0 ** (16 - now.skipped), 1, len(norms) - 2)
        assert norms[-1] == pytest.approx(norm, rel=1e-2), name
        skipped.add(now.skipped)
        after = strategy.full_weights()
        if rank == 0:
            wanted = {n: 0.5 * g for n, g in gradient.items()}
            assert exactness.relative_error({n: before[n] - after[n] for n in after}, wanted) < 1e-2, name
        strategy.loss_scale = LossScale(1.0, GOOD_STEPS_TO_DOUBLE - 1, 3)
        # The last one is a text: the vision tower's overflow of the step before is forgotten.
        for turn, x, scale in (
            (0, 1.0, LossScale(2.0, 0, 3)),
            (0, float("inf"), LossScale(1.0, 0, 4)),
            (2, 1.0, LossScale(1.0, 1, 4)),
        ):
            with strategy.accumulate():
                strategy.backward(strategy.forward(turns_of(rank, "ddp")[turn]).float().sum() * x)
            strategy.step(0.0)
            assert strategy.loss_scale == scale, name
        with strategy.accumulate():
            strategy.backward(strategy.forward(turns_of(rank, "ddp")[0]).float().sum() * float("inf"))
        with pytest.raises(NonFiniteGradientError):
            strategy.step(0.0)
    assert len(skipped) == 1
    assert min(skipped) > 1
    stop_world()


def test_fp16_skips_what_overflows_and_halves_the_scale() -> None:
    run_ranks(steps_in_half, 2, (*exactness.STRATEGIES, *exactness.VARIANTS))


def decay_of_the_unused(rank: int, world_size: int, names: Iterable[str]) -> None:
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    for name in names:
        strategy, before = towers_under(name, world, torch.optim.AdamW, weight_decay=0.5)
        with strategy.accumulate():
            strategy.backward(strategy.forward(turns_of(rank, name)[0]).sum())
        strategy.step(0.1)
        after = strategy.full_weights()
        if rank == 0:
            torch.testing.assert_close(after["never.weight"], before["never.weight"] * (1 - 0.1 * 0.5))
    stop_world()


def test_a_parameter_without_gradient_has_a_zero_one() -> None:
    run_ranks(decay_of_the_unused, 2, (*exactness.STRATEGIES, *exactness.VARIANTS))


def pass_on(rank: int, world_size: int, names: Iterable[str], folder: Path) -> None:
    """Two AdamW steps under the first strategy; each one then loads what the one before saved, and saves it."""
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    shapes = {name: parameter.shape for name, parameter in Towers().named_parameters()}
    checkpoints = [folder / name / "checkpoints" for name in names]
    for i, name in enumerate(names):
        strategy, _ = towers_under(name, world, torch.optim.AdamW)
        if i == 0:
            for _ in range(2):
                run_kept_first(strategy, turns_of(rank, name))
                strategy.step(0.1)
        else:
            state = TrainedState(strategy, shapes, None, is_main=world.is_main)
            load_checkpoint(checkpoints[i - 1] / "step-00000002", state, world)
        save_checkpoint(checkpoints[i], TrainedState(strategy, shapes, None, is_main=world.is_main), 2, world)
    stop_world()


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, ("fsdp2", "zero2", "fsdp2-nodes", "ddp", "zero3", "zero1")),
        (4, ("fsdp2-nodes", "ddp", "fsdp2")),
    ],
)
def test_a_checkpoint_of_one_is_a_checkpoint_of_all(tmp_path: Path, world_size: int, names: tuple[str, ...]) -> None:
    run_ranks(pass_on, world_size, names, tmp_path)
    first, *others = [state(tmp_path / name / "checkpoints" / "step-00000002") for name in names]
    assert all(np.abs(moment).sum() > 0 for key, moment in first.items() if "exp_avg" in key and "never" not in key)
    for name, other in zip(names[1:], others, strict=True):
        assert other.keys() == first.keys()
        assert all(np.array_equal(other[key], first[key]) for key in first), name
