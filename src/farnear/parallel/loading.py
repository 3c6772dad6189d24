"""Weights that rank 0 alone has read from disk, on their way to the ranks that will hold a part of them.

Where parameters are spread over the ranks (zero3, fsdp2) there is no need for the whole model in every rank's memory,
which on a machine of eight GPUs would be eight times the model in the host's. Rank 0 loads it; the others build it on
torch's meta device, shapes without memory, and are sent one parameter after the other: FSDP2 is sent the rank's rows
only, DeepSpeed the whole parameter, of which it keeps the rank's part before the next one comes. Buffers (rotary
frequencies and the like) are small, and sent whole.

Parameters that are tied are one `Parameter` before and after.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farnear.parallel.collectives import agree_on_max
from farnear.parallel.world import World


def is_on_main_rank_only(module: nn.Module, world: World) -> bool:
    """Whether some rank built the module without weights. A collective."""
    is_hollow = any(parameter.is_meta for parameter in module.parameters())
    return bool(agree_on_max([int(is_hollow)], world.device)[0])


@torch.no_grad()
def send_buffers(module: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers, on its device. A collective."""
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            on_device = torch.empty_like(buffer, device=world.device) if buffer.is_meta else buffer.to(world.device)
            dist.broadcast(on_device, src=0)
            setattr(owner, name, on_device)


@torch.no_grad()
def send_rows(whole: Tensor | None, rows_n: Tensor, ranks_of_copy: int, world: World) -> None:
    """Fill each rank's rows of a parameter that rank 0 holds whole. A collective.

    Args:
        whole: On rank 0 only.
        rows_n: This rank's rows, flat and padded to the same n on all ranks.
        ranks_of_copy: Ranks over which the parameter is spread; the next ones are sent another copy.
    """
    parts = None
    if whole is not None:
        padded_Sn = rows_n.new_zeros(ranks_of_copy, rows_n.numel())
        padded_Sn.view(-1)[: whole.numel()] = whole.reshape(-1)
        parts = [padded_Sn[rank % ranks_of_copy] for rank in range(world.world_size)]
    dist.scatter(rows_n, parts, src=0)


@torch.no_grad()
def partition_one_by_one(module: nn.Module, settings: Mapping[str, Any], world: World) -> None:
    """Make a module's parameters ZeRO-3's, from rank 0's weights; no other rank holds more than one of them whole.

    Args:
        settings: DeepSpeed's.
    """
    import deepspeed

    # It takes over the process group that stands already.
    deepspeed.init_distributed(dist_init_required=False)
    first: Any = None
    for parameter in module.parameters():
        if parameter.is_meta:
            # In place: modules, tied ones too, and the optimizer keep the parameter that they have.
            empty = nn.Parameter(torch.empty_like(parameter, device=world.device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, empty)
        if first is None:
            first = parameter
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=dict(settings), dtype=torch.float32
            )
        else:
            # What DeepSpeed itself calls for those that it finds unpartitioned.
            first.convert_to_zero_parameters(param_list=[parameter])
