"""Several mini-batches as one, for the pass in which no graph is built.

A mini-batch is as large as its graph allows; without a graph several of them fit, and fewer, larger forwards keep a
device busier. The data workers prepared them one by one, so they are put together from their features: token sequences
are padded to the longest, everything else (patches, grids) is one after the other.

What is padded how is the tokenizer's to say: the side it pads on, the token it pads with. Tensors of the shape of the
attention mask hold a value a token; all others an entry an image. Whether that is right for a model is not believed but
tried at the start of a run, in which mini-batches must have the same embeddings together as apart
(`farnear.training.choices`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from sentence_transformers.base.model import BaseModel
from torch import Tensor

from farnear.model.pixels import PixelBytes
from farnear.model.towers import reader_of


class CannotMergeError(ValueError):
    """The features are of a kind that does not say how to put them together."""


class TokenPadding:
    """Pads features by token as a tokenizer does: on its side, with its token.

    Args:
        reader: Whose tokenizer it is: a model, or the part of it that has read the features' inputs.
    """

    def __init__(self, reader: Any) -> None:
        tokenizer = getattr(reader, "tokenizer", None)
        self._pads_left = getattr(tokenizer, "padding_side", "right") == "left"
        self._padding = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0}

    def __call__(self, name: str, value: Tensor, longest: int) -> Tensor:
        """A feature [n, L, ...] as [n, longest, ...]."""
        missing = longest - value.shape[1]
        padding = value.new_full((len(value), missing, *value.shape[2:]), self._padding.get(name, 0))
        return torch.cat([padding, value] if self._pads_left else [value, padding], dim=1)


class FeatureMerger:
    """Puts features of mini-batches of one modality together.

    Args:
        model: Whose preprocessing made them.
    """

    def __init__(self, model: BaseModel) -> None:
        self._model = model

    def __call__(self, features_m: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One mini-batch's features of m.

        Raises:
            CannotMergeError: A feature is neither a tensor, nor a list, nor the same in all of them.
        """
        first = features_m[0]
        # A Router says what its route was chosen by.
        kinds = first.get("modality", "text")
        kind = kinds if isinstance(kinds, str) else "+".join(kinds)
        padded = TokenPadding(reader_of(self._model, first.get("task", "document"), kind))
        if any(features.keys() != first.keys() for features in features_m):
            raise CannotMergeError("the mini-batches have different features")
        masks = [features.get("attention_mask") for features in features_m]
        longest = max((mask.shape[1] for mask in masks if isinstance(mask, Tensor)), default=0)
        return {
            name: _merged(name, [features[name] for features in features_m], masks, partial(padded, longest=longest))
            for name in first
        }


def _merged(name: str, values: list[Any], masks: list[Any], padded: Callable[[str, Tensor], Tensor]) -> Any:
    first = values[0]
    if isinstance(first, PixelBytes):
        return PixelBytes(torch.cat([value.patch_PB for value in values]), first.normalisation)
    if isinstance(first, Tensor) and first.ndim:
        is_by_token = all(
            mask is not None and value.shape[:2] == mask.shape for value, mask in zip(values, masks, strict=True)
        )
        return torch.cat([padded(name, value) for value in values] if is_by_token else values)
    if isinstance(first, list):
        return [one for value in values for one in value]
    if not isinstance(first, Tensor) and all(value == first for value in values):
        return first
    raise CannotMergeError(f"feature {name} is a {type(first).__name__}")
