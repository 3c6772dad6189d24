"""From a checkpoint's name to a ``SentenceTransformer`` that is ready to train.

Three kinds of model are accepted: one that is a SentenceTransformer already, a Router of several among them, which
keeps its modules, prompts and pooling; a raw model of transformers that reads pages, which gets pooling and
normalisation added; and several of either kind, which are joined (`farnear.model.router`).

Whatever type a checkpoint is stored in, the weights come up as fp32. sentence-transformers would keep a bf16
checkpoint in bf16, where an AdamW update at a learning rate of 2e-5 is lost to rounding for most weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import is_sentence_transformer_model
from torch import nn

from farnear.errors import UserError
from farnear.model.attention import VARLEN, register_varlen, tell_towers
from farnear.model.attention_choice import refuse_kernels
from farnear.model.hub import is_folder, refuse_absent
from farnear.model.patches import multiply_patches
from farnear.model.pixels import call_settings, image_processor_of, is_qwen_family
from farnear.model.router import join
from farnear.model.stored import stored_configs, stored_kind
from farnear.model.towers import KINDS, know_combinations, modalities_of, readers
from farnear.offline import PREFETCH, is_offline
from farnear.sections import ModelConfig

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel


def load_model(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, with_weights: bool = True, seed: int = 0
) -> SentenceTransformer:
    """Load a model on the CPU with weights of one type.

    Args:
        config: Section `model` of the run file.
        dtype: fp32, or bf16 for training.pure_bf16.
        with_weights: False builds it on the meta device, without reading weights or taking memory for them.
        seed: Of what begins as random numbers, which has to be the same on every rank.

    Raises:
        UserError: The checkpoint cannot be loaded, reads texts alone, or contradicts the section.
    """
    if config.router is None:
        model = _load_one(config, dtype, with_weights)
    else:
        towers = {}
        for name, tower in config.towers.items():
            with _told_by(f"model.router.{name}"):
                towers[name] = _load_one(tower, dtype, with_weights)
        model = join(towers, config, seed=seed)
    refuse_text_alone(model, config)
    know_combinations(model)
    if config.router is None and config.pooling is not None and (own := _pooling_of(model)) != config.pooling:
        raise UserError(
            f"model {config.name_or_path} has its own pooling ({own or 'by its last layers'}), but model.pooling says "
            f"{config.pooling}; take model.pooling out of the run file"
        )
    bring_to(dtype, model)
    return model


def _load_one(config: ModelConfig, dtype: torch.dtype, with_weights: bool) -> SentenceTransformer:
    """A model by its name, with what a raw one lacks."""
    arguments = loading_arguments(config, dtype=dtype, with_weights=with_weights)
    with told_to_the_user(config):
        for stored in stored_configs(config):
            refuse_kernels(config, stored)
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
    return model if has_modules else _with_pooling(model, config)


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
    refuse_absent(config)
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
    """What every loaded model goes through, in place."""
    if config.attn_implementation == VARLEN:
        tell_towers(model)
    for reader in readers(model):
        _keep_limits_of_pages_in_size(reader, arguments.processor)
        _pad_as_trained(reader)


def refuse_text_alone(model: "BaseModel", config: ModelConfig) -> None:
    """Raise UserError for a model that reads nothing but texts."""
    if not any(model.supports(kind) for kind in KINDS if kind != "text"):  # type: ignore[arg-type]
        raise UserError(
            f"model {config.title} has no image support (modalities: {modalities_of(model)}), "
            "so it cannot read pages; set model.name_or_path to a vision-language model, or join it with one that "
            "reads images in model.router"
        )


def bring_to(dtype: torch.dtype, model: "BaseModel") -> None:
    """All weights of one type, and patches embedded by a product; in place."""
    cast_weights(model, dtype)
    multiply_patches(model)
    wrong = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != dtype}
    if wrong:
        raise RuntimeError(f"weights came up as {', '.join(sorted(wrong))}, not {dtype}")


def _keep_limits_of_pages_in_size(reader: Any, run_file: dict[str, Any]) -> None:
    """Leave what a Qwen2-VL processor was told about pixels where it looks last: in its image processor's ``size``.

    transformers hands what ``from_pretrained`` was given to every call again, and there it deprecates ``min_pixels``
    and ``max_pixels``; a checkpoint may bring arguments of its own for every call, and they would beat the run file's.
    Other processors may know no other way; they are left alone, and so are limits of videos.
    """
    image_processor = image_processor_of(reader)
    if "image" not in getattr(reader, "modalities", ()):
        # All towers were given the same, and a tokenizer stores what it was given.
        for name in ("min_pixels", "max_pixels"):
            getattr(getattr(reader, "tokenizer", None), "init_kwargs", {}).pop(name, None)
    if not is_qwen_family(image_processor):
        return
    size = dict(image_processor.size)
    weakest_first = [*list(call_settings(reader))[::-1], dict(run_file)]
    for settings in weakest_first:
        size.update(settings.pop("size", None) or {})
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        for settings in weakest_first:
            if (limit := settings.pop(name, None)) is not None:
                size[edge] = limit
    image_processor.size = type(image_processor.size)(**size)


def _pad_as_trained(reader: Any) -> None:
    """Have SigLIP's texts padded to the length that it was trained with, unless the checkpoint says how; in place.

    It reads the last token's place, and its tokenizer masks nothing: padded to the longest text of a batch, as
    sentence-transformers does, a text's embedding depends on the texts beside it.
    """
    settings: Any = getattr(reader, "config", None) if isinstance(reader, Transformer) else None
    if not str(getattr(settings, "model_type", "")).startswith("siglip") or "text" not in reader.modalities:
        return
    text = reader.processing_kwargs.setdefault("text", {})
    if "padding" not in text:
        length = getattr(settings, "text_config", settings).max_position_embeddings
        text.update({"padding": "max_length", "max_length": length, **text})


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring all floating weights to one type. Buffers stay: rotary frequencies in bf16 would blur positions."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _with_pooling(model: SentenceTransformer, config: ModelConfig) -> SentenceTransformer:
    """A raw model's embedding: of its tokens, unless it has one of its own, as dual encoders do."""
    reader: Any = model[0]
    pooling = []
    if reader.module_output_name == "token_embeddings":
        # Without a chat template there is nothing of a generator's in it, and the last token is as any other.
        reads_to_the_end = "message" in reader.modalities or _is_causal(reader)
        mode = config.pooling or ("lasttoken" if reads_to_the_end else "mean")
        pooling = [Pooling(reader.get_embedding_dimension(), mode)]
    modules = [reader, *pooling, *([Normalize()] if config.normalize else [])]
    return SentenceTransformer(modules=modules, device=model.device.type, prompts=config.prompts)


def _is_causal(reader: Transformer) -> bool:
    return any(name.endswith("ForCausalLM") for name in reader.config.architectures or ())


def _pooling_of(model: SentenceTransformer) -> str | None:
    return next((str(module.pooling_mode) for module in model.modules() if isinstance(module, Pooling)), None)


@contextmanager
def _told_by(key: str) -> Iterator[None]:
    """Errors of loading name the run file's key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {str(error).replace('model.name_or_path', key)}") from None
