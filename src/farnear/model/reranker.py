"""The module that every strategy wraps for a reranker: features of pairs in, scores out.

A page stands in several lists of a step, and its vision tower is the dearer half of every pair that it is in. So the
tower can be run by itself, once a page, and pairs be scored from what it gave: transformers takes a tower's outputs in
place of pixels (``mm_encoder_outputs``). What a step does with that is its own; here are the three forwards:

    features of pairs, with pixels      scores, as sentence-transformers computes them
    pixels and grids alone              image features: the tower's outputs of all images, end to end
    features of pairs, image features   scores, without the tower

Models for which that holds (`farnear.model.image_features` says what) are known by their structure (`shares_images`),
and tried before they are believed (`same_scores_shared`).

bf16 and fp16 are done here, as in `farnear.model.embedder`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn

from farnear.model.embedder import to_device
from farnear.model.heads import find_tied_rows, refuse_adapted_rows
from farnear.model.image_features import Layout, images_apart, layout_of
from farnear.model.pairs import PairPicker, PairPreprocessing, pick_images

# Of what `PairPreprocessing` adds, and not for the model.
_OWN_FEATURES = ("image_features", "distinct_grid_thw", "image_of_occurrence")


class Reranker(nn.Module):
    """Scores pairs; fp32 weights, computed in bf16 or fp16 on request.

    Args:
        model: Its forward must give ``scores`` [n, 1]. Whatever is done to its weights (adapters) is done.
        bf16, fp16: Whether the forward runs under autocast of that type; one of them at most.

    Raises:
        UserError: An adapter stands where the head computes two rows only.
    """

    def __init__(self, model: CrossEncoder, *, bf16: bool, fp16: bool = False) -> None:
        super().__init__()
        refuse_adapted_rows(model)
        find_tied_rows(model)
        self.model = model
        self._autocast = torch.bfloat16 if bf16 else torch.float16 if fp16 else None
        self._layout: Layout | None = None

    def forward(self, features: Mapping[str, Any]) -> Tensor:
        """What a mini-batch gives.

        Args:
            features: Of pairs, as `PairPreprocessing` or `PairPicker` make them, with ``pixel_values`` for each image
                occurrence or with ``image_features``, a tuple of one tensor [tokens, C] for each of them in the order
                of the pairs; or without ``input_ids`` those of distinct images (`pick_images`).

        Returns:
            Scores, raw, float32 [n]; or for images their features end to end, float32 [tokens of all, C], which
            `images_apart` parts; empty if the tower's outputs are not understood. One tensor however many images there
            are, for ZeRO-3 counts a module's outputs in the backward pass, and ranks must count alike.
        """
        with torch.autocast(self.model.device.type, self._autocast, enabled=self._autocast is not None):
            if "input_ids" not in features:
                return self._images(features)
            inputs = {name: value for name, value in features.items() if name not in _OWN_FEATURES}
            if shared := features.get("image_features"):
                if self._layout is None:
                    raise RuntimeError("image features are taken apart as the tower's forward has put them together")
                inputs["mm_encoder_outputs"] = {"image": self._layout.apart(shared)}
            # A tensor of its own: FSDP2 hangs a hook on what comes out, which an operation on a view would lose.
            return self.model(inputs)["scores"].squeeze(-1).float().clone()

    def _images(self, features: Mapping[str, Any]) -> Tensor:
        inner: Any = self.model.transformers_model
        outputs = inner.get_image_features(**features, return_dict=True)
        self._layout = layout_of(outputs, features["image_grid_thw"])
        if self._layout is None:
            return features["pixel_values"].new_zeros(0, 0)
        return torch.cat(self._layout.together(outputs))


def shares_images(model: CrossEncoder) -> bool:
    """Whether the model may be one whose tower can be run apart: by its structure, which proves nothing yet."""
    first, inner = model[0], model.transformers_model
    if inner is None or not isinstance(first, Transformer) or "message" not in first.modality_config:
        return False
    return (
        first.modality_config["message"]["method"] == "forward"
        and "mm_encoder_outputs" in inspect.signature(inner.forward).parameters
        and hasattr(inner, "get_image_features")
        and hasattr(first.processor, "image_processor")
    )


@torch.no_grad()
def same_scores_shared(
    forward: Callable[[dict[str, Any]], Tensor],
    preprocess: PairPreprocessing,
    pick: PairPicker,
    device: torch.device,
    *,
    tolerance: float = 1e-4,
) -> bool:
    """Whether pairs have the same scores from shared image features as with pixels of their own.

    A collective where a forward is one: every rank makes the same pairs and the same forwards, whatever comes of them.
    Ranks compute alike, but not to the last bit, so they have to agree on the worst answer.

    Args:
        forward: `Reranker`'s, or a strategy's around it.
        preprocess: One that shares images.
        pick: Of the same model.
        device: Where the module is.
        tolerance: Largest difference of two scores, relative to the largest score, or to 1 if that is smaller.
    """
    wide, tall = Image.new("RGB", (160, 96), "white"), Image.new("RGB", (96, 128), "navy")
    pairs = [("one", wide), ("two words", tall), ("a", "a text"), ("three", wide)]
    job = preprocess(pairs, "pair")
    if "distinct_grid_thw" not in job:
        return False
    features, occurrences = pick([job], [(0, i) for i in range(len(pairs))])
    whole = {**features, **pick_images([job], occurrences)}
    plain = forward(to_device(whole, device))
    tower = pick_images([job], [(0, 0), (0, 1)])
    images = images_apart(forward(to_device(tower, device)), tower["image_grid_thw"])
    if not images:
        return False
    shared = forward({**to_device(features, device), "image_features": tuple(images[i] for _, i in occurrences)})
    difference = float((shared - plain).abs().max())
    return difference <= tolerance * max(1.0, float(plain.abs().max()))
