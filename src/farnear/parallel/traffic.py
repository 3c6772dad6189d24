"""How often ranks talk in a step, and how much they say, by what it is about.

Everything that goes over the network passes torch.distributed's functions, those of DeepSpeed and FSDP2 too. `count_in`
puts a counter before each of them; that is a change of another library at run time, and there is no other place from
which all of a step's collectives are seen. DeepSpeed keeps references to the functions from its import on, so this has
to come before it.

What a collective is about follows from where in the step it happens and from its kind:

    exchange            everything while ranks agree on a step and compute its loss
    parameter gathers   gathers in a pass or in the update: a strategy brings weights to where they are computed with
    checks              broadcasts there: ZeRO-3 compares what ranks are about to gather, a few bytes a forward
    reductions          all else in a pass or in the update: gradients meet

Bytes are those that this rank sends into the collective. What then leaves it depends on the network; `wire_bytes` is
what does where W ranks form a ring, the least that any way of doing it can have, as a mean over ranks:

    all-gather          (W - 1) n            everyone's n reach W - 1 others
    reduce-scatter      (W - 1) n / W        of n, W - 1 parts are others'
    all-reduce          2 (W - 1) n / W      a reduce-scatter and an all-gather of the parts
    reduce, broadcast   (W - 1) n / W        a chain, whose last link sends nothing
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
_CHECKS = {"broadcast": (0, "tensor")}
_REDUCTIONS = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
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
        calls, sent_bytes, wire_bytes: By what the collective was about.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.wire_bytes: Counter[str] = Counter()
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
        self.wire_bytes.clear()

    def as_plain(self) -> dict[str, dict[str, int]]:
        """For a record."""
        return {about: {"calls": self.calls[about], "bytes": self.sent_bytes[about]} for about in sorted(self.calls)}

    def _counted(
        self, function: str, original: Callable[..., Any], kind: str, position: int, argument: str
    ) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            # One function of torch's may be made of another.
            if self._depth == 0:
                sent = args[position] if len(args) > position else kwargs.get(argument)
                tensors = sent if isinstance(sent, (list, tuple)) else [sent]
                about = "exchange" if self._is_exchange else kind
                sent_bytes = sum(x.nbytes for x in tensors if isinstance(x, Tensor))
                groups = (x for x in (*args, *kwargs.values()) if isinstance(x, dist.ProcessGroup))
                ranks = dist.get_world_size(next(groups, None))
                self.calls[about] += 1
                self.sent_bytes[about] += sent_bytes
                self.wire_bytes[about] += round(sent_bytes * (ranks - 1) * _share_on_wire(function, ranks))
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        return call


def count_in(traffic: Traffic) -> None:
    """From now on count this process's collectives."""
    for names, kind in ((_GATHERS, "parameter_gathers"), (_CHECKS, "checks"), (_REDUCTIONS, "reductions")):
        for name, (position, argument) in names.items():
            original = getattr(dist, name, None)
            if original is None:  # another version of torch
                continue
            # A process that trains twice counts in the newer one only.
            original = getattr(original, _ORIGINAL, original)
            counted = traffic._counted(name, original, kind, position, argument)
            setattr(counted, _ORIGINAL, original)
            setattr(dist, name, counted)


def _share_on_wire(function: str, ranks: int) -> float:
    if function in _GATHERS:
        return 1.0
    return (2 if function == "all_reduce" else 1) / ranks
