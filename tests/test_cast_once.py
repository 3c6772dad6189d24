"""Casting the weights once for a pass changes nothing but the number of casts."""

from functools import partial
from pathlib import Path
from typing import Any

import exactness
import pytest
import torch
from exactness import CPU, SEED, Case, make_batch, rank_batch
from torch.utils._python_dispatch import TorchDispatchMode

from farnear.model.embedder import Embedder
from farnear.model.tiny import save_tiny_model
from farnear.model.trainable import store_frozen_in
from farnear.parallel.world import World
from farnear.training.cache import CachedStep
from farnear.training.engine import casts_kept
from farnear.training.step import StepFigures

ALONE = World(0, 1, CPU)


class CastsOfWeights(TorchDispatchMode):
    """Counts casts of fp32 matrices to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += isinstance(args[0], torch.nn.Parameter)
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base", hidden_size=64, num_layers=2)


def gradients(base: Path, case: Case, *, stored: bool = False, **options: Any) -> tuple[dict[str, torch.Tensor], int]:
    model = exactness.prepared_model(str(base), case)
    if stored:
        store_frozen_in(torch.bfloat16, model)
    batch = rank_batch(case, make_batch(case, 1), model, ALONE)
    module = Embedder(model, bf16=True)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    strategy = exactness.build_strategy(exactness.run_config("ddp", "unused", 0.0), module, optimizer, ALONE)
    step = CachedStep(strategy, ALONE, case.loss, SEED, keep_graphs=case.keep_graphs, **options)
    with CastsOfWeights() as casts:
        step.gradient(batch, StepFigures(), scale=20.0)
    return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}, casts.count


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", mini_batch_size=1),
        Case("half_kept", mini_batch_size=1, keep_graphs=0.5),
        Case("frozen", mini_batch_size=1, keep_graphs=0.5, freeze=("visual",)),
        Case("lora", mini_batch_size=1, lora=True),
    ],
)
def test_the_gradient_is_the_same_to_the_last_bit(base: Path, case: Case) -> None:
    expected, often = gradients(base, case)
    mine, once = gradients(base, case, stored=True, cast_once=partial(torch.autocast, "cpu", torch.bfloat16))
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert 0 < once < often / 2


@pytest.mark.parametrize(
    ("strategy", "bf16", "kept"), [("ddp", True, True), ("ddp", False, False), ("zero3", True, False)]
)
def test_casts_are_kept_where_every_rank_has_all_weights(strategy: str, bf16: bool, kept: bool) -> None:
    config = exactness.run_config(strategy, "unused", 1.0)
    config = config.model_copy(update={"training": config.training.model_copy(update={"bf16": bf16})})
    context = casts_kept(config, ALONE)
    with context():
        assert torch.is_autocast_enabled("cpu") == kept


def test_only_what_autocast_would_cast_is_stored_in_its_type(base: Path) -> None:
    model = exactness.prepared_model(str(base), Case("frozen", freeze=("visual", "embed_tokens")))
    store_frozen_in(torch.bfloat16, model)
    types = {name: p.dtype for name, p in model.named_parameters()}
    halves = {name for name, dtype in types.items() if dtype is torch.bfloat16}
    assert halves and all(".visual." in name for name in halves)
    assert any(name.endswith("patch_embed.proj.weight") for name in halves)
    assert not any("norm" in name or "embed_tokens" in name or "pos_embed" in name for name in halves)
    assert all(not p.requires_grad for name, p in model.named_parameters() if name in halves)
