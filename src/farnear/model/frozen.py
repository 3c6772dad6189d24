"""Parts of a model that do not train are computed once a step: their outputs are kept from pass one for pass two.

With a frozen vision tower, or LoRA above it only, most of a page's cost is spent on numbers that are the same in both
passes of a gradient cache and that no gradient flows into. `FrozenOutputs` finds such parts and replaces their
``forward``: in pass one an output is copied to host memory, all of it (features that deeper layers take from the tower
included), in pass two it is brought back. What does not fit the budget in bytes is computed again.

A part is the topmost module all of whose parameters are frozen and in which nothing is drawn; single layers and
embeddings are too small to be worth their outputs. Whether a gradient has to pass through it, because something below
it trains, shows in its first forward with a graph: then the part is left alone from there on.
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
        budget_bytes: Host memory for outputs on this rank; may be set later.

    Attributes:
        names: Of the parts that are kept; fewer when a gradient turns out to pass through one.
        kept_bytes: What this step's outputs take.
        kept_turns: How many mini-batches have all of their outputs kept: the first ones, for when one does not fit,
            nothing after it is kept either.
        trained_share: Of the weights beside the parts, those that train.
        met: Of the parts, those that the last `looking` went through.
    """

    def __init__(self, module: nn.Module, budget_bytes: int = 0) -> None:
        self.budget_bytes = budget_bytes
        self._outputs: dict[int, dict[str, list[Any]]] = {}
        self._context: tuple[str, int] | None = None  # what to do, and in which turn
        self._is_full = False
        self.kept_bytes = 0
        self.met: set[str] = set()
        parts = dict(frozen_parts(module))
        self.names = set(parts)
        # Counted now: a strategy may leave parameters without their elements.
        self._elements = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        self._all_elements = sum(parameter.numel() for parameter in module.parameters())
        self._trained_elements = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, part in parts.items():
            part.forward = self._replacement(name, part.forward)

    @property
    def kept_turns(self) -> int:
        return len(self._outputs)

    @property
    def trained_share(self) -> float:
        beside = self._all_elements - sum(self._elements[name] for name in self.names)
        return self._trained_elements / max(beside, 1)

    @contextmanager
    def recording(self, turn: int) -> Iterator[None]:
        """Keep what the parts give in a forward without graph, under the number of its mini-batch."""
        self._context = ("record", turn)
        try:
            yield
        finally:
            self._context = None
        if self._is_full:
            # Half of a mini-batch's outputs is no use to ranks that have to run the same modules.
            self._outputs.pop(turn, None)

    @contextmanager
    def replaying(self, turn: int) -> Iterator[None]:
        """Give again, once, what was kept under that number."""
        self._context = ("replay", turn)
        try:
            yield
        finally:
            self._context = None

    @contextmanager
    def looking(self) -> Iterator[None]:
        """See which parts a forward goes through; of several towers an input takes one."""
        self.met = set()
        self._context = ("look", 0)
        try:
            yield
        finally:
            self._context = None
        self.met &= self.names

    def forget(self) -> None:
        """Let go of everything that is kept."""
        self._outputs.clear()
        self._is_full = False
        self.kept_bytes = 0

    def _replacement(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._context is None or name not in self.names:
                return original(*args, **kwargs)
            what, turn = self._context
            self.met.add(name)
            if what == "record":
                output = original(*args, **kwargs)
                self._keep(turn, name, output)
                return output
            if any(x.requires_grad for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
                self.names.discard(name)
                return original(*args, **kwargs)
            kept = self._outputs.get(turn, {}).get(name) if what == "replay" else None
            return _back(kept.pop(0), args, kwargs) if kept else original(*args, **kwargs)

        return forward

    def _keep(self, turn: int, name: str, output: Any) -> None:
        size = sum(x.nbytes for x in tree_leaves(output) if isinstance(x, Tensor))
        self._is_full |= self.kept_bytes + size > self.budget_bytes
        if not self._is_full:
            self.kept_bytes += size
            self._outputs.setdefault(turn, {}).setdefault(name, []).append(tree_map_only(Tensor, _to_host, output))


def frozen_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The topmost modules without a trainable parameter that are worth keeping the outputs of, by name."""
    worth = _SMALLEST_SHARE * sum(parameter.numel() for parameter in module.parameters())

    def below(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        parameters = list(part.parameters())
        is_frozen = not any(parameter.requires_grad for parameter in parameters)
        # sentence-transformers' own modules hand on the dict of all features, inputs included, and a Router calls those
        # of a route one by one. And a part that draws random numbers would, left out, change what is drawn after it.
        hands_on = any(isinstance(inner, FeaturesModule) for inner in part.modules())
        can_be_kept = not hands_on and not has_dropout(part)
        if is_frozen and can_be_kept and next(part.children(), None) is not None:
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
        # Some modules have the rate as an attribute, others read it from the model's configuration.
        config = getattr(part, "config", None)
        settings = {**(vars(config) if hasattr(config, "__dict__") else {}), **vars(part)}
        rates = (value for name, value in settings.items() if "drop" in name.lower() and isinstance(value, float))
        if any(rate > 0 for rate in rates):
            return True
    return False


def _back(kept: Any, args: Any, kwargs: Any) -> Any:
    device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), torch.device("cpu"))
    return tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), kept)


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x.detach().clone()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x.detach(), non_blocking=True)
