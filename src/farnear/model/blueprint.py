"""A model from its config.json alone: its parameters counted, its passes traced, no weight read.

The model is built on torch's meta device as a run would build it: trained parts chosen, adapters put in, activations
checkpointed, then made hollow (`farnear.model.hollow`). What goes through it is made up: pages of a number of visual
tokens, texts of a number of tokens. Around both stand as many tokens as the index's costs assume for a template.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.model.declared import Declared, PageShape, declared_pages, declared_width, read_declared
from farnear.model.hollow import Trace, hollow_out, trace
from farnear.model.patches import multiply_patches
from farnear.sections import ModelConfig

TOKENS_OF_TEMPLATE = 16
"""As `farnear.data.budget` counts them."""

LARGEST_SMALL_BLOCK = 32 * 2**20
"""Larger ones glibc's malloc gives back to the system at once, smaller ones stay in its heap."""


class Blueprint(nn.Module):
    """A hollow model, with the pooling and normalisation that an embedder has.

    Attributes:
        width: Of its embeddings.
        pages: How it reads them.
        parameters_in_all, trained: Elements.
        weight_bytes: As a run holds them.
        largest_trained: Elements of the largest trained parameter.
        small_trained: Elements of trained parameters that are small blocks for malloc.
        is_dual: Whether it is a dual encoder (CLIP, SigLIP), of which nothing below is known but parameters.
        units: Elements of each transformer block, the last entry being all the rest: what FSDP2 gathers together.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        super().__init__()
        self._config = config
        self._settings = read_declared(folder / "config.json")
        self.width = declared_width(self._settings, folder)
        self.pages = declared_pages(config.model, self._settings, folder)
        training = config.training
        holder = nn.Module()
        holder.model = _on_meta(self._settings.values, _traced_attention(config.model), config.model)
        # The names are those of a SentenceTransformer, which patterns of model.freeze are compared with.
        self.add_module("0", holder)
        multiply_patches(self)
        if training.pure_bf16:
            for parameter in self.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        # Such a model has a tower a kind, and no hidden state of both.
        self.is_dual = hasattr(holder.model, "get_text_features")
        self._choose_trainable(config)
        parameters = list(self.parameters())
        trained = [parameter.numel() for parameter in parameters if parameter.requires_grad]
        self.parameters_in_all, self.trained = sum(p.numel() for p in parameters), sum(trained)
        self.weight_bytes = sum(parameter.nbytes for parameter in parameters)
        self.element_bytes = 2 if training.pure_bf16 else 4
        self.largest_trained = max(trained)
        self.small_trained = sum(n for n in trained if n * self.element_bytes < LARGEST_SMALL_BLOCK)
        self.units = _units(self)
        self.autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
        self.train()
        hollow_out(self)

    @property
    def transformers_model(self) -> Any:
        """By the name that a SentenceTransformer has for it."""
        return self._modules["0"].model  # type: ignore[union-attr]

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.transformers_model.gradient_checkpointing_enable(**kwargs)

    def embed(self, features: dict[str, Any]) -> Tensor:
        """Embeddings of the last tokens, normalised, as `farnear.model.load` adds them to a raw model."""
        hidden_nTD = self.transformers_model(**features, return_dict=True).last_hidden_state
        mask_nT1 = features["attention_mask"].unsqueeze(-1).expand_as(hidden_nTD).to(hidden_nTD.dtype)
        last_n1D = torch.full((len(hidden_nTD), 1, hidden_nTD.shape[2]), hidden_nTD.shape[1] - 1)
        return nn.functional.normalize(torch.gather(hidden_nTD * mask_nT1, 1, last_n1D).squeeze(1), dim=1)

    def trace(self, inputs: int, *, text_tokens: int, visual_tokens: int = 0, together: int | None = None) -> Trace:
        """Follow a mini-batch of equal inputs.

        Args:
            text_tokens: Of each, a template's included.
            visual_tokens: Of each; 0 for texts.
            together: Inputs of the forward without graph; None leaves it out.

        Raises:
            CannotTraceError: The model cannot be followed.
        """
        make = _maker(self._settings, self.pages, text_tokens, visual_tokens)
        return trace(self, self.embed, make(inputs), self.autocast, merged=None if together is None else make(together))

    def _choose_trainable(self, config: RunConfig) -> None:
        from farnear.model.trainable import checkpoint_activations, choose_trainable, store_frozen_in

        stand_in: Any = self
        with torch.device("meta"):
            choose_trainable(stand_in, config.model, seed=config.seed)
        training = config.training
        if (training.bf16 or training.fp16) and config.strategy in ("single", "ddp"):
            store_frozen_in(torch.bfloat16 if training.bf16 else torch.float16, self)
        if training.gradient_checkpointing:
            checkpoint_activations(stand_in)


def find_config(config: ModelConfig, run_file: Path) -> Path:
    """The folder that holds the model's config.json. Nothing is downloaded.

    Looked for in the model's folder, in the hub's cache on this machine, beside the run file in a folder named like the
    model (`qwen3-vl-embedding-2b/` for `Qwen/Qwen3-VL-Embedding-2B`), and beside the run file itself.

    Raises:
        UserError: It is in none of them.
    """
    name = config.name_or_path
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        raise UserError(f"model folder {folder} has no config.json, by which memory is planned; copy it there")
    last = name.rstrip("/").rpartition("/")[2]
    beside = [run_file.parent / last, run_file.parent / last.lower(), run_file.parent]
    from huggingface_hub import try_to_load_from_cache

    with_slash = name.count("/") <= 1
    cached = try_to_load_from_cache(name, "config.json", revision=config.revision) if with_slash else None
    if isinstance(cached, str):
        return Path(cached).parent
    for place in beside:
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"there is no model folder {name} here, and the config.json of the hub's model of that name, by which memory "
        "is planned, is neither in the hub's cache nor beside the run file; correct model.name_or_path, run `farnear "
        f"prefetch {run_file}` where there is a network, or put it into {run_file.parent / last.lower()}/config.json"
    )


def _on_meta(settings: dict[str, Any], attention: str, config: ModelConfig) -> nn.Module:
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    settings = {key: value for key, value in settings.items() if key != "auto_map"}
    try:
        built = AutoConfig.for_model(**{**settings, **config.model_kwargs.get("config_kwargs", {})})
        with torch.device("meta"), no_init_weights():
            model: nn.Module = AutoModel.from_config(built, attn_implementation=attention, dtype=torch.float32)
    except Exception as error:  # whatever a config makes transformers raise
        raise UserError(
            f"the config.json of model {config.name_or_path} describes no model that transformers knows here "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); install the version that it needs"
        ) from error
    return model


def _traced_attention(config: ModelConfig) -> str:
    """Packed and compiled attentions are traced as sdpa: they save the same."""
    return "eager" if config.attn_implementation == "eager" else "sdpa"


def _units(model: nn.Module) -> tuple[int, ...]:
    names = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks = [sum(p.numel() for p in part.parameters()) for part in model.modules() if type(part).__name__ in names]
    return (*blocks, sum(p.numel() for p in model.parameters()) - sum(blocks))


def _maker(
    settings: Declared, pages: PageShape, text_tokens: int, visual_tokens: int
) -> Callable[[int], dict[str, Any]]:
    """Makes the features of some equal inputs. A page's visual tokens stand in one row: their number is what counts."""
    image_token = settings.number("image_token_id", least=0) or settings.number("image_token_index", least=0) or 0
    start_token = settings.number("vision_start_token_id", least=0)

    def make(inputs: int) -> dict[str, Any]:
        before = torch.full((inputs, text_tokens // 2), 1)
        if visual_tokens and start_token is not None and text_tokens > 1:
            before[:, -1] = start_token
        after = torch.full((inputs, text_tokens - text_tokens // 2), 1)
        visual = torch.full((inputs, visual_tokens), image_token)
        input_ids = torch.cat([before, visual, after], dim=1)
        features = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if visual_tokens:
            patches = inputs * visual_tokens * pages.merge**2
            columns = pages.channels * pages.frames * pages.patch_pixels**2
            features["pixel_values"] = torch.empty(patches, columns, device="meta")
            features["image_grid_thw"] = torch.tensor([[1, pages.merge, visual_tokens * pages.merge]] * inputs)
            features["mm_token_type_ids"] = (input_ids == image_token).to(torch.int32)
        return features

    return make
