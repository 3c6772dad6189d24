"""How often ranks talk in a step, and how much they say, by what it is about.

Everything that goes over the network passes torch.distributed's functions, those of DeepSpeed and FSDP2 too. `count_in`
puts a counter before each of them; that is a change of another library at run time, and there is no other place from
which all of a step's collectives are seen. DeepSpeed keeps references to the functions from its import on, so this has
to come before it.

What a collective is about follows from where in the step it happens and from its kind:

    exchange            everything while ranks agree on a step and compute its loss
    parameter gathers   gathers in a pass or in the update: a strategy brings weights to where they are computed with
    reductions          all else in a pass or in the update: gradients meet

Bytes are those that this rank sends into the collective, whatever the network makes of it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Where the tensor that this rank sends stands among the arguments, and under which name.
_GATHERS = {
    "all_gather": (1, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "all_gather_single": (1, "input"),
}
_OTHERS = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter_single": (1, "input"),
    "all_to_all": (1, "input_tensor_list"),
    "all_to_all_single": (1, "input"),
}
_ORIGINAL = "farnear_original"


class Traffic:
    """Counts of one rank.

    Attributes:
        calls, sent_bytes: By what the collective was about.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self._is_exchange = False
        self._depth = 0

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Collectives inside are no reductions and no gathers of parameters."""
        self._is_exchange = True
        try:
            yield
        finally:
            self._is_exchange = False

    def start(self) -> None:
        """Begin anew: of what came before, in an evaluation or a checkpoint, a step knows nothing."""
        self.calls.clear()
        self.sent_bytes.clear()

    def as_plain(self) -> dict[str, dict[str, int]]:
        """For a record."""
        return {about: {"calls": self.calls[about], "bytes": self.sent_bytes[about]} for about in sorted(self.calls)}

    def _counted(self, original: Callable[..., Any], gathers: bool, position: int, name: str) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            # One function of torch's may be made of another.
            if self._depth == 0:
                sent = args[position] if len(args) > position else kwargs.get(name)
                tensors = sent if isinstance(sent, (list, tuple)) else [sent]
                about = "exchange" if self._is_exchange else "parameter_gathers" if gathers else "reductions"
                self.calls[about] += 1
                self.sent_bytes[about] += sum(x.nbytes for x in tensors if isinstance(x, Tensor))
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        return call


def count_in(traffic: Traffic) -> None:
    """From now on count this process's collectives."""
    for names, gathers in ((_GATHERS, True), (_OTHERS, False)):
        for name, (position, argument) in names.items():
            original = getattr(dist, name, None)
            if original is None:  # another version of torch
                continue
            # A process that trains twice counts in the newer one only.
            original = getattr(original, _ORIGINAL, original)
            counted = traffic._counted(original, gathers, position, argument)
            setattr(counted, _ORIGINAL, original)
            setattr(dist, name, counted)
