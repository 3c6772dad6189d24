"""fp16 under any strategy: gradients are scaled up, and a step in which they overflowed is left out.

fp16 holds nothing below 6e-8. So every surrogate is multiplied by a *loss scale* before its backward, and the reduced
gradient, which is fp32, divided by it before it is clipped. Where the scale was too large the gradient holds inf or
nan: the strategy notices that on all ranks alike, nothing is updated, and the scale is halved. After enough good steps
it is doubled again. The rule and its numbers are those of ``torch.amp.GradScaler``, which itself cannot be used: it
looks at one rank's gradients only and knows no partitions.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from farnear.parallel.strategy import Features, LossScale, NonFiniteGradientError, ParameterSlice, Strategy

GOOD_STEPS_TO_DOUBLE = 2000


class LossScaled:
    """A strategy whose backwards run at a loss scale."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.loss_scale: LossScale | None = LossScale()
        self.forward_is_collective = strategy.forward_is_collective

    def forward(self, features: Features) -> Any:
        """What the module makes of one mini-batch."""
        return self._strategy.forward(features)

    def accumulate(self) -> AbstractContextManager[None]:
        """See `Strategy.accumulate`; what stands there afterwards is scaled."""
        return self._strategy.accumulate()

    def backward(self, surrogate: Tensor) -> None:
        """Backward of a scalar, at the loss scale."""
        self._strategy.backward(surrogate * self._now.scale)

    def step(self, learning_rate: float, *, gradient_scale: float = 1.0) -> float:
        """Clip, update and clear; nan where the gradient overflowed, so that nothing was updated.

        Raises:
            NonFiniteGradientError: On every rank: it overflows at scale 1 too, so the scale is not what is wrong.
        """
        now = self._now
        try:
            norm = self._strategy.step(learning_rate, gradient_scale=gradient_scale * now.scale)
        except NonFiniteGradientError:
            self.loss_scale = LossScale(now.scale / 2, 0, now.skipped + 1)
            if self.loss_scale.scale < 1:
                raise
            return float("nan")
        if now.good_steps + 1 < GOOD_STEPS_TO_DOUBLE:
            self.loss_scale = replace(now, good_steps=now.good_steps + 1)
        else:
            self.loss_scale = replace(now, scale=now.scale * 2, good_steps=0)
        return norm

    def train(self, mode: bool) -> None:
        """Training mode (dropout) or evaluation mode."""
        self._strategy.train(mode)

    def slices(self, *, owned: bool) -> list[ParameterSlice]:
        """See `Strategy.slices`."""
        return self._strategy.slices(owned=owned)

    def spread_weights(self) -> None:
        """See `Strategy.spread_weights`."""
        self._strategy.spread_weights()

    def full_weights(self) -> dict[str, Tensor]:
        """See `Strategy.full_weights`."""
        return self._strategy.full_weights()

    @property
    def _now(self) -> LossScale:
        assert self.loss_scale is not None
        return self.loss_scale
