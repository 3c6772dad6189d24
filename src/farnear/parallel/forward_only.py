"""A module that is not trained: every rank holds it whole, and computes with it what it likes when it likes."""

from typing import Any

import torch
from torch import nn

from farnear.parallel.strategy import Features


class ForwardOnly:
    """See `farnear.parallel.strategy.Forward`. The module stays in evaluation mode."""

    forward_is_collective = False

    def __init__(self, module: nn.Module) -> None:
        self._module = module.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, features: Features) -> Any:
        """What the module makes of one mini-batch."""
        return self._module(features)

    def train(self, mode: bool) -> None:
        """Nothing: it is never trained."""
