"""A trained scale (the inverse temperature): one number beside the model, with an optimizer of its own.

Its logarithm is what is trained, as in CLIP (Radford et al. 2021, arXiv:2103.00020), and it is bounded above. It
belongs to no strategy: ZeRO's optimizer would not know it, and the norm by which the model's gradients are clipped does
not hold it. Every rank has it whole. Its gradient comes with the loss's own exchange, the same on every rank, so every
rank makes the same step. In a checkpoint it stands beside the model's parameters, in the same form.
"""

import math

import torch
from torch import nn

from farnear.parallel.strategy import ParameterSlice, Strategy, adam_state
from farnear.sections import LossConfig, TrainingConfig

NAME = "loss.log_scale"


class LearnedScale:
    """The scale and its AdamW."""

    def __init__(self, loss: LossConfig, training: TrainingConfig) -> None:
        self._log = nn.Parameter(torch.tensor([math.log(loss.scale)]))
        self._max_log = math.log(loss.max_scale)
        self._learning_rate = loss.scale_learning_rate or training.learning_rate
        self._optimizer = torch.optim.AdamW(
            [self._log],
            lr=self._learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=0.0,
        )

    @property
    def value(self) -> float:
        """Factor on the cosine similarities."""
        return math.exp(float(self._log.detach()))

    def step(self, dlog_scale: float, share_of_peak: float) -> None:
        """One update from the gradient of the mean loss; the learning rate is a share of its peak."""
        self._log.grad = torch.tensor([dlog_scale])
        self._optimizer.param_groups[0]["lr"] = self._learning_rate * share_of_peak
        self._optimizer.step()
        with torch.no_grad():
            self._log.clamp_(max=self._max_log)

    def slices(self) -> list[ParameterSlice]:
        """Its state in the form of a parameter's."""
        state = adam_state(self._optimizer, self._log)
        return [ParameterSlice(NAME, 0, self._log.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"])]


class TrainedState:
    """What a checkpoint holds: the strategy's state and, where it is trained, the scale's.

    Attributes:
        shapes: Of every trained parameter, the scale's among them.
        frozen_hash: Stands for what they were trained beside (`farnear.model.trainable.frozen_hash`).
    """

    def __init__(
        self,
        strategy: Strategy,
        shapes: dict[str, torch.Size],
        scale: LearnedScale | None,
        *,
        is_main: bool,
        frozen_hash: str = "",
    ) -> None:
        self._strategy, self._scale, self._is_main, self.frozen_hash = strategy, scale, is_main, frozen_hash
        self.shapes = {**shapes, NAME: torch.Size([1])} if scale is not None else shapes

    def slices(self, *, owned: bool) -> list[ParameterSlice]:
        """As `Strategy.slices`; of the scale, which all ranks hold, rank 0 writes what there is."""
        pieces = self._strategy.slices(owned=owned)
        return pieces if self._scale is None or (owned and not self._is_main) else [*pieces, *self._scale.slices()]

    def spread_weights(self) -> None:
        """As `Strategy.spread_weights`."""
        self._strategy.spread_weights()
