"""What the ranks tell each other, and the one place where the scale of a distributed gradient is decided.

The objective is the mean of the losses of all valid rows of the global batch. Three factors make the distributed
gradient equal to its gradient, whatever W is and however unevenly rows or valid rows lie on the ranks:

1. a rank weights each of its valid rows with W / (valid rows of the global batch) (`row_weight`);
2. `reduce_to_owners` **sums** over ranks what each rank's loss says about a row, and hands the sum to the rank that
   owns the row;
3. the strategy **averages** the parameter gradients over ranks.

A rank's parameter gradient then is W times its part of the wanted one, and the average of those over W ranks is their
sum over W times W: the wanted one. A rank without valid rows contributes a zero loss, but its columns still receive
gradient through (2). `benchmarks/exactness.py` compares with a single process; a factor W put in anywhere turns it red.

A step has three of these exchanges, whatever its batch, tiles and dimensions: `exchange_ints`, by which every rank
knows how much each has; `gather_together`, in which all that a rank has to show travels as bytes of one buffer; and
`reduce_to_owners`, which carries the sums over ranks along. The strategy's own reduction comes after them.

Without a process group (strategy single) every function is the identity of one rank.

Shapes: W ranks, n rows of this rank, N rows of all ranks in rank order, D columns.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def row_weight(valid_rows_of_all: int) -> float:
    """What a rank multiplies the loss of each valid row by (factor 1 above)."""
    return world_size() / max(valid_rows_of_all, 1)


def exchange_ints(values: Sequence[int], device: torch.device) -> list[list[int]]:
    """The integers of each rank, in rank order; every rank gives equally many."""
    own_n = torch.tensor(list(values), dtype=torch.int64, device=device)
    if world_size() == 1:
        return [own_n.tolist()]
    every = own_n.new_empty(world_size() * len(own_n))
    dist.all_gather_into_tensor(every, own_n)
    of_rank: list[list[int]] = every.view(world_size(), -1).tolist()
    return of_rank


def gather_together(tensors: Sequence[Tensor], rows_Wt: Sequence[Sequence[int]]) -> list[Tensor]:
    """Rows of every rank, in rank order, of several tensors of any types, in one exchange. Not differentiable.

    Args:
        tensors: This rank's; each differs from other ranks' in its number of rows only.
        rows_Wt: Rows of each tensor on each rank, as every rank knows them.

    Returns:
        Of each tensor the [N, ...] of all ranks.
    """
    if world_size() == 1:
        return list(tensors)
    # Equal lengths are what every backend gathers; short ranks pad, and the padding is never looked at.
    row_bytes = [math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors]
    longest = max(sum(r * b for r, b in zip(rows, row_bytes, strict=True)) for rows in rows_Wt)
    # Types of eight bytes come first, or their views would not be aligned.
    order = sorted(range(len(tensors)), key=lambda t: -tensors[t].element_size())
    longest += -longest % 8
    own = torch.zeros(longest, dtype=torch.uint8, device=tensors[0].device)
    start = 0
    for t in order:
        flat = tensors[t].contiguous().view(-1).view(torch.uint8)
        own[start : start + len(flat)] = flat
        start += len(flat)
    every = own.new_empty(world_size() * longest)
    dist.all_gather_into_tensor(every, own)
    parts: list[list[Tensor]] = [[] for _ in tensors]
    for of_rank, rows in zip(every.view(world_size(), longest), rows_Wt, strict=True):
        start = 0
        for t in order:
            stop = start + rows[t] * row_bytes[t]
            parts[t].append(of_rank[start:stop].view(tensors[t].dtype).view(rows[t], *tensors[t].shape[1:]))
            start = stop
    return [torch.cat(part) for part in parts]


def reduce_to_owners(
    gradients: Sequence[Tensor], rows_Wt: Sequence[Sequence[int]], sums: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Sum over ranks what each says about all rows; every rank keeps its own rows' (factor 2 above).

    Args:
        gradients: float32 [N, D] each, about the rows that `gather_together` brought.
        rows_Wt: As there.
        sums: float32 [s], some numbers that are summed over ranks on the way.

    Returns:
        Of each gradient this rank's [n, D], and the sums.
    """
    if world_size() == 1:
        return list(gradients), sums
    of_rank = [torch.split(gradient, [rows[t] for rows in rows_Wt]) for t, gradient in enumerate(gradients)]
    lengths = [[part[rank].numel() for part in of_rank] for rank in range(world_size())]
    chunk = max(map(sum, lengths)) + len(sums)
    sent_Wc = sums.new_zeros((world_size(), chunk))
    for rank, sent_c in enumerate(sent_Wc):
        sent_c[: len(sums)] = sums
        torch.cat([part[rank].flatten() for part in of_rank], out=sent_c[len(sums) : len(sums) + sum(lengths[rank])])
    received_c = sums.new_empty(chunk)
    dist.reduce_scatter_tensor(received_c, sent_Wc.view(-1), op=dist.ReduceOp.SUM)
    total, own, start = received_c[: len(sums)], [], len(sums)
    for part, length in zip(of_rank, lengths[dist.get_rank()], strict=True):
        own.append(received_c[start : start + length].view_as(part[dist.get_rank()]))
        start += length
    return own, total


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One small picklable object of each rank, in rank order, over a group of all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_on_main_rank(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One picklable object of each rank, in rank order, on rank 0; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, dst=0, group=group)
    return values


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place; returns ``x``."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def agree_on_max(values: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """The elementwise maximum over ranks, asked in a group of all of them."""
    agreed = torch.tensor(list(values), dtype=torch.int64, device=device)
    if world_size() > 1:
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return [int(number) for number in agreed]


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1
