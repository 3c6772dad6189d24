"""How gradients meet and parameters change: one interface over single, ddp, ZeRO-1, 2, 3 and FSDP2.

The cached step needs five verbs from a strategy and knows nothing else about it:

    forward      features -> what the module makes of them, with or without a graph: embeddings, scores
    accumulate   a context in which any number of backwards add up on the rank; one reduction when it ends
    backward     of one mini-batch's surrogate, inside that context
    step         clip, update, forget the gradients; the global norm before clipping comes back
    train        dropout on or off

A checkpoint needs three more. `slices` shows the training state as flat pieces of named parameters: weights and moments
as writable views, wherever the strategy keeps them. All strategies show the same names and the same meaning, which is
what makes a checkpoint of one loadable into any other. After weights were written there, `spread_weights` brings them
to the ranks that compute with them. `full_weights` brings whole trained parameters to rank 0 for export.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from farnear.config import RunConfig
from farnear.parallel.world import World

Features = Mapping[str, Any]


class NonFiniteGradientError(ArithmeticError):
    """The reduced gradient holds inf or nan. Raised on every rank alike, before any weight has changed."""


@dataclass(frozen=True)
class ParameterSlice:
    """A flat piece of one parameter's training state, as views that can be read and written.

    Attributes:
        name: Of the parameter in the module.
        start: Where the piece begins in the flattened parameter.
        weight_n, exp_avg_n, exp_avg_sq_n: The n elements; the moments are AdamW's. fp32, or bf16 under pure_bf16.
        step: AdamW's step count, 0-dimensional; pieces may share it.
    """

    name: str
    start: int
    weight_n: Tensor
    exp_avg_n: Tensor
    exp_avg_sq_n: Tensor
    step: Tensor


@dataclass(frozen=True)
class LossScale:
    """Where fp16 stands.

    Attributes:
        scale: What surrogates are multiplied by.
        good_steps: Since the scale last changed.
        skipped: Steps of the whole run that overflowed and were left out.
    """

    scale: float = 65536.0
    good_steps: int = 0
    skipped: int = 0


class Forward(Protocol):
    """What it takes to embed and to score: a strategy, or `farnear.parallel.forward_only.ForwardOnly`."""

    forward_is_collective: bool
    """Whether ranks must call `forward` and `backward` equally often and through the same modules."""

    def forward(self, features: Features) -> Any:
        """What the module makes of one mini-batch."""

    def train(self, mode: bool) -> None:
        """Training mode (dropout) or evaluation mode."""


class Strategy(Forward, Protocol):
    """See the module's text for what each verb means."""

    loss_scale: LossScale | None
    """Under training.fp16, to be saved and set again; else None."""

    def accumulate(self) -> AbstractContextManager[None]:
        """Backwards inside add up locally; at the end, missing gradients become zeros and one reduction averages."""

    def backward(self, surrogate: Tensor) -> None:
        """Backward of a scalar."""

    def step(self, learning_rate: float, *, gradient_scale: float = 1.0) -> float:
        """Clip, update and clear. Returns the global norm before clipping.

        Args:
            gradient_scale: What the surrogates were multiplied by; the gradient is divided by it first.

        Raises:
            NonFiniteGradientError: On every rank; nothing was updated, and the gradient is forgotten.
        """

    def slices(self, *, owned: bool) -> list[ParameterSlice]:
        """The state on this rank; with ``owned`` only the pieces that this rank writes, disjoint over ranks."""

    def spread_weights(self) -> None:
        """Make weights that were written through `slices(owned=False)` those that `forward` uses. A collective."""

    def full_weights(self) -> dict[str, Tensor]:
        """Whole trained parameters by name on the CPU of rank 0; an empty dict elsewhere. A collective."""


def build_strategy(config: RunConfig, module: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> Strategy:
    """Wrap a module and its optimizer in the strategy of the run file.

    Args:
        module: Called with features, gives embeddings; its weights are final (ZeRO takes its copies here). Under zero3
            and fsdp2 it may be on the meta device on every rank but 0, whose weights are then everyone's.
        optimizer: torch AdamW over the module's parameters.

    Raises:
        UserError: DeepSpeed is not installed, or its config file contradicts the run file.
    """
    strategy = _plain_strategy(config, module, optimizer, world)
    if not config.training.fp16:
        return strategy
    from farnear.parallel.loss_scale import LossScaled

    return LossScaled(strategy)


def _plain_strategy(config: RunConfig, module: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> Strategy:
    if config.strategy.startswith("zero"):
        # DeepSpeed is imported only where it is used: machines without it train under ddp.
        from farnear.parallel.zero import Zero

        return Zero(config, module, optimizer, world)
    if config.strategy == "fsdp2":
        from farnear.parallel.fsdp2 import Fsdp2

        return Fsdp2(config, module, optimizer, world)
    from farnear.parallel.replicated import Replicated

    return Replicated(module, optimizer, config.training.max_grad_norm, world)


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one parameter, made of zeros where no step has been taken yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if "exp_avg" not in state:
        # Where torch's AdamW keeps it: the fused one counts on the parameter's device.
        state["step"] = torch.zeros((), device=parameter.device if optimizer.defaults.get("fused") else None)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def divide(gradients: Sequence[Tensor], scale: float) -> None:
    """Divide in place by a loss scale."""
    if scale != 1.0:
        for gradient in gradients:
            gradient.div_(scale)


def clip_and_update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    norm: Tensor,
    max_grad_norm: float,
    learning_rate: float,
) -> float:
    """Update from gradients whose global norm all ranks know, and clear them; see `Strategy.step`."""
    if not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteGradientError
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)
