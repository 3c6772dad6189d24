"""Strategy fsdp2: torch's own sharding of parameters, gradients and moments, driven for a gradient cache.

`fully_shard` wraps every transformer block and, with what is left, the whole module. Each wrapped module is a *unit*:
its parameters are gathered before its forward and its backward and given back afterwards. What FSDP2 offers for
gradient accumulation is to reduce in the last backward. A cached step has no backward that could be it: the last
mini-batch may leave out a tower, and kept graphs are run backward in an order of their own. So the reduction is done
here:

- gradients add up, unreduced, where FSDP2 leaves them (`set_requires_gradient_sync(False)`): on the unsharded
  parameters, whose memory comes and goes while the `Parameter` and its ``.grad`` stay;
- when all backwards are done, ranks agree on which parameters have a gradient anywhere, fill in zeros where one is
  missing, and each unit's gradients go through one reduce-scatter into the shards.

Under ``reduce: mini_batch`` FSDP2 reduces unit by unit within every backward, parameters without a gradient included,
so that no rank ever holds more than a few units' whole gradients.

Under ``reshard: step`` gathered parameters stay until the step. A step of eight mini-batches, half of them through both
towers and four of them with kept graphs, then gathers 1.1 times the parameters instead of 15.5 times.

The optimizer never sees a DTensor. It gets plain parameters that share memory with the shards, so any optimizer works
and its state is a flat contiguous piece of a named parameter: FSDP2 cuts along dimension 0.

Under ``shard_within: node`` the ranks form a mesh, replicate x shard: each node holds one copy of the model, spread
over its ranks, so that gathers stay inside the node and only the reduced shards travel between nodes.

bf16 needs nothing here, as in `farnear.parallel.zero`: parameters, gradients and their reduction are fp32.

Legend: S ranks share one copy of the model. c rows of a parameter's first dimension lie on each of them (the last ones
may hold fewer), d elements make a row, n = c x d.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.parallel.collectives import agree_on_max, all_reduce_sum, exchange_ints
from farnear.parallel.loading import is_on_main_rank_only, send_buffers, send_rows
from farnear.parallel.strategy import Features, LossScale, ParameterSlice, adam_state, clip_and_update, divide
from farnear.parallel.world import World


@dataclass(frozen=True)
class Shard:
    """A trained parameter on this rank.

    Attributes:
        name: In the module.
        whole: What FSDP2 gathers: its ``.grad`` is where backwards leave this rank's gradient.
        own: The rank's rows as a plain parameter over the memory of FSDP2's shard: what the optimizer updates.
        start: Where they begin in the flattened parameter.
    """

    name: str
    whole: nn.Parameter
    own: nn.Parameter
    start: int


class Fsdp2:
    """A module whose parameters, gradients and optimizer state are spread over the ranks by torch."""

    forward_is_collective = True
    loss_scale: LossScale | None = None

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        _refuse_scalars(module)
        self._module = module
        self._optimizer = optimizer
        self._max_grad_norm = config.training.max_grad_norm
        self._world = world
        self._mesh = shard_mesh(config, world)
        self._ranks_of_copy = self._mesh["shard"].size()
        self._copies = world.world_size // self._ranks_of_copy
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        must_send = is_on_main_rank_only(module, world)
        loaded = {name: p.detach() for name, p in module.named_parameters()} if must_send and world.is_main else {}
        self._units = _wrap(module, self._mesh)
        if must_send and not world.is_main:
            module.to_empty(device=world.device)
        self._sharded = {name: cast(DTensor, parameter) for name, parameter in module.named_parameters()}
        if must_send:
            self._send(loaded)
        self._reduces_at_once = config.training.reduce == "mini_batch"
        self._set_reduction(cast(FSDPModule, module))
        if config.training.reshard == "step":
            cast(FSDPModule, module).set_reshard_after_forward(False)
            cast(FSDPModule, module).set_reshard_after_backward(False)
        self._shards_of_unit = [self._shards(unit) for unit in self._units]
        _point_at(optimizer, names, {shard.name: shard.own for shard in self._all_shards()})

    def forward(self, features: Features) -> Any:
        """What the module makes of one mini-batch."""
        return self._module(features)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backwards inside add up; at the end their averages over ranks stand in the shards."""
        yield
        if self._reduces_at_once:
            self._take_reduced()
        else:
            self._reduce_all()

    def backward(self, surrogate: Tensor) -> None:
        """Backward of a scalar."""
        surrogate.backward()

    def step(self, learning_rate: float, *, gradient_scale: float = 1.0) -> float:
        """Clip, update and clear; see `Strategy.step`."""
        self._give_back_gathered()
        gradients = [shard.own.grad for shard in self._all_shards() if shard.own.grad is not None]
        divide(gradients, gradient_scale)
        square = torch.nn.utils.get_total_norm(gradients).square()
        # Every copy of the model adds the same.
        norm = (all_reduce_sum(square) / self._copies).sqrt()
        own = [shard.own for shard in self._all_shards()]
        return clip_and_update(self._optimizer, own, norm, self._max_grad_norm, learning_rate)

    def train(self, mode: bool) -> None:
        """Training mode (dropout) or evaluation mode."""
        self._module.train(mode)

    def slices(self, *, owned: bool) -> list[ParameterSlice]:
        """This rank's rows of each parameter. The first copy of the model owns them where there are several."""
        if owned and self._world.rank >= self._ranks_of_copy:
            return []
        pieces = []
        for shard in self._all_shards():
            if shard.own.numel():
                state = adam_state(self._optimizer, shard.own)
                weight, exp_avg, exp_avg_sq = (
                    tensor.detach().view(-1) for tensor in (shard.own, state["exp_avg"], state["exp_avg_sq"])
                )
                pieces.append(ParameterSlice(shard.name, shard.start, weight, exp_avg, exp_avg_sq, state["step"]))
        return pieces

    def spread_weights(self) -> None:
        """The slices are what FSDP2 gathers from; what is gathered already is old."""
        self._give_back_gathered()

    def full_weights(self) -> dict[str, Tensor]:
        """Whole trained parameters by name on the CPU of rank 0, gathered one at a time."""
        self._give_back_gathered()
        weights = {}
        for name, parameter in self._sharded.items():
            if not parameter.requires_grad:
                continue
            whole = parameter.full_tensor().detach()
            if self._world.is_main:
                weights[name] = whole.cpu().clone()
        return weights

    def _send(self, loaded: dict[str, Tensor]) -> None:
        send_buffers(self._module, self._world)
        for name, sharded in self._sharded.items():
            rows = _local(sharded)
            rows_n = rows.new_empty(self._rows(sharded) * _elements_of_row(sharded))
            send_rows(loaded.pop(name, None), rows_n, self._ranks_of_copy, self._world)
            rows.view(-1).copy_(rows_n[: rows.numel()])

    def _all_shards(self) -> Iterator[Shard]:
        for unit in self._shards_of_unit:
            yield from unit

    def _give_back_gathered(self) -> None:
        """FSDP2 keeps the root's parameters after a forward, to have them in the backward; some forwards have none."""
        for unit in self._units:
            unit.reshard()

    def _shards(self, unit: FSDPModule) -> list[Shard]:
        """The trained parameters of one unit. Gathers them once, which is when FSDP2 makes the whole ones."""
        before = dict(self._module.named_parameters())
        unit.unshard()
        gathered = {name: p for name, p in self._module.named_parameters() if p is not before[name]}
        unit.reshard()
        shards = []
        for name, whole in gathered.items():
            if whole.requires_grad:
                own = nn.Parameter(_local(self._sharded[name]))
                first_row = min(self._mesh.get_local_rank("shard") * self._rows(whole), whole.shape[0])
                shards.append(Shard(name, whole, own, first_row * _elements_of_row(whole)))
        return shards

    def _rows(self, whole: Tensor) -> int:
        """c: rows of each rank but the last ones, as torch.chunk and DTensor cut."""
        return -(-whole.shape[0] // self._ranks_of_copy)

    def _set_reduction(self, root: FSDPModule) -> None:
        root.set_requires_gradient_sync(self._reduces_at_once)
        if self._reduces_at_once:
            if not hasattr(root, "set_reduce_scatter_unused_params"):
                raise UserError(
                    f"training.reduce: mini_batch under fsdp2 needs torch 2.13, this is {torch.__version__}; take it "
                    "out, or set strategy=zero2"
                )
            # Ranks must not reduce different sets of parameters.
            root.set_reduce_scatter_unused_params(True)

    def _take_reduced(self) -> None:
        for shard in self._all_shards():
            reduced = self._sharded[shard.name]
            shard.own.grad = torch.zeros_like(shard.own) if reduced.grad is None else _local(reduced.grad)
            reduced.grad = None

    def _reduce_all(self) -> None:
        shards = list(self._all_shards())
        somewhere = agree_on_max([int(shard.whole.grad is not None) for shard in shards], self._world.device)
        if not any(somewhere):
            raise RuntimeError("no parameter has a gradient where FSDP2 is known to leave them")
        used = {shard.name for shard, is_used in zip(shards, somewhere, strict=True) if is_used}
        for unit in self._shards_of_unit:
            self._reduce([shard for shard in unit if shard.name in used])
        for shard in shards:
            if shard.own.grad is None:
                shard.own.grad = torch.zeros_like(shard.own)

    @torch.no_grad()
    def _reduce(self, shards: list[Shard]) -> None:
        """The mean over ranks of some parameters' gradients, into their shards, in one reduce-scatter."""
        if not shards:
            return
        columns = []
        for shard in shards:
            padded_Sn = shard.whole.new_zeros(self._ranks_of_copy, self._elements(shard))
            if shard.whole.grad is not None:
                padded_Sn.view(-1)[: shard.whole.numel()] = shard.whole.grad.reshape(-1)
            shard.whole.grad = None
            columns.append(padded_Sn)
        everything_Sn = torch.cat(columns, dim=1)
        del columns, padded_Sn
        mean_n = everything_Sn.view(-1)
        if self._ranks_of_copy > 1:
            mean_n = everything_Sn.new_empty(everything_Sn.shape[1])
            dist.reduce_scatter_tensor(mean_n, everything_Sn.view(-1), group=self._mesh.get_group("shard"))
        if self._copies > 1:
            dist.all_reduce(mean_n, group=self._mesh.get_group("replicate"))
        mean_n.div_(self._world.world_size)
        for shard, piece_n in zip(shards, mean_n.split([self._elements(shard) for shard in shards]), strict=True):
            shard.own.grad = piece_n[: shard.own.numel()].view_as(shard.own)

    def _elements(self, shard: Shard) -> int:
        """n of a parameter."""
        return self._rows(shard.whole) * _elements_of_row(shard.whole)


def shard_mesh(config: RunConfig, world: World, environment: Mapping[str, str] = os.environ) -> DeviceMesh:
    """The ranks as one row, over which the model is spread, or as replicate x shard with a row for each node.

    Raises:
        UserError: The nodes are to hold a copy each, but their ranks are not known or not equally many.
    """
    ranks_of_copy = world.world_size
    if config.shard_within == "node":
        told = [ranks for (ranks,) in exchange_ints([int(environment.get("LOCAL_WORLD_SIZE", 0))], world.device)]
        if len(set(told)) > 1 or not told[0] or world.world_size % told[0]:
            raise UserError(
                "shard_within: node needs equally many ranks on each node, as LOCAL_WORLD_SIZE tells them, but the "
                f"ranks were told {', '.join(str(ranks or 'nothing') for ranks in told)}; start the run with "
                "accelerate or torchrun and as many processes on each machine, or set shard_within=world"
            )
        ranks_of_copy = told[0]
    if ranks_of_copy == world.world_size:
        return init_device_mesh(world.device.type, (ranks_of_copy,), mesh_dim_names=("shard",))
    # Launchers number the ranks node by node.
    shape = (world.world_size // ranks_of_copy, ranks_of_copy)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _wrap(module: nn.Module, mesh: DeviceMesh) -> list[FSDPModule]:
    """Shard the transformer blocks, inner ones first, then the module itself; those are the units."""
    block_names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks = [part for part in module.modules() if type(part).__name__ in block_names and part is not module]
    return [fully_shard(part, mesh=mesh) for part in (*reversed(blocks), module)]


def _refuse_scalars(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise UserError(
                f"parameter {name} of the model is a single number, which FSDP2 cannot spread over ranks; "
                "set strategy=zero3"
            )


def _point_at(optimizer: torch.optim.Optimizer, names: dict[int, str], own: dict[str, nn.Parameter]) -> None:
    """Put the rank's own rows in place of the parameters that the optimizer was built over; empty ones are left out."""
    for group in optimizer.param_groups:
        rows = [own[names[id(parameter)]] for parameter in group["params"]]
        group["params"] = [parameter for parameter in rows if parameter.numel()]


def _local(sharded: Tensor) -> Tensor:
    return cast(DTensor, sharded).to_local().detach()


def _elements_of_row(whole: Tensor) -> int:
    return whole.shape[1:].numel()
