"""From a checkpoint's name to a ``SentenceTransformer`` that is ready to train.

Two kinds of checkpoint are accepted: one that is a SentenceTransformer already, which keeps its modules, prompts and
pooling, and a raw vision-language model, which gets pooling and normalisation added.

Whatever type the checkpoint is stored in, the weights come up as fp32. sentence-transformers would keep a bf16
checkpoint in bf16, where an AdamW update at a learning rate of 2e-5 is lost to rounding for most weights.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import is_sentence_transformer_model
from torch import nn
from transformers.utils.hub import cached_file

from farnear.errors import UserError
from farnear.model.attention import VARLEN, register_varlen, tell_towers
from farnear.model.attention_choice import refuse_kernels
from farnear.model.hub import is_folder, refuse_missing_folder, refuse_unless_fetched
from farnear.model.patches import multiply_patches
from farnear.model.pixels import call_settings, image_processor_of, is_qwen_family
from farnear.offline import PREFETCH, is_offline
from farnear.sections import ModelConfig

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

FLOAT_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class BaseCheckpoint:
    """What the stored checkpoint looked like, for an export that looks the same.

    Attributes:
        weight_names: Of every stored tensor; empty where the weights are not safetensors.
        dtype: Type most of the stored elements have.
        architectures: As its config.json names them.
    """

    weight_names: frozenset[str]
    dtype: torch.dtype
    architectures: tuple[str, ...]


def load_model(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, with_weights: bool = True
) -> SentenceTransformer:
    """Load a model on the CPU with weights of one type.

    Args:
        config: Section `model` of the run file.
        dtype: fp32, or bf16 for training.pure_bf16.
        with_weights: False builds it on the meta device, without reading weights or taking memory for them.

    Raises:
        UserError: The checkpoint cannot be loaded, reads no images, or contradicts the section.
    """
    arguments = loading_arguments(config, dtype=dtype, with_weights=with_weights)
    with told_to_the_user(config):
        refuse_kernels(config, stored_config(config))
        has_modules = is_sentence_transformer_model(config.name_or_path, revision=config.revision)
    if has_modules and stored_kind(config) == "CrossEncoder":
        raise UserError(
            f"model {config.name_or_path} is a CrossEncoder, which scores pairs and embeds nothing; set "
            "model.name_or_path to an embedder, or to the vision-language model that it was made of"
        )
    with told_to_the_user(config):
        model = SentenceTransformer(
            config.name_or_path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            prompts=config.prompts,
            # sentence-transformers warns of a device beside a map.
            device="cpu" if with_weights else None,
            model_kwargs=arguments.model,
            processor_kwargs=arguments.processor,
        )
    settle(model, config, arguments)
    if not has_modules:
        model = _with_pooling(model, config)
    elif config.pooling is not None and (own := _pooling_of(model)) != config.pooling:
        raise UserError(
            f"model {config.name_or_path} has its own pooling ({own}), but model.pooling says {config.pooling}; "
            "take model.pooling out of the run file"
        )
    bring_to(dtype, model)
    return model


def stored_kind(config: ModelConfig) -> str | None:
    """SentenceTransformer or CrossEncoder, as a checkpoint that sentence-transformers has saved says; else None."""
    about = stored_file(config, "config_sentence_transformers.json")
    kind: str | None = json.loads(about.read_text(encoding="utf-8")).get("model_type") if about else None
    return kind


@dataclass(frozen=True)
class LoadingArguments:
    """What transformers' ``from_pretrained`` is given, for the model and for its processor."""

    model: dict[str, Any]
    processor: dict[str, Any]


def loading_arguments(config: ModelConfig, *, dtype: torch.dtype, with_weights: bool) -> LoadingArguments:
    """What the section says, as transformers takes it; see `load_model`.

    Raises:
        UserError: There is no such folder, or no network to ask for the model.
    """
    refuse_missing_folder(config.name_or_path)
    refuse_unless_fetched(config)
    if config.attn_implementation == VARLEN:
        register_varlen()
    model_kwargs: dict[str, Any] = {"dtype": dtype, **config.model_kwargs}
    if config.attn_implementation is not None:
        model_kwargs["attn_implementation"] = config.attn_implementation
    if not with_weights:
        model_kwargs["device_map"] = "meta"
    processor_kwargs = dict(config.processor_kwargs)
    for key in ("min_pixels", "max_pixels"):
        if (value := getattr(config, key)) is not None:
            processor_kwargs[key] = value
    return LoadingArguments(model_kwargs, processor_kwargs)


