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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_META = torch.device("meta")


class CannotTraceError(ValueError):
    """The model's code asks for the content of a tensor that has none."""


@dataclass(frozen=True)
class Trace:
    """Of one mini-batch; memory in bytes.

    Attributes:
        used_elements: Of the weights that it is computed from.
        trains: Whether a gradient goes back through it.
    """

    graph_bytes: int
    cast_bytes: int
    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int
    used_elements: int
    trains: bool = True


class Hollow(Tensor):
    """A tensor without content; ``meta`` is its stand-in, ``ledger`` counts its memory."""

    meta: Tensor
    ledger: "_Ledger"

    @staticmethod
    def __new__(cls, meta: Tensor, ledger: "_Ledger") -> "Hollow":
        return torch.Tensor._make_wrapper_subclass(
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

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Hollow({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            raise CannotTraceError("its code depends on the values of activations")
        if func in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        given: list[Any] = []
        key = (func, _key_of(args, given), _key_of(tuple((kwargs or {}).items()), given))
        ledger: _Ledger = next(x.ledger for x in given if isinstance(x, Hollow))
        outcome = ledger.outcomes.get(key)
        if outcome is None:
            outcome = ledger.outcomes[key] = _outcome(func, args, kwargs or {}, given)
        ledger.flops += outcome.flops
        ledger.use(given)
        made = list(outcome.made_of(given))
        if func is aten._to_copy.default:
            ledger.tell_cast(given[0].meta, made[0])
        outs = [x if x is None or any(x is one for one in given) else Hollow(x, ledger) for x in made]
        return outs if outcome.is_list else tuple(outs) if len(outs) != 1 else outs[0]


class _Out(NamedTuple):
    """A tensor that an operation gives: an argument itself, a view of one, or a new one."""

    argument: int | None
    is_itself: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class _Outcome(NamedTuple):
    """What an operation on arguments of certain shapes gives. Layers are alike, so most are asked for many times."""

    outs: tuple[_Out | None, ...]
    is_list: bool
    flops: int

    def made_of(self, given: Sequence[Any]) -> Iterator[Any]:
        for out in self.outs:
            if out is None:
                yield None
            elif out.argument is None:
                yield torch.empty_strided(out.shape, out.stride, dtype=out.dtype, device=_META)
            elif out.is_itself:
                yield given[out.argument]
            else:
                yield given[out.argument].meta.as_strided(out.shape, out.stride, out.offset)


def _outcome(func: Any, args: Any, kwargs: dict[str, Any], given: Sequence[Any]) -> _Outcome:
    metas = [x.meta if isinstance(x, Hollow) else x.to(_META) for x in given]
    waiting = iter(metas)
    args, kwargs = tree_map_only(Tensor, lambda _: next(waiting), (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = _META
    result = func(*args, **kwargs)
    formula = flop_registry.get(func._overloadpacket)
    flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
    of_storage = {
        x.untyped_storage()._cdata: place for place, x in enumerate(metas) if isinstance(given[place], Hollow)
    }
    outs: list[_Out | None] = []
    for x in result if isinstance(result, (list, tuple)) else [result]:
        if not isinstance(x, Tensor):
            if x is not None:
                raise CannotTraceError(f"{func} gives no tensor")
            outs.append(None)
            continue
        itself = next((place for place, meta in enumerate(metas) if meta is x), None)
        source = itself if itself is not None else of_storage.get(x.untyped_storage()._cdata)
        outs.append(_Out(source, itself is not None, x.shape, x.stride(), int(x.storage_offset()), x.dtype))
    return _Outcome(tuple(outs), isinstance(result, list), flops)


def _key_of(value: Any, given: list[Any]) -> Any:
    """A value that is equal for arguments of equal shapes; the tensors among them are added to ``given``."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_key_of(one, given) for one in value)
    # 1, 1.0 and True are equal, but do not do the same.
    return type(value), value


class _Ledger:
    """Storages that live, by what they are.

    Attributes:
        weights: Storages that are there anyway: weights and their gradients.
        casts: Copies of weights in another type.
        elements: Of each weight.
        used: Weights that something was computed from.
    """

    def __init__(self) -> None:
        self.weights: set[int] = set()
        self.casts: dict[int, int] = {}
        self.elements: dict[int, int] = {}
        self.used: set[int] = set()
        self._held: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self.is_weight = True
        self.live_bytes = self.peak_bytes = self.flops = 0
        self.outcomes: dict[Any, _Outcome] = {}

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

    def start(self) -> None:
        """Peak and FLOPs are counted from here on."""
        self.peak_bytes, self.flops = self.live_bytes, 0
        self.used.clear()

    def use(self, given: Sequence[Any]) -> None:
        """Remember which weights something is computed from."""
        for x in given:
            if isinstance(x, Hollow) and (storage := x.meta.untyped_storage()._cdata) in self.elements:
                self.used.add(storage)

    def tell_cast(self, source: Tensor, copy: Tensor) -> None:
        """If it is a weight's copy, it is counted among casts."""
        if source.untyped_storage()._cdata in self.weights:
            storage = copy.untyped_storage()
            self.casts[storage._cdata] = storage.nbytes()


def trace(
    model: nn.Module,
    embed: Callable[[dict[str, Any]], Tensor],
    features: Mapping[str, Any],
    autocast: torch.dtype | None,
    *,
    merged: Mapping[str, Any] | None = None,
    held: Mapping[str, tuple[Tensor, ...]] | None = None,
) -> Trace:
    """Follow a mini-batch through both passes.

    Args:
        model: Hollow, as `hollow_out` leaves it, in training mode.
        embed: Its embeddings of some features.
        features: Of the mini-batch; tensors of floats are taken by their shape alone.
        autocast: Type that it computes in; None for that of the weights.
        merged: Features of what goes through the forward without graph; None leaves that out.
        held: More features, tensors of floats that stay through a step with their gradients, as weights do.

    Raises:
        CannotTraceError: The model cannot be followed so.
    """
    ledger = _ledger_of(model)
    ledger.is_weight = True
    stays = {name: tuple(_hollow_leaf(x, ledger) for x in tensors) for name, tensors in (held or {}).items()}
    ledger.is_weight = False

    def forward(inputs: Mapping[str, Any]) -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return embed({**{name: _hollow_floats(value, ledger) for name, value in inputs.items()}, **stays})

    saved: dict[int, int] = {}
    try:
        ledger.start()
        if merged is not None:
            with torch.no_grad():
                forward(merged)
        forward_bytes = ledger.peak_bytes
        ledger.start()
        with torch.autograd.graph.saved_tensors_hooks(_noted_in(saved, ledger), lambda x: x):
            e_nD = forward(features)
        casts, forward_flops = dict(ledger.casts), ledger.flops
        if e_nD.requires_grad:
            e_nD.float().sum().backward()
        backward_bytes, flops = ledger.peak_bytes, ledger.flops
    except CannotTraceError:
        raise
    except Exception as error:  # whatever a model's code raises that meets no numbers
        raise CannotTraceError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    graph_bytes = sum(nbytes for storage, nbytes in saved.items() if storage not in casts)
    return Trace(
        graph_bytes=graph_bytes,
        cast_bytes=sum(casts.values()),
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
        forward_flops=forward_flops,
        backward_flops=flops - forward_flops,
        used_elements=sum(ledger.elements[storage] for storage in ledger.used),
        trains=e_nD.requires_grad,
    )


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


def _ledger_of(model: nn.Module) -> _Ledger:
    first: Any = next(model.parameters())
    ledger: _Ledger = first.ledger
    return ledger


def _hollow_parameter(parameter: nn.Parameter, ledger: _Ledger) -> nn.Parameter:
    meta = parameter.detach().to(_META)
    ledger.elements[meta.untyped_storage()._cdata] = meta.numel()
    hollow = nn.Parameter(Hollow(meta, ledger), parameter.requires_grad)
    if parameter.requires_grad:
        # So that a backward adds to it, as all but the first of a step do.
        hollow.grad = Hollow(torch.empty_like(meta), ledger)
    return hollow


def _hollow_leaf(x: Tensor, ledger: _Ledger) -> Tensor:
    """One to which gradients are added, as all but the first of a step are, if it asks for them."""
    leaf = Hollow(torch.empty_like(x, device=_META), ledger).requires_grad_(x.requires_grad)
    if x.requires_grad:
        leaf.grad = Hollow(torch.empty_like(x, device=_META, requires_grad=False), ledger)
    return leaf


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
