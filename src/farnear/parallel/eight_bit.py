"""Moments that the optimizer keeps in 8 bits, as a checkpoint sees them: fp32.

bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861) cuts a moment into blocks, and stores for each element the number
of one of 256 values between -1 and 1, and for each block the factor that they are multiplied by. A checkpoint holds the
products, which are what the optimizer computes with, so that any other optimizer and strategy can go on from them.

The way back finds the same numbers again: the largest element of a block was stored as the largest value of its sign,
which leaves two possible factors, and the one that reproduces the block is taken. A factor may differ in its last bit,
so that a resumed run is not bit for bit the one that was not interrupted.

CI has neither bitsandbytes nor a GPU: it tests `unpack` and `pack`, and the rest on a stand-in whose state has the
names that bitsandbytes' source gives it (``Optimizer2State`` in its optim/optimizer.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Elements in a block, in the versions of bitsandbytes that there are.
BLOCK_SIZES = (256, 2048)
KINDS = (("exp_avg", "1"), ("exp_avg_sq", "2"))


def is_eight_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of bitsandbytes'."""
    return any(kind.__name__ == "Optimizer8bit" for kind in type(optimizer).__mro__)


def read_moments(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """``exp_avg``, ``exp_avg_sq`` (fp32, on the CPU, of the parameter's shape) and ``step``, copied."""
    state = _state_of(optimizer, parameter)
    moments = {"step": torch.tensor(float(state["step"]))}
    for kind, number in KINDS:
        stored = state[f"state{number}"].cpu()
        if stored.dtype == torch.uint8:  # small parameters are kept in fp32
            value_256, factor_b = state[f"qmap{number}"].cpu(), state[f"absmax{number}"].cpu()
            stored = unpack(stored.flatten(), factor_b, value_256).view(parameter.shape)
        moments[kind] = stored.float().clone()
    return moments


def write_moments(optimizer: Any, parameter: Tensor, moments: dict[str, Tensor]) -> None:
    """Bring the optimizer's state to what `read_moments` would give."""
    state = _state_of(optimizer, parameter)
    state["step"] = int(moments["step"])
    for kind, number in KINDS:
        target = state[f"state{number}"]
        if target.dtype == torch.uint8:
            factor_b = state[f"absmax{number}"]
            number_n, factor = pack(moments[kind].flatten(), len(factor_b), state[f"qmap{number}"].cpu())
            target.copy_(number_n.view(target.shape))
            factor_b.copy_(factor)
        else:
            target.copy_(moments[kind].view(target.shape))


def unpack(number_n: Tensor, factor_b: Tensor, value_256: Tensor) -> Tensor:
    """The n elements that are meant by their numbers.

    Args:
        number_n: uint8 places in ``value_256``.
        factor_b: Of each block.
    """
    factor_n = factor_b.repeat_interleave(_block_size(len(number_n), len(factor_b)))[: len(number_n)]
    return value_256[number_n.long()] * factor_n


def pack(x_n: Tensor, blocks: int, value_256: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (uint8, [n]) and factors ([blocks]) that come nearest to the elements.

    Args:
        value_256: Ascending, between -1 and 1; 1 is one of them, -1 may not be.
    """
    size = _block_size(len(x_n), blocks)
    x_bs = pad(x_n, (0, blocks * size - len(x_n))).view(blocks, size)
    middle_255 = (value_256[1:] + value_256[:-1]) / 2
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factor_b in (x_bs.abs().amax(1), x_bs.amin(1) / value_256.min().clamp(max=-1e-3)):
        divisor_b1 = torch.where(factor_b > 0, factor_b, 1.0)[:, None]
        number_bs = torch.bucketize(x_bs / divisor_b1, middle_255)
        error_b = (value_256[number_bs] * factor_b[:, None] - x_bs).square().sum(1)
        if best is None:
            best = number_bs, factor_b, error_b
        else:
            is_better_b = error_b < best[2]
            best = (
                torch.where(is_better_b[:, None], number_bs, best[0]),
                torch.where(is_better_b, factor_b, best[1]),
                torch.where(is_better_b, error_b, best[2]),
            )
    assert best is not None
    return best[0].flatten()[: len(x_n)].to(torch.uint8), best[1]


def _block_size(elements: int, blocks: int) -> int:
    for size in BLOCK_SIZES:
        if -(-elements // size) == blocks:
            return size
    raise RuntimeError(f"the 8-bit optimizer keeps {elements} elements in {blocks} blocks, of a size that is not known")


def _state_of(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    """Made as the optimizer's first step makes it, where no step has been taken yet."""
    if not optimizer.state[parameter]:
        for at_group, group in enumerate(optimizer.param_groups):
            for place, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    optimizer.init_state(group, parameter, at_group, place)
    state: dict[str, Any] = optimizer.state[parameter]
    return state
