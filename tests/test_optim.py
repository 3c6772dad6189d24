"""AdamW in 8 bits: what it needs, and its moments as a checkpoint holds them. The package itself is not run here."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import load_checkpoint, save_checkpoint
from conftest import WriteRunFile
from torch import Tensor, nn

from farnear.config import load_config
from farnear.errors import UserError
from farnear.parallel.eight_bit import is_eight_bit, pack, unpack
from farnear.parallel.replicated import Replicated
from farnear.parallel.strategy import adam_state
from farnear.parallel.world import World
from farnear.sections import TrainingConfig
from farnear.training.optim import build_optimizer
from farnear.training.scale import TrainedState

ALONE = World(0, 1, torch.device("cpu"))
# Of the shape of bitsandbytes' maps: finer near zero; the signed one reaches 1 but not -1.
UNSIGNED = torch.linspace(0, 1, 256) ** 3
SIGNED = torch.cat([-(torch.linspace(0, 1, 129)[1:-1] ** 3), torch.linspace(0, 1, 129) ** 3]).sort().values


@pytest.mark.parametrize("values", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("elements", [5, 256, 5000])
def test_what_was_unpacked_is_packed_to_the_same_numbers(values: Tensor, elements: int) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-elements // 256)
    x = torch.randn(elements, generator=generator) * torch.logspace(-8, 0, elements)
    number_n, factor_b = pack(x if values[0] < 0 else x.abs(), blocks, values)
    once = unpack(number_n, factor_b, values)
    again_n, again_b = pack(once, blocks, values)
    assert torch.equal(again_n, number_n)
    assert torch.allclose(again_b, factor_b, rtol=1e-6)
    assert torch.allclose(unpack(again_n, again_b, values), once, rtol=1e-6, atol=0)
    assert (once - (x if values[0] < 0 else x.abs())).abs().max() < 0.02 * x.abs().max()


def test_a_block_without_elements_of_its_own_stays_zero() -> None:
    number_n, factor_b = pack(torch.zeros(300), 2, SIGNED)
    assert factor_b.tolist() == [0, 0]
    assert unpack(number_n, factor_b, SIGNED).abs().max() == 0
    with pytest.raises(RuntimeError, match="300 elements in 7 blocks"):
        pack(torch.zeros(300), 7, SIGNED)


class Optimizer8bit(torch.optim.Optimizer):
    """Keeps its state as bitsandbytes does; a step of its own kind."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float) -> None:
        super().__init__(params, {"lr": lr})

    def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        assert self.param_groups[gindex]["params"][pindex] is p
        blocks = -(-p.numel() // 256)
        self.state[p] = {"step": 0}
        for number, values in (("1", SIGNED), ("2", UNSIGNED)):
            if p.numel() < 4096:
                self.state[p][f"state{number}"] = torch.zeros(p.shape)
            else:
                self.state[p][f"state{number}"] = torch.zeros(p.shape, dtype=torch.uint8)
                self.state[p] |= {f"qmap{number}": values, f"absmax{number}": torch.zeros(blocks)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for at, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                if not self.state[p]:
                    self.init_state(group, p, at, place)
                state = self.state[p]
                state["step"] += 1
                for number, x in (("1", p.grad), ("2", p.grad.square())):
                    if state[f"state{number}"].dtype == torch.uint8:
                        number_n, factor_b = pack(x.flatten(), len(state[f"absmax{number}"]), state[f"qmap{number}"])
                        state[f"state{number}"] = number_n.view(p.shape)
                        state[f"absmax{number}"] = factor_b
                    else:
                        state[f"state{number}"] = x.clone()


def module_and_strategy(seed: int, steps: int) -> tuple[nn.Module, Optimizer8bit, Replicated]:
    torch.manual_seed(seed)
    module = nn.Linear(80, 60)
    optimizer = Optimizer8bit(module.parameters(), 0.1, (0.9, 0.999), 1e-8)
    strategy = Replicated(module, optimizer, 1.0, ALONE)
    for _ in range(steps):
        with strategy.accumulate():
            strategy.backward(strategy.forward(torch.randn(5, 80)).square().sum())
        strategy.step(0.1)
    return module, optimizer, strategy


def test_a_checkpoint_holds_the_moments_in_fp32_and_they_come_back(tmp_path: Path) -> None:
    module, optimizer, strategy = module_and_strategy(seed=0, steps=2)
    assert is_eight_bit(optimizer)
    assert not is_eight_bit(torch.optim.AdamW(module.parameters()))
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    path = save_checkpoint(tmp_path / "checkpoints", TrainedState(strategy, shapes, None, is_main=True), 2, ALONE)
    other, fresh, target = module_and_strategy(seed=1, steps=0)
    load_checkpoint(path, TrainedState(target, shapes, None, is_main=True), ALONE)
    assert torch.equal(other.weight, module.weight)
    for ours, wanted in zip(other.parameters(), module.parameters(), strict=True):
        assert fresh.state[ours]["step"] == 2
        for key in ("state1", "state2"):
            assert torch.equal(fresh.state[ours][key], optimizer.state[wanted][key]), key
            assert fresh.state[ours][key].dtype == optimizer.state[wanted][key].dtype
    assert fresh.state[other.weight]["state1"].dtype == torch.uint8
    # Any other optimizer goes on from it.
    plain = Replicated(other, torch.optim.AdamW(other.parameters()), 1.0, ALONE)
    load_checkpoint(path, TrainedState(plain, shapes, None, is_main=True), ALONE)
    for ours, wanted in zip(plain.slices(owned=False), strategy.slices(owned=False), strict=True):
        assert torch.equal(ours.exp_avg_n, wanted.exp_avg_n)
        assert torch.equal(ours.exp_avg_sq_n, wanted.exp_avg_sq_n)


def test_it_is_refused_where_it_cannot_work(write_run_file: WriteRunFile) -> None:
    module, training = nn.Linear(2, 2), TrainingConfig(optim="adamw_8bit")
    with pytest.raises(
        UserError, match=r"needs bitsandbytes, which is not installed here; pip install bitsandbytes, or"
    ):
        build_optimizer(module, training)
    package, part = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    part.AdamW8bit = Optimizer8bit  # type: ignore[attr-defined]
    with (
        patch.dict(sys.modules, {"bitsandbytes": package, "bitsandbytes.optim": part}),
        pytest.raises(UserError, match=r"needs an NVIDIA GPU, and this run is on cpu; set adamw_torch"),
    ):
        build_optimizer(module, training)
    assert isinstance(build_optimizer(module, TrainingConfig()), torch.optim.AdamW)
    with pytest.raises(UserError, match=r"adamw_8bit works under single and ddp; zero2 cuts the moments across"):
        load_config(write_run_file(strategy="zero2"), ["training.optim=adamw_8bit"])


def test_a_step_count_made_for_a_checkpoint_is_where_the_optimizer_keeps_it() -> None:
    # torch's fused AdamW fails on a GPU when it is not on the parameter's device.
    for device in ("cpu", "meta"):
        module = nn.Linear(2, 2, device=device)
        state = adam_state(build_optimizer(module, TrainingConfig()), module.weight)
        assert state["step"].device.type == device


def test_a_table_that_is_looked_up_has_gradients_of_rows_and_a_dense_sum() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(50, 4)
    wanted = table.weight.detach().clone().requires_grad_()
    strategy = Replicated(table, torch.optim.SGD(table.parameters(), lr=1.0), 0.0, ALONE)
    sparse: list[bool] = []
    table.weight.register_hook(lambda gradient: sparse.append(gradient.is_sparse))
    turns = [torch.tensor([1, 2, 2]), torch.tensor([2, 49])]
    with strategy.accumulate():
        for rows in turns:
            strategy.backward(strategy.forward(rows).square().sum())
    sum((wanted[rows].square().sum() for rows in turns), torch.zeros(())).backward()
    assert sparse == [True, True]
    assert not table.sparse  # whoever has the module besides finds it as it was
    assert table.weight.grad is not None and not table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad, wanted.grad)
