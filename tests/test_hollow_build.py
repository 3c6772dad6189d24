"""Under zero3 and fsdp2 rank 0 alone reads the weights; the others are sent the same model, tied weights too."""

import multiprocessing
from pathlib import Path
from typing import Any

import exactness
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from farnear.model.embedder import Embedder
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.parallel.collectives import gather_objects
from farnear.parallel.loading import is_on_main_rank_only, partition_one_by_one, send_buffers
from farnear.parallel.strategy import build_strategy
from farnear.parallel.world import start_world, stop_world
from farnear.parallel.zero import deepspeed_config
from farnear.sections import ModelConfig

MIB = 2**20


class Tied(nn.Module):
    """Two layers with one weight, of a shape that no number of ranks divides; a buffer that is in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.arange(7.0), persistent=False)

    def forward(self, features: dict[str, Any]) -> Tensor:
        return self.frozen(self.second(self.first(features["x"]))) + self.shift


def build_tied(rank: int, world_size: int) -> None:
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    torch.manual_seed(3)
    whole = Tied()
    x = torch.ones(2, 7)
    whole({"x": x}).square().sum().backward()
    wanted = {n: p.detach() - p.grad for n, p in whole.named_parameters() if p.grad is not None}
    for name in ("fsdp2", "fsdp2-nodes", "zero3", "zero3-offload"):
        torch.manual_seed(3)
        with torch.device("cpu" if rank == 0 else "meta"):
            module = Tied()
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with exactness.parameters_split(name):
            optimizer = torch.optim.SGD(trainable, lr=1.0)
            strategy = build_strategy(exactness.run_config(name, "unused", 0.0), module, optimizer, world)
        assert module.first.weight is module.second.weight, name
        torch.testing.assert_close(strategy.forward({"x": x}), whole({"x": x}))
        with strategy.accumulate():
            strategy.backward(strategy.forward({"x": x}).square().sum())
        strategy.step(1.0)
        after = strategy.full_weights()
        if rank == 0:
            # What is frozen shows in the embeddings above.
            assert after.keys() == wanted.keys()
            torch.testing.assert_close(after, wanted)
    stop_world()


@pytest.mark.parametrize("world_size", [2, 3])
def test_tied_frozen_and_uneven_parameters_arrive(world_size: int) -> None:
    run_ranks(build_tied, world_size)


def build_large(rank: int, world_size: int, name: str, folder: Path) -> None:
    """Rank 0's peak of resident memory shows the model; rank 1's must not."""
    world = start_world(exactness.run_config("zero2", "unused", 0.0))
    config = ModelConfig(name_or_path=str(folder))
    load_model(config, with_weights=False)  # what libraries load with their first model is as large as this one
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    model = load_model(config, with_weights=world.is_main)
    module = Embedder(model, bf16=False)
    assert is_on_main_rank_only(module, world)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    run = exactness.run_config(name, "unused", 0.0)
    if name == "zero3":
        # DeepSpeed's buffers, made by what follows, would hide a model of this size.
        partition_one_by_one(module, deepspeed_config(run, world_size), world)
        send_buffers(module, world)
        peak = resident("VmHWM") - before
        strategy = None
    else:
        strategy = build_strategy(run, module, optimizer, world)
        peak = resident("VmHWM") - before
    peaks = gather_objects(peak)
    size = sum(parameter.numel() * 4 for parameter in load_model(config).parameters()) / MIB
    assert size > 100
    assert peaks[1] < peaks[0] - 0.6 * size, (peaks, size)
    plain = load_model(config)
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in plain.named_buffers()}
    assert all(torch.equal(buffer, plain.get_buffer(n)) for n, buffer in model.named_buffers())
    if strategy is not None:
        weights = strategy.full_weights()
        assert all(torch.equal(p, weights[f"model.{n}"]) for n, p in plain.named_parameters() if rank == 0)
    stop_world()


def resident(kind: str) -> float:
    """This process's memory in MiB, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    # In a process of its own: the ranks are not forked from here, but the tests after this one run here.
    making = multiprocessing.get_context("forkserver").Process(target=_save_large, args=(folder,))
    making.start()
    making.join()
    return folder


def _save_large(folder: Path) -> None:
    save_tiny_model(folder, texts=["red blue bar"], hidden_size=512, num_layers=4)


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_one_rank_alone_holds_the_model(large: Path, name: str) -> None:
    run_ranks(build_large, 2, name, large)
