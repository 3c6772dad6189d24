"""The module that every strategy wraps: features in, embeddings out.

A ``SentenceTransformer`` maps a dict of features to the same dict, enriched and changed in place. A gradient cache runs
each mini-batch twice, so this wrapper hands it a shallow copy and returns only the embedding.

bf16 and fp16 live here, inside the module, and nowhere else: the forward runs under autocast, so weights, gradients and
their reduction stay fp32 under every strategy alike, and no strategy has a precision of its own. What fp16 needs beside
(`farnear.parallel.loss_scale`) is around them all.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from torch import Tensor, nn

from farnear.model.inputs import given_to
from farnear.model.pixels import PixelBytes, preprocess_to_bytes, uint8_normalisation


class Embedder(nn.Module):
    """Embeds features; fp32 weights, computed in bf16 or fp16 on request.

    Args:
        model: Its forward must give ``sentence_embedding``.
        bf16, fp16: Whether the forward runs under autocast of that type; one of them at most.
    """

    def __init__(self, model: SentenceTransformer, *, bf16: bool, fp16: bool = False) -> None:
        super().__init__()
        self.model = model
        self._autocast = torch.bfloat16 if bf16 else torch.float16 if fp16 else None

    def forward(self, features: Mapping[str, Any]) -> Tensor:
        """Embeddings [n, D] of one mini-batch."""
        with torch.autocast(self.model.device.type, self._autocast, enabled=self._autocast is not None):
            return self.model(dict(features))["sentence_embedding"]


class WorkerPreprocessing:
    """A model's preprocessing, sent to worker processes without the weights.

    Pages leave as uint8 where the model's processor allows it (`farnear.model.pixels`), and `to_device` makes floats of
    them.

    Args:
        model: As loaded: a strategy may hang hooks and shards on it that no process can be sent.

    Attributes:
        pages_as_uint8: Whether they do.
        why_floats: Why they do not; empty if they do.
    """

    def __init__(self, model: BaseModel) -> None:
        self._model = model
        self._snapshot = _pickled_without_weights(model)
        rule = uint8_normalisation(model)
        self._normalisation = None if isinstance(rule, str) else rule
        self.why_floats = rule if isinstance(rule, str) else ""

    @property
    def pages_as_uint8(self) -> bool:
        return self._normalisation is not None

    def _features(self, call: Callable[..., Mapping[str, Any]]) -> dict[str, Any]:
        """What a call of the model's ``preprocess`` gives, with its pages as uint8 if they can be."""
        return dict(call()) if self._normalisation is None else preprocess_to_bytes(call, self._normalisation)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_model"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model = pickle.loads(self._snapshot)


class Preprocessing(WorkerPreprocessing):
    """From inputs and their side to features, with the side's prompt.

    The prompt is chosen as `encode_query` and `encode_document` choose it, so that an exported model used through them
    sees what it was trained on.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__(model)
        document = next((model.prompts[n] for n in ("document", "passage", "corpus") if n in model.prompts), None)
        self._prompts = {"query": model.prompts.get("query"), "document": document}

    def __call__(self, inputs: list[Any], side: str) -> dict[str, Any]:
        """Features of one mini-batch; ``side`` is "query" or "document"."""
        taken, arguments = given_to(self._model, inputs, side)
        own = arguments.pop("processing_kwargs", {})

        def call(processing_kwargs: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
            of_call = {**own, **(processing_kwargs or {})}
            how = {**arguments, **({"processing_kwargs": of_call} if of_call else {})}
            # Told what its inputs are, a Router does not look at them for what they might be.
            reads: Any = self._model[0] if "modality" in how else self._model
            features: Mapping[str, Any] = reads.preprocess(taken, prompt=self._prompts[side], task=side, **how)
            return features

        return self._features(call)


def _pickled_without_weights(model: nn.Module) -> bytes:
    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, nn.Parameter):
                return _parameter_without_data, (value.shape, value.dtype, value.requires_grad)
            return NotImplemented

    stream = io.BytesIO()
    Pickler(stream).dump(model)
    return stream.getvalue()


def _parameter_without_data(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)


def to_device(features: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The features with their tensors on ``device``, as the model takes them: pages that came as uint8 are floats."""
    return {name: _on_device(value, device) for name, value in features.items()}


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, PixelBytes):
        return value.floats_on(device)
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
