"""What a model's forward and backward take, found by running them on tensors that have a shape and no content.

A `Hollow` tensor says that it is on the CPU and holds a tensor of torch's meta device, on which every operation but the
computing is done. Weights and pixels are hollow; what steers a forward (token ids, masks, grids of patches) is real and
small, so that the model's own code runs, with its loops over images and its masks, whatever its architecture. Autograd,
autocast and activation checkpointing see nothing unusual. So the graph's memory is not a formula for each architecture
but what the real forward would save, to the byte, and takes no memory to find out.

`trace` counts storages while they live, as an allocator would with blocks of exactly their size:

    graph       what autograd saves for the backward pass, weights left out
    casts       half-precision copies of weights that autocast makes; some strategies keep them from one mini-batch to
                the next, so they are told apart and are in none of the other figures
    forward     the most that lives at once in a forward without graph
    backward    the most that lives at once in a forward and its backward, gradients of weights left out where they
                stay, but not the one that is being added
    flops       of both, by torch's formulas

The kernels are those of the CPU: attention is its flash attention, which saves queries, keys, values, output and one
number a row, as flash attention does on a GPU.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION
_META = torch.device("meta")


class CannotTraceError(ValueError):
    """The model's code asks for the content of a tensor that has none."""


@dataclass(frozen=True)
class Trace:
    """Of one mini-batch; memory in bytes. See the module's text."""

    graph_bytes: int
    cast_bytes: int
    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int


class Hollow(Tensor):
    """A tensor without content; ``meta`` is its stand-in, ``ledger`` counts its memory."""

    meta: Tensor
    ledger: "_Ledger"

    @staticmethod
    def __new__(cls, meta: Tensor, ledger: "_Ledger") -> "Hollow":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
            requires_grad=meta.requires_grad,
        )

    def __init__(self, meta: Tensor, ledger: "_Ledger") -> None:
        self.meta, self.ledger = meta, ledger
        storage = meta.untyped_storage()
        ledger.hold(storage._cdata, storage.nbytes())
        # A view keeps its storage, so the last of them lets it go.
        weakref.finalize(self, ledger.let_go, storage._cdata).atexit = False

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"Hollow({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._fused_sdp_choice.default:
            return _FLASH
        if func is aten._local_scalar_dense.default:
            raise CannotTraceError("its code depends on the values of activations")
        if func in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        known: dict[int, Hollow] = {}
        ledger: list[_Ledger] = []

        def stand_in(x: Tensor) -> Tensor:
            if not isinstance(x, Hollow):
                return x.to(_META)
            ledger.append(x.ledger)
            known[id(x.meta)] = x
            return x.meta

        args, kwargs = tree_map_only(Tensor, stand_in, (args, kwargs or {}))
        if kwargs.get("device") is not None:
            kwargs["device"] = _META
        out = func(*args, **kwargs)
        ledger[0].count(func, args, kwargs, out)
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else Hollow(x, ledger[0]), out)


class _Ledger:
    """Storages that live, by what they are.

    Attributes:
        weights: Storages that are there anyway: weights and their gradients.
        casts: Copies of weights in another type.
    """

    def __init__(self) -> None:
        self.weights: set[int] = set()
        self.casts: dict[int, int] = {}
        self._held: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self.is_weight = True
        self.live_bytes = self.peak_bytes = self.flops = 0

    def hold(self, storage: int, nbytes: int) -> None:
        self._held[storage] = self._held.get(storage, 0) + 1
        if self.is_weight:
            self.weights.add(storage)
        elif self._held[storage] == 1 and storage not in self.casts:
            self._bytes[storage] = nbytes
            self.live_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def let_go(self, storage: int) -> None:
        self._held[storage] -= 1
        if not self._held[storage]:
            del self._held[storage]
            self.live_bytes -= self._bytes.pop(storage, 0)
            # Its number may be given to another one.
            self.weights.discard(storage)
            self.casts.pop(storage, None)

    def count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func is aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            storage = out.untyped_storage()
            self.casts[storage._cdata] = storage.nbytes()
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)


