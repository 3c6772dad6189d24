"""Outputs of frozen parts: kept once, given back once, and only where no gradient passes."""

from pathlib import Path
from typing import Any

import exactness
import pytest
import torch
from exactness import CPU, SEED, Case, make_batch, rank_batch
from torch import nn

from farnear.model.embedder import Embedder
from farnear.model.frozen import FrozenOutputs, frozen_parts, has_dropout
from farnear.model.tiny import save_tiny_model
from farnear.parallel.world import World
from farnear.training.cache import CachedStep
from farnear.training.step import StepFigures


class Tower(nn.Module):
    """A part with two layers that counts how often it is computed."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        hidden = self.drop(self.first(x))
        return {"last": self.second(hidden), "deep": hidden}


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.below, self.tower, self.head = nn.Linear(4, 4), Tower(dropout), nn.Linear(4, 3)
        self.drop = nn.Dropout(dropout)
        self.tower.requires_grad_(False)

    def forward(self, x: torch.Tensor, through_below: bool = False) -> torch.Tensor:
        out = self.tower(self.below(x) if through_below else x)
        return self.head(self.drop(out["last"]) + out["deep"])


def test_an_output_is_computed_once_and_the_gradient_is_the_same() -> None:
    model, x = Model(), torch.randn(5, 4)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.head.parameters() if p.grad is not None]
    model.zero_grad()
    kept = FrozenOutputs(model, 1000)
    model.tower.calls = 0
    with torch.no_grad(), kept.recording(0):
        first = model(x)
    with kept.replaying(0):
        second = model(x)
    assert model.tower.calls == 1
    assert kept.kept_bytes == 2 * 5 * 4 * 4
    assert torch.equal(first, second)
    second.sum().backward()
    for mine, wanted in zip((p.grad for p in model.head.parameters()), expected, strict=True):
        assert mine is not None and torch.equal(mine, wanted)
    # Given back once: what is asked for again is computed again, and outside of a step nothing is kept.
    with kept.replaying(0):
        model(x)
    model(x)
    assert model.tower.calls == 3


def test_a_part_that_a_gradient_passes_is_left_alone() -> None:
    model, x = Model(), torch.randn(5, 4)
    kept = FrozenOutputs(model, 1000)
    assert kept.names == {"tower"}
    with torch.no_grad(), kept.recording(0):
        model(x, through_below=True)
    with kept.replaying(0):
        model(x, through_below=True).sum().backward()
    assert model.below.weight.grad is not None and model.below.weight.grad.any()
    assert kept.names == set()


def test_what_does_not_fit_is_computed_again_and_nothing_after_it_is_kept() -> None:
    model, large, small = Model(), torch.randn(50, 4), torch.randn(1, 4)
    kept = FrozenOutputs(model, 200)
    with torch.no_grad():
        for turn, x in enumerate((small, large, small)):
            with kept.recording(turn):
                model(x)
    assert kept.kept_bytes == 32
    model.tower.calls = 0
    for turn, x in enumerate((small, large, small)):
        with kept.replaying(turn):
            assert torch.equal(model(x), Model.forward(model, x))
    assert model.tower.calls == 2 + 3
    kept.forget()
    assert kept.kept_bytes == 0


def test_a_part_that_draws_is_computed_again_for_what_follows_draws_too() -> None:
    model = Model(dropout=0.5)
    assert has_dropout(model) and has_dropout(model.tower) and not has_dropout(Model())
    assert FrozenOutputs(model, 1000).names == set()
    # Dropout that only the configuration tells of counts too.
    quiet = Tower()
    quiet.config = type("Config", (), {})()
    quiet.config.attention_dropout = 0.1
    assert has_dropout(quiet)


def test_a_mini_batch_is_kept_whole_or_not_at_all() -> None:
    class Twice(Model):
        def forward(self, x: torch.Tensor, through_below: bool = False) -> torch.Tensor:
            return super().forward(x) + super().forward(2 * x)

    model, x = Twice(), torch.randn(1, 4)
    kept = FrozenOutputs(model, 3 * 32)
    with torch.no_grad():
        for turn in range(3):
            with kept.recording(turn):
                model(x)
    assert kept.kept_turns == 1  # of the second, half would have fitted


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base", hidden_size=64, num_layers=2)


def test_of_a_frozen_vision_tower_each_page_is_computed_once_a_step(base: Path) -> None:
    case = Case("frozen", pairs=6, mini_batch_size=2, freeze=("visual",))
    model = exactness.prepared_model(str(base), case)
    assert [name.rsplit(".", 1)[-1] for name, _ in frozen_parts(model)] == ["visual"]
    batch = rank_batch(case, make_batch(case, 1), model, World(0, 1, CPU))
    module = Embedder(model, bf16=False)
    visual: Any = model[0].model.visual
    calls = []
    original = visual.forward
    visual.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    frozen = FrozenOutputs(module, 1 << 30)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    strategy = exactness.build_strategy(exactness.run_config("ddp", "unused", 0.0), module, optimizer, World(0, 1, CPU))
    step = CachedStep(strategy, World(0, 1, CPU), case.loss, SEED, frozen=frozen)
    figures = StepFigures()
    step.gradient(batch, figures, scale=20.0)
    calls.clear()
    step.gradient(batch, figures, scale=20.0)
    assert len(calls) == 3
    # 6 pages of 4 tokens: what the tower gives and one layer of deepstack features, 64 wide in fp32.
    assert figures.frozen_bytes >= 6 * 4 * 2 * 64 * 4


def test_a_wholly_frozen_side_takes_no_second_pass(base: Path) -> None:
    case = Case("frozen", pairs=4, freeze=("visual",))
    model = exactness.prepared_model(str(base), case)

    class PagesFrozen(Embedder):
        def forward(self, features: Any) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            e_nD = super().forward(features)
            return e_nD.detach() if "pixel_values" in features else e_nD

    forwards = 0
    module = PagesFrozen(model, bf16=False)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    strategy = exactness.build_strategy(exactness.run_config("ddp", "unused", 0.0), module, optimizer, World(0, 1, CPU))
    step = CachedStep(strategy, World(0, 1, CPU), case.loss, SEED, keep_graphs=0.5)
    batch = rank_batch(case, make_batch(case, 1), model, World(0, 1, CPU))
    step.gradient(batch, StepFigures(), scale=20.0)
    forwards = 0
    figures = StepFigures()
    step.gradient(batch, figures, scale=20.0)
    # Two mini-batches of pages, once each; two of queries, of which one keeps its graph and the other is taken twice.
    assert (forwards, figures.kept_graphs) == (5, 1)
