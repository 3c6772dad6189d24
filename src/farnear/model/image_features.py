"""What a vision tower gives the language model of an image, as one tensor.

Image features of an image are one float32 tensor [tokens, C]: everything that the language model takes from the tower
for it (its embeddings, and under deepstack those for later layers) side by side. A gradient cache then has one tensor
an image to hold and to sum gradients into, whatever the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ImageFeatures = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """How a tower's outputs lie side by side.

    Attributes:
        kind: Class of the outputs.
        widths: Of each field's pieces, in order. A field of one tensor an image has one.
        nested: Fields that are lists of pieces, as deepstack's.
    """

    kind: type
    widths: Mapping[str, tuple[int, ...]]
    nested: frozenset[str]

    def together(self, outputs: Mapping[str, Any]) -> ImageFeatures:
        pieces = [piece for name in self.widths for piece in self._pieces(name, outputs)]
        return tuple(torch.cat(of_image, dim=-1).float() for of_image in zip(*pieces, strict=True))

    def apart(self, features: Sequence[Tensor]) -> Any:
        widths = [width for of_field in self.widths.values() for width in of_field]
        of_image = [feature_tC.split(widths, dim=-1) for feature_tC in features]
        pieces = iter([tuple(parts[i] for parts in of_image) for i in range(len(widths))])
        fields = {name: [next(pieces) for _ in of_field] for name, of_field in self.widths.items()}
        return self.kind(**{name: value if name in self.nested else value[0] for name, value in fields.items()})

    def _pieces(self, name: str, outputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        return outputs[name] if name in self.nested else [outputs[name]]


def layout_of(outputs: Any, grid_thw: Tensor) -> Layout | None:
    """None where the outputs do not hold the embeddings of each image apart, in number as its patches."""
    images = len(grid_thw)

    def is_of_images(value: Any) -> bool:
        return (
            isinstance(value, (tuple, list))
            and len(value) == images
            and all(isinstance(one, Tensor) and one.ndim == 2 for one in value)
        )

    widths: dict[str, tuple[int, ...]] = {}
    nested = set()
    for name, value in outputs.items():
        if is_of_images(value):
            widths[name] = (value[0].shape[1],)
        elif isinstance(value, (tuple, list)) and all(is_of_images(piece) for piece in value):
            widths[name] = tuple(piece[0].shape[1] for piece in value)
            nested.add(name)
    if "pooler_output" not in widths or "pooler_output" in nested:
        return None
    lengths = [len(one) for one in outputs["pooler_output"]]
    pieces = [piece for name in widths for piece in (outputs[name] if name in nested else [outputs[name]])]
    if any([len(one) for one in piece] != lengths for piece in pieces):
        return None
    if lengths != _tokens_of(grid_thw, sum(lengths)):
        return None
    return Layout(type(outputs), widths, frozenset(nested))


def images_apart(feature_TC: Tensor, grid_thw: Tensor) -> ImageFeatures:
    """The features of each image, of those of all end to end; an image has tokens as its grid has patches.

    Args:
        grid_thw: int64 [images, 3].
    """
    if not len(feature_TC):
        return ()
    return feature_TC.split(_tokens_of(grid_thw, len(feature_TC)))


def _tokens_of(grid_thw: Tensor, tokens: int) -> list[int]:
    patches = grid_thw.prod(-1)
    lengths: list[int] = (patches * tokens // patches.sum()).tolist()
    return lengths
