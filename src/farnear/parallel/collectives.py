"""What the ranks tell each other, and the one place where the scale of a distributed gradient is decided.

The objective is the mean of the losses of all valid rows of the global batch. Three factors make the distributed
gradient equal to its gradient, whatever W is and however unevenly rows or valid rows lie on the ranks:

1. a rank sums its rows' losses and divides the sum by ``(valid rows of the global batch) / W`` (`rank_loss_divisor`);
2. the backward of `gather_rows` **sums** over ranks what each rank's loss says about a row, and hands the sum to the
   rank that owns the row;
3. the strategy **averages** the parameter gradients over ranks.

A rank's parameter gradient then is W times its part of the wanted one, and the average of those over W ranks is their
sum over W times W: the wanted one. A rank without valid rows contributes a zero loss, but its columns still receive
gradient through (2). `benchmarks/exactness.py` compares with a single process; a factor W put in anywhere turns it red.

Without a process group (strategy single) every function is the identity of one rank.

Shapes: n rows of this rank, N rows of all ranks in rank order, D columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_loss_divisor(valid_rows: int, device: torch.device) -> float:
    """What a rank divides the sum of its rows' losses by: the valid rows of all ranks over W (factor 1 above)."""
    total = int(all_reduce_sum(torch.tensor([valid_rows], dtype=torch.int64, device=device)).item())
    return max(total, 1) / world_size()


def gather_rows(x_nD: Tensor) -> tuple[Tensor, int]:
    """Rows of every rank, in rank order, and where this rank's begin. Differentiable (factor 2 above).

    Args:
        x_nD: This rank's rows; n may differ between ranks. One dimension is accepted too.

    Returns:
        ``(x_ND, offset)``. The backward sums the gradients of all ranks for this rank's rows.
    """
    if world_size() == 1:
        return x_nD, 0
    rows_of_rank = gather_ints(x_nD.shape[0], x_nD.device)
    offset = sum(rows_of_rank[: dist.get_rank()])
    return _GatherRows.apply(x_nD, rows_of_rank, offset), offset


def gather_ints(value: int, device: torch.device) -> list[int]:
    """One integer of each rank, in rank order."""
    if world_size() == 1:
        return [value]
    values_W = torch.zeros(world_size(), dtype=torch.int64, device=device)
    values_W[dist.get_rank()] = value
    return [int(number) for number in all_reduce_sum(values_W)]


def gather_values(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """A few numbers of each rank, in rank order."""
    values_Wn = torch.zeros((world_size(), len(values)), dtype=torch.float64, device=device)
    values_Wn[dist.get_rank() if world_size() > 1 else 0] = torch.tensor(values, dtype=torch.float64)
    of_rank: list[list[float]] = all_reduce_sum(values_Wn).tolist()
    return of_rank


def gather_objects(value: Any) -> list[Any]:
    """One small picklable object of each rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place; returns ``x``."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def agree_on_max(values: Sequence[int], device: torch.device) -> list[int]:
    """The elementwise maximum over ranks."""
    agreed = torch.tensor(list(values), dtype=torch.int64, device=device)
    if world_size() > 1:
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return [int(number) for number in agreed]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, rows_of_rank: list[int], offset: int) -> Tensor:
        ctx.slice = slice(offset, offset + x_nD.shape[0])
        # Equal shapes are what every backend gathers; short ranks pad, and the padding is cut off again.
        longest = max(rows_of_rank)
        padded = x_nD.new_zeros((longest, *x_nD.shape[1:]))
        padded[: x_nD.shape[0]] = x_nD
        gathered = [torch.empty_like(padded) for _ in rows_of_rank]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:rows] for part, rows in zip(gathered, rows_of_rank, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient_ND = gradients[0].contiguous().clone()
        dist.all_reduce(gradient_ND, op=dist.ReduceOp.SUM)
        return gradient_ND[ctx.slice], None, None