@contextmanager
def told_to_the_user(config: ModelConfig) -> Iterator[None]:
    """What libraries raise inside, while they load the model, leaves as a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # on a damaged folder the libraries raise almost anything
        no_folder = "" if Path(config.name_or_path).exists() else "no folder of that name is here, and the hub says: "
        raise UserError(
            f"model {config.name_or_path} cannot be loaded ({no_folder}{type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); "
            "check the folder or hub name, model.revision and model.model_kwargs"
            + ("" if is_folder(config.name_or_path) or not is_offline() else f". {PREFETCH}")
        ) from error


def settle(model: "BaseModel", config: ModelConfig, arguments: LoadingArguments) -> None:
    """What every loaded model goes through, in place.

    Raises:
        UserError: It reads no images.
    """
    if not model.supports("image"):
        raise UserError(
            f"model {config.name_or_path} has no image support (modalities: {', '.join(map(str, model.modalities))}), "
            "so it cannot read pages; set model.name_or_path to a vision-language model"
        )
    if config.attn_implementation == VARLEN:
        tell_towers(model)
    _keep_limits_of_pages_in_size(model, arguments.processor)


def bring_to(dtype: torch.dtype, model: "BaseModel") -> None:
    """All weights of one type, and patches embedded by a product; in place."""
    cast_weights(model, dtype)
    multiply_patches(model)
    wrong = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != dtype}
    if wrong:
        raise RuntimeError(f"weights came up as {', '.join(sorted(wrong))}, not {dtype}")


def _keep_limits_of_pages_in_size(model: "BaseModel", run_file: dict[str, Any]) -> None:
    """Leave what a Qwen2-VL processor was told about pixels where it looks last: in its image processor's ``size``.

    transformers hands what ``from_pretrained`` was given to every call again, and there it deprecates ``min_pixels``
    and ``max_pixels``; a checkpoint may bring arguments of its own for every call, and they would beat the run file's.
    Other processors may know no other way; they are left alone, and so are limits of videos.
    """
    image_processor = image_processor_of(model)
    if not is_qwen_family(image_processor):
        return
    size = dict(image_processor.size)
    weakest_first = [*list(call_settings(model))[::-1], dict(run_file)]
    for settings in weakest_first:
        size.update(settings.pop("size", None) or {})
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        for settings in weakest_first:
            if (limit := settings.pop(name, None)) is not None:
                size[edge] = limit
    image_processor.size = type(image_processor.size)(**size)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring all floating weights to one type. Buffers stay: rotary frequencies in bf16 would blur positions."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def embedding_dimension(model: SentenceTransformer) -> int:
    """Width of the model's embeddings."""
    dimension = model.get_embedding_dimension()
    if dimension is None:
        raise RuntimeError("the model does not tell its embedding dimension")
    return dimension


def describe_base(config: ModelConfig) -> BaseCheckpoint:
    """Names, type and architecture of the stored checkpoint, read from file headers only."""
    weight_names: set[str] = set()
    elements: dict[torch.dtype, int] = {}
    for path in weight_files(config):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                weight_names.add(name)
                tensor = file.get_slice(name)
                if (dtype := FLOAT_TYPES.get(tensor.get_dtype())) is not None:
                    elements[dtype] = elements.get(dtype, 0) + torch.Size(tensor.get_shape()).numel()
    dtype = max(elements, key=lambda kind: elements[kind]) if elements else torch.float32
    architectures = stored_config(config).get("architectures") or ()
    return BaseCheckpoint(frozenset(weight_names), dtype, tuple(architectures))


def _with_pooling(model: SentenceTransformer, config: ModelConfig) -> SentenceTransformer:
    pooling = Pooling(embedding_dimension(model), config.pooling or "lasttoken")
    modules = [model[0], pooling, *([Normalize()] if config.normalize else [])]
    return SentenceTransformer(modules=modules, device=model.device.type, prompts=config.prompts)


def _pooling_of(model: SentenceTransformer) -> str | None:
    return next((str(module.pooling_mode) for module in model if isinstance(module, Pooling)), None)


def weight_files(config: ModelConfig) -> list[Path]:
    """The checkpoint's safetensors; empty where it has others."""
    index = stored_file(config, "model.safetensors.index.json")
    if index is None:
        single = stored_file(config, "model.safetensors")
        return [single] if single else []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for name in names if (path := stored_file(config, name)) is not None]


def stored_config(config: ModelConfig) -> dict[str, Any]:
    """The checkpoint's config.json; empty where there is none."""
    path = stored_file(config, "config.json")
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def stored_file(config: ModelConfig, name: str) -> Path | None:
    """One of the checkpoint's files, brought from the hub if need be; None where it has none of that name."""
    found = cached_file(
        config.name_or_path, name, revision=config.revision, _raise_exceptions_for_missing_entries=False
    )
    return Path(found) if found else None
