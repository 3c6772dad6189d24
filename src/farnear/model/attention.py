"""Attention without padding: `model.attn_implementation: varlen`.

It attends to sequences of different lengths that lie packed one behind the other, through torch's own kernel
(``torch.nn.attention.varlen``, torch 2.11 and newer), which needs no package beside torch. Two places gain from it:

- a vision tower of the Qwen family has all images of a mini-batch packed in one sequence. Under sdpa it cuts them apart
  and attends to one after the other; here it is one call;
- the language model gets a batch that is padded to its longest row. Under sdpa it attends to the padding and throws the
  result away; here the tokens are packed first, and the padding costs this layer nothing.

transformers looks a function up by the name in a model's config, and farnear registers its own under two names. For the
language model it is ``varlen``. A vision tower tells its attention where images begin only if that name contains
"flash", so towers that know such places get the other name once they are loaded; while loading, transformers would take
any such name for a kernel to be fetched.

Where there is no GPU the same function goes through the sequences one by one with sdpa. It is the reference that the
packing is tested with, and no slower than what transformers does there.

Shapes: B rows of N tokens, S sequences of T tokens in all, H heads, K heads of key and value, D a head's width.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from farnear.errors import UserError

VARLEN = "varlen"
VARLEN_OF_TOWERS = "farnear_flash_varlen"


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch are.

    Attributes:
        place_T: Their places in the batch, its rows laid end to end.
        start_S1: Where each row's tokens begin among them, int32, and their number at the end.
        longest: Tokens in the longest row.
    """

    place_T: Tensor
    start_S1: Tensor
    longest: int


def register_varlen() -> None:
    """Make transformers know the two names; calling it again changes nothing."""
    for name in (VARLEN, VARLEN_OF_TOWERS):
        AttentionInterface.register(name, varlen_attention)
        AttentionMaskInterface.register(name, packing_of)


def tell_towers(model: nn.Module) -> None:
    """Give the vision towers of a loaded model the name under which they say where images begin; in place.

    Raises:
        UserError: The model has dropout in its attention.
    """
    for module in model.modules():
        if getattr(module, "attention_dropout", 0.0):
            raise UserError(
                "model.attn_implementation: varlen has no dropout, and the model has some in its attention; set sdpa"
            )
        settings: Any = getattr(module, "config", None)
        if getattr(settings, "_attn_implementation", None) == VARLEN and _is_told_of_sequences(module):
            settings._attn_implementation = VARLEN_OF_TOWERS


def packing_of(
    *, kv_length: int, attention_mask: Tensor | None = None, mask_function: Any = causal_mask_function, **_: Any
) -> Packing | None:
    """What transformers hands to every layer's attention as its mask: None where no row is padded.

    Args:
        attention_mask: [B, N], True at tokens.

    Raises:
        UserError: The model asks for a mask that is neither causal nor open in both directions.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise _cannot("a mask of the model's own")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.shape[1] != kv_length:
        raise _cannot("a cache of keys and values")
    length_B = attention_mask.sum(1)
    length_S = length_B[length_B > 0]
    start_S1 = pad(length_S.cumsum(0), (1, 0)).to(torch.int32)
    return Packing(attention_mask.flatten().nonzero().flatten(), start_S1, int(length_S.max()))


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: [B, H, N, D]; ``key`` and ``value`` [B, K, N, D].
        attention_mask: A `Packing`, or None where no row is padded.
        kwargs: ``cu_seq_lens_q`` and ``max_length_q`` where the caller has packed its sequences itself.

    Returns:
        ``([B, N, H, D], None)``; zeros at padding.

    Raises:
        UserError: The layer asks for what the kernel does not do.
    """
    if dropout:
        raise _cannot("dropout")
    for option in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise _cannot(option)
    if key.shape[2] != query.shape[2]:
        raise _cannot("a cache of keys and values")
    if attention_mask is not None and not isinstance(attention_mask, Packing):
        raise _cannot("a mask of the model's own")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    rows, _, length, _ = query.shape
    if torch.is_autocast_enabled(query.device.type):
        # Norms leave queries and keys in fp32.
        type_ = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(type_), key.to(type_), value.to(type_)
    # A row of the batch after the other: [B N, heads, D].
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if attention_mask is not None:
        place_T, start_S1, longest = attention_mask.place_T, attention_mask.start_S1, attention_mask.longest
        q_THD, k_TKD, v_TKD = (x.index_select(0, place_T) for x in (q, k, v))
        o_THD = attend(q_THD, k_TKD, v_TKD, start_S1, longest, causal=causal, scale=scaling)
        o = o_THD.new_zeros(rows * length, *o_THD.shape[1:]).index_copy(0, place_T, o_THD)
    else:
        start_S1, longest = torch.arange(0, rows * length + 1, length, device=query.device), length
        if kwargs.get("cu_seq_lens_q") is not None:
            start_S1, longest = kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"])
        o = attend(q, k, v, start_S1.to(torch.int32), longest, causal=causal, scale=scaling)
    return o.unflatten(0, (rows, length)), None


def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, start_S1: Tensor, longest: int, *, causal: bool, scale: float | None
) -> Tensor:
    """Each sequence's attention to itself; [T, H, D].

    Args:
        q_THD: The sequences one behind the other; H is a multiple of K.
        start_S1: Where each begins, int32, and T at the end.
        longest: Tokens in the longest.
        scale: Factor on the products of queries and keys; None for 1 / sqrt(D).
    """
    if not q_THD.is_cuda:
        return one_by_one(q_THD, k_TKD, v_TKD, start_S1, causal=causal, scale=scale)
    from torch.nn.attention.varlen import varlen_attn

    return by_kernel(varlen_attn, q_THD, k_TKD, v_TKD, start_S1, longest, causal=causal, scale=scale)


def by_kernel(
    kernel: Callable[..., Any],
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    start_S1: Tensor,
    longest: int,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """`attend` by torch's ``varlen_attn``, whose arguments are not the same in all versions of torch."""
    known = inspect.signature(kernel).parameters
    options: dict[str, Any] = {"scale": scale}
    options |= {"window_size": (-1, 0) if causal else (-1, -1)} if "window_size" in known else {"is_causal": causal}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        groups = q_THD.shape[1] // k_TKD.shape[1]
        k_TKD, v_TKD = (x.repeat_interleave(groups, 1) for x in (k_TKD, v_TKD))
    # The same tensor of starts twice: cuDNN, which torch prefers where it can, is causal only then.
    return kernel(
        q_THD.contiguous(), k_TKD.contiguous(), v_TKD.contiguous(), start_S1, start_S1, longest, longest, **options
    )


def one_by_one(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, start_S1: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    """`attend` in plain torch: the reference."""
    lengths = start_S1.diff().tolist()
    parts = []
    for q_tHD, k_tKD, v_tKD in zip(*(x.split(lengths) for x in (q_THD, k_TKD, v_TKD)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_tHD, k_tKD, v_tKD))
        o = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        parts.append(o[0].transpose(0, 1))
    return torch.cat(parts)


def _is_told_of_sequences(module: nn.Module) -> bool:
    return "cu_seqlens" in inspect.signature(module.forward).parameters


def _cannot(what: str) -> UserError:
    return UserError(f"model.attn_implementation: varlen cannot do {what}, which this model asks for; set sdpa")
