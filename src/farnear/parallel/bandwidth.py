"""How fast the ranks talk: all-reduce and all-gather, timed where a training would use them.

Figures are *bus bandwidths*, as nccl-tests counts them: what each link has to carry, whatever the number of ranks, so
that they can be held against the link's own figure. All-reduce carries 2 (W - 1) / W times the tensor, all-gather
(W - 1) / W times the result. The sums are looked at too: links that spoil bits exist.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist

from farnear.parallel.world import World

REPEATS = 5
# Large enough that the links decide and not the latency.
BYTES_ON_GPU, BYTES_ON_CPU = 256 << 20, 16 << 20


@dataclass(frozen=True)
class Bandwidth:
    """Of the slowest rank.

    Attributes:
        all_reduce, all_gather: Bus bandwidth in bytes a second.
        tensor_bytes: Size of what was reduced and of what was gathered.
        is_right: Whether every rank got the right numbers.
    """

    all_reduce: float
    all_gather: float
    tensor_bytes: int
    is_right: bool


def measure_bandwidth(world: World) -> Bandwidth:
    """Time both collectives over all ranks, of which there are two at least. A collective."""
    ranks = world.world_size
    elements = (BYTES_ON_GPU if world.device.type == "cuda" else BYTES_ON_CPU) // 4 // ranks * ranks
    whole_n = torch.empty(elements, device=world.device)
    part_m = torch.full((elements // ranks,), float(world.rank), device=world.device)

    def reduce() -> None:
        whole_n.fill_(world.rank + 1.0)
        dist.all_reduce(whole_n)

    def gather() -> None:
        dist.all_gather_into_tensor(whole_n, part_m)

    seconds_of_reduce = _seconds(reduce, world)
    sums_are_right = bool((whole_n == ranks * (ranks + 1) / 2).all())
    seconds_of_gather = _seconds(gather, world)
    wanted_W = torch.arange(ranks, device=world.device, dtype=whole_n.dtype)
    is_right = sums_are_right and bool((whole_n.view(ranks, -1) == wanted_W[:, None]).all())
    worst = torch.tensor([seconds_of_reduce, seconds_of_gather, float(not is_right)], device=world.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    seconds_of_reduce, seconds_of_gather, is_wrong = worst.tolist()
    carried = whole_n.nbytes * (ranks - 1) / ranks
    return Bandwidth(2 * carried / seconds_of_reduce, carried / seconds_of_gather, whole_n.nbytes, not is_wrong)


def _seconds(collective: Callable[[], None], world: World) -> float:
    """Of one, after a first that sets up the connections."""
    collective()
    dist.barrier()
    started = perf_counter()
    for _ in range(REPEATS):
        collective()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return (perf_counter() - started) / REPEATS
