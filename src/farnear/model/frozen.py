"""Parts of a model that do not train are computed once a step: their outputs are kept from pass one for pass two.

With a frozen vision tower, or LoRA above it only, most of a page's cost is spent on numbers that are the same in both
passes of a gradient cache and that no gradient flows into. `FrozenOutputs` finds such parts and replaces their
``forward``: in pass one an output is copied to host memory, all of it (features that deeper layers take from the tower
included), in pass two it is brought back. What does not fit the budget in bytes is computed again.

A part is the topmost module all of whose parameters are frozen; single layers and embeddings are too small to be worth
their outputs. Whether a gradient has to pass through it, because something below it trains, shows in its first forward
with a graph: then the part is left alone from there on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.base.modules import Module as FeaturesModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

# Of all parameters; below it a part is not worth its outputs.
_SMALLEST_SHARE = 0.01


class FrozenOutputs:
    """The outputs of a model's frozen parts over one step.

    Args:
        module: Its parts get another ``forward``, which behaves as before outside of the two contexts.

    Attributes:
        budget_bytes: Host memory for outputs on this rank.
        names: Of the parts that are kept; fewer when a gradient turns out to pass through one.
        kept_bytes: What this step's outputs take.
    """

    def __init__(self, module: nn.Module, budget_bytes: int = 0) -> None:
        self.budget_bytes = budget_bytes
        self._outputs: dict[tuple[int, str], list[Any]] = {}
        self._turn: tuple[str, int, int] | None = None  # what to do, turn, seed of what follows
        self._is_full = False
        self.kept_bytes = 0
        parts = dict(frozen_parts(module))
        self.names = set(parts)
        for name, part in parts.items():
            part.forward = self._replacement(name, part.forward, has_dropout(part))

    @contextmanager
    def recording(self, turn: int, seed: int) -> Iterator[None]:
        """Keep what the parts give in a forward without graph, under the number of its mini-batch."""
        self._turn = ("record", turn, seed)
        try:
            yield
        finally:
            self._turn = None

    @contextmanager
    def replaying(self, turn: int, seed: int) -> Iterator[None]:
        """Give again, once, what was kept under that number."""
        self._turn = ("replay", turn, seed)
        try:
            yield
        finally:
            self._turn = None

    def forget(self) -> None:
        """Let go of everything that is kept."""
        self._outputs.clear()
        self._is_full = False
        self.kept_bytes = 0

    def _replacement(self, name: str, original: Callable[..., Any], draws: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._turn is None or name not in self.names:
                return original(*args, **kwargs)
            what, turn, seed = self._turn
            if what == "replay" and any(x.requires_grad for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
                self.names.discard(name)
                self._outputs = {key: kept for key, kept in self._outputs.items() if key[1] != name}
                return original(*args, **kwargs)
            kept = self._outputs.get((turn, name))
            if what == "replay" and kept:
                output = self._back(kept.pop(0), args, kwargs)
            else:
                output = original(*args, **kwargs)
                if what == "record":
                    self._keep(turn, name, output)
            if draws:
                # Dropout inside was drawn in pass one only: what follows must not depend on that.
                torch.manual_seed(seed)
            return output

        return forward

    def _keep(self, turn: int, name: str, output: Any) -> None:
        size = sum(x.nbytes for x in tree_leaves(output) if isinstance(x, Tensor))
        # Nothing after the first that does not fit: what is kept of a part must be its first calls of a forward.
        self._is_full |= self.kept_bytes + size > self.budget_bytes
        if not self._is_full:
            self.kept_bytes += size
            self._outputs.setdefault((turn, name), []).append(tree_map_only(Tensor, _to_host, output))

    def _back(self, kept: Any, args: Any, kwargs: Any) -> Any:
        device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), torch.device("cpu"))
        return tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), kept)


def frozen_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The topmost modules without a trainable parameter that are worth keeping the outputs of, by name."""
    worth = _SMALLEST_SHARE * sum(parameter.numel() for parameter in module.parameters())

    def below(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        parameters = list(part.parameters())
        is_frozen = not any(parameter.requires_grad for parameter in parameters)
        # sentence-transformers' own modules hand on the dict of all features, inputs included.
        if is_frozen and next(part.children(), None) is not None and not isinstance(part, FeaturesModule):
            if sum(parameter.numel() for parameter in parameters) >= worth:
                yield name, part
            return
        for child_name, child in part.named_children():
            yield from below(f"{name}.{child_name}" if name else child_name, child)

    yield from below("", module)


def has_dropout(module: nn.Module) -> bool:
    """Whether a forward in training mode may draw random numbers: some rate of dropping anything is above 0."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return True
        rates = (value for name, value in vars(part).items() if "drop" in name.lower() and isinstance(value, float))
        if any(rate > 0 for rate in rates):
            return True
    return False


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x.detach().clone()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x.detach(), non_blocking=True)