def trace(
    model: nn.Module,
    embed: Callable[[dict[str, Any]], Tensor],
    features: Mapping[str, Any],
    autocast: torch.dtype | None,
    *,
    merged: Mapping[str, Any] | None = None,
) -> Trace:
    """Follow a mini-batch through both passes.

    Args:
        model: Hollow, as `hollow_out` leaves it, in training mode.
        embed: Its embeddings of some features.
        features: Of the mini-batch; tensors of floats are taken by their shape alone.
        autocast: Type that it computes in; None for that of the weights.
        merged: Features of what goes through pass one at once, where that is not the mini-batch alone.

    Raises:
        CannotTraceError: The model cannot be followed so.
    """
    ledger = ledger_of(model)
    ledger.is_weight = False
    hollow = {name: _hollow_floats(value, ledger) for name, value in features.items()}
    together = hollow if merged is None else {name: _hollow_floats(value, ledger) for name, value in merged.items()}
    inputs_bytes = ledger.live_bytes

    def forward(inputs: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return embed(dict(inputs))

    try:
        with torch.no_grad(), ledger_from(ledger):
            forward(together)
            forward_bytes = ledger.peak_bytes - inputs_bytes
        saved: dict[int, int] = {}
        with ledger_from(ledger):
            with torch.autograd.graph.saved_tensors_hooks(_noted_in(saved, ledger), lambda x: x):
                e_nD = forward(hollow)
            casts, forward_flops = dict(ledger.casts), ledger.flops
            if e_nD.requires_grad:
                e_nD.float().sum().backward()
            backward_bytes, flops = ledger.peak_bytes - inputs_bytes, ledger.flops
        del e_nD
    except CannotTraceError:
        raise
    except Exception as error:  # whatever a model's code raises that meets no numbers
        raise CannotTraceError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    graph_bytes = sum(nbytes for storage, nbytes in saved.items() if storage not in casts)
    return Trace(graph_bytes, sum(casts.values()), forward_bytes, backward_bytes, forward_flops, flops - forward_flops)


def hollow_out(model: nn.Module) -> nn.Module:
    """Put hollow tensors in place of a model's weights and buffers, whole gradients included; in place."""
    ledger = _Ledger()
    of: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in of:
                    of[id(parameter)] = _hollow_parameter(parameter, ledger)
                module._parameters[name] = of[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = Hollow(buffer.to(_META), ledger)
    return model


def ledger_of(model: nn.Module) -> _Ledger:
    """That of a model that `hollow_out` has been through."""
    first: Any = next(model.parameters())
    ledger: _Ledger = first.ledger
    return ledger


@contextmanager
def ledger_from(ledger: _Ledger) -> Iterator[None]:
    """Peak and FLOPs are counted from here on."""
    ledger.peak_bytes, ledger.flops = ledger.live_bytes, 0
    yield


def _hollow_parameter(parameter: nn.Parameter, ledger: _Ledger) -> nn.Parameter:
    meta = parameter.detach().to(_META)
    hollow = nn.Parameter(Hollow(meta, ledger), parameter.requires_grad)
    if parameter.requires_grad:
        # So that a backward adds to it, as all but the first of a step do.
        hollow.grad = Hollow(torch.empty_like(meta), ledger)
    return hollow


def _hollow_floats(value: Any, ledger: _Ledger) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return Hollow(torch.empty_like(value, device=_META), ledger)
    return value


def _noted_in(saved: dict[int, int], ledger: _Ledger) -> Callable[[Tensor], Tensor]:
    def note(x: Tensor) -> Tensor:
        storage = (x.meta if isinstance(x, Hollow) else x).untyped_storage()
        if storage._cdata not in ledger.weights:
            saved[storage._cdata] = storage.nbytes()
        return x

    return note


def _without_masks(places: Any) -> list[Any]:
    """Indices in place of masks, which no meta tensor can be indexed with: their number is not in their shape."""
    indices: list[Any] = []
    for place in places:
        if isinstance(place, Tensor) and place.dtype == torch.bool:
            if isinstance(place, Hollow):
                raise CannotTraceError("its code picks out activations by their values")
            indices.extend(place.nonzero(as_tuple=True))
        else:
            indices.append(place)
    return indices
