"""The module that every strategy wraps: features in, embeddings out.

A ``SentenceTransformer`` maps a dict of features to the same dict, enriched and changed in place. A gradient cache runs
each mini-batch twice, so this wrapper hands it a shallow copy and returns only the embedding.

bf16 lives here, inside the module, and nowhere else: the forward runs under autocast, so weights, gradients and their
reduction stay fp32 under single, ddp and every ZeRO stage alike, and no strategy has a precision of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn


class Embedder(nn.Module):
    """Embeds features; fp32 weights, computed in bf16 on request.

    Args:
        model: Its forward must give ``sentence_embedding``.
        bf16: Whether the forward runs under bf16 autocast.
    """

    def __init__(self, model: SentenceTransformer, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._bf16 = bf16

    def forward(self, features: Mapping[str, Any]) -> Tensor:
        """Embeddings [n, D] of one mini-batch."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._bf16):
            return self.model(dict(features))["sentence_embedding"]


def preprocessing(model: SentenceTransformer) -> Callable[[list[Any], str], dict[str, Any]]:
    """The function from inputs and their side to features, with the side's prompt.

    The prompt is chosen as `encode_query` and `encode_document` choose it, so that an exported model used through them
    sees what it was trained on.
    """
    prompts = {"query": model.prompts.get("query")}
    prompts["document"] = next(
        (model.prompts[n] for n in ("document", "passage", "corpus") if n in model.prompts), None
    )

    def preprocess(inputs: list[Any], side: str) -> dict[str, Any]:
        return dict(model.preprocess(inputs, prompt=prompts[side], task=side))

    return preprocess


def to_device(features: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The features with their tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }
