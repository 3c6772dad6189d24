"""Strategies single and ddp: every rank holds everything, gradients meet in one all-reduce.

torch's DistributedDataParallel is not used. It synchronises inside the backward of the mini-batch that it believes to
be the last, which is silently wrong when that mini-batch leaves out a tower: its parameters then keep local gradients
and the ranks drift apart. Here all backwards are local, and when they are done every gradient, zeros where there was
none, goes through one all-reduce in flat buckets.

The gradient of an embedding layer is that of the few rows that a mini-batch has tokens of. Dense, it is a table as
large as the vocabulary for every mini-batch, filled with zeros, added up and thrown away: the largest tensor of many a
step. Here such layers give sparse gradients, added into one dense table that is there before the first of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from farnear.parallel.collectives import all_reduce_sum
from farnear.parallel.eight_bit import is_eight_bit, read_moments, write_moments
from farnear.parallel.strategy import Features, LossScale, ParameterSlice, adam_state, clip_and_update, divide
from farnear.parallel.world import World

# Elements in a bucket: large enough for full bandwidth, small enough that its copy is no burden.
BUCKET_ELEMENTS = 32 * 1024 * 1024


class Replicated:
    """A module that every rank holds whole. With one rank this is plain training."""

    forward_is_collective = False
    loss_scale: LossScale | None = None

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, world: World) -> None:
        self._module = module
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._world = world
        self._unwritten: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._tables = list(_tables(module))

    def forward(self, features: Features) -> Any:
        """What the module makes of one mini-batch."""
        return self._module(features)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backwards inside add up in ``.grad``; the mean over ranks stands there afterwards."""
        with _gradients_of_rows(self._tables):
            yield
        for parameter in self._named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._world.world_size > 1:
            for bucket in self._buckets():
                flat = _flatten_dense_tensors(bucket)
                all_reduce_sum(flat).div_(self._world.world_size)
                for gradient, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                    gradient.copy_(mean)

    def backward(self, surrogate: Tensor) -> None:
        """Backward of a scalar."""
        surrogate.backward()

    def step(self, learning_rate: float, *, gradient_scale: float = 1.0) -> float:
        """Clip, update and clear; see `Strategy.step`."""
        gradients = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        divide(gradients, gradient_scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        # The gradients are the same on every rank by now, so every rank decides alike.
        return clip_and_update(self._optimizer, list(self._named.values()), norm, self._max_grad_norm, learning_rate)

    def train(self, mode: bool) -> None:
        """Training mode (dropout) or evaluation mode."""
        self._module.train(mode)

    def slices(self, *, owned: bool) -> list[ParameterSlice]:
        """Whole parameters, or with ``owned`` this rank's even share of them all, laid end to end."""
        pieces = []
        self._unwritten = []
        everything, before = sum(parameter.numel() for parameter in self._named.values()), 0
        first, last = (everything * r // self._world.world_size for r in (self._world.rank, self._world.rank + 1))
        for name, parameter in self._named.items():
            start, stop = 0, parameter.numel()
            if owned:
                start, stop = max(first - before, 0), min(last - before, parameter.numel())
            before += parameter.numel()
            if start >= stop:
                continue
            if is_eight_bit(self._optimizer):
                state = read_moments(self._optimizer, parameter)
                # Copies, which `spread_weights` brings back after a load.
                self._unwritten += [] if owned else [(parameter, state)]
            else:
                state = adam_state(self._optimizer, parameter)
            weight, exp_avg, exp_avg_sq = (
                tensor.detach().view(-1)[start:stop] for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
            )
            pieces.append(ParameterSlice(name, start, weight, exp_avg, exp_avg_sq, state["step"]))
        return pieces

    def spread_weights(self) -> None:
        """Nothing to do: the slices are views of the parameters themselves; but 8-bit moments are packed again."""
        for parameter, moments in self._unwritten:
            write_moments(self._optimizer, parameter, moments)
        self._unwritten = []

    def full_weights(self) -> dict[str, Tensor]:
        """Whole trained parameters by name on the CPU of rank 0."""
        if not self._world.is_main:
            return {}
        return {name: parameter.detach().cpu().clone() for name, parameter in self._named.items()}

    def _buckets(self) -> Iterator[list[Tensor]]:
        bucket: list[Tensor] = []
        elements = 0
        for parameter in self._named.values():
            assert parameter.grad is not None
            bucket.append(parameter.grad)
            elements += parameter.grad.numel()
            if elements >= BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
        if bucket:
            yield bucket


def _tables(module: nn.Module) -> Iterator[Any]:
    """The layers that look rows up in a trained table."""
    layer: Any
    for layer in module.modules():
        # An embedding layer, or a head that computes some rows only. One that counts tokens knows dense gradients only.
        looks_up = isinstance(getattr(layer, "sparse", None), bool) and not getattr(layer, "scale_grad_by_freq", False)
        if looks_up and layer.weight.requires_grad:
            yield layer


@contextmanager
def _gradients_of_rows(tables: Sequence[Any]) -> Iterator[None]:
    """Layers that go forward inside have sparse gradients, which add up in dense ones; after it they are as before."""
    were_sparse = [layer.sparse for layer in tables]
    for layer in tables:
        layer.sparse = True
        if layer.weight.grad is None:
            layer.weight.grad = torch.zeros_like(layer.weight)
    try:
        yield
    finally:
        for layer, was_sparse in zip(tables, were_sparse, strict=True):
            layer.sparse = was_sparse
