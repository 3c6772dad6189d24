"""One of transformers' models from its config.json, on torch's meta device, and the inputs that it is traced with.

Inputs are made up: pages of a number of visual tokens, or of the one size that a dual encoder takes, and texts of a
number of tokens.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farnear.errors import UserError
from farnear.model.config_files import CONFIG, TowerFiles
from farnear.model.declared import (
    Declared,
    PageShape,
    declared_pages,
    declared_width,
    pages_of_one_size,
    read_declared,
    told,
)
from farnear.model.hollow import CannotTraceError
from farnear.model.towers import KINDS
from farnear.sections import ModelConfig

Features = dict[str, Any]


class Tower(nn.Module):
    """A transformers model with the linear layers behind it, under the names that sentence-transformers gives them.

    Attributes:
        is_dual: Whether it has a way of its own for each kind (CLIP, SigLIP, CLAP).
        kinds: What it reads, one at a time.
        pages: How it reads them.
        width: Of its embeddings.
    """

    def __init__(self, config: ModelConfig, files: TowerFiles, task: str = "AutoModel") -> None:
        """Raises ``UserError`` where a file does not say what it has to.

        Args:
            task: The class of transformers' that builds it.
        """
        super().__init__()
        self._settings = settings = read_declared(files.folder / CONFIG)
        self.is_dual = _is_dual(settings)
        for key in ("text_config", "vision_config"):
            settings.section(key)
        if not self.is_dual:
            # Looked at before transformers does, which says less of a wrong value.
            self.width, self.pages = declared_width(settings), declared_pages(config, settings, files.folder)
        layers = [(place, read_declared(path)) for place, path in files.dense]
        widths = [(layer.number("in_features"), told(layer, "out_features")) for _, layer in layers]
        holder = nn.Module()
        holder.model = _on_meta(settings, config, task)
        self.add_module("0", holder)
        if self.is_dual:
            # Their files leave out what is as transformers has it anyway.
            self.width, self.pages = _of_dual(holder.model.config, config, files.folder)
        self.kinds = _kinds_of(holder.model, settings)
        for (place, layer), (before, after) in zip(layers, widths, strict=True):
            self._add_layer(place, before or self.width, after, bias=bool(layer.values.get("bias", True)))
        # A raw model gets a pooling, but for one with an embedding of its own.
        self._modules_in_all = files.modules or (1 if self.is_dual else 2)

    @property
    def inner(self) -> Any:
        """The transformers model."""
        return self._modules["0"].model  # type: ignore[union-attr]

    def project_to(self, width: int) -> None:
        """Put a linear layer behind it, as `farnear.model.router.join` does where widths differ."""
        if width != self.width:
            self._add_layer(self._modules_in_all, self.width, width, bias=False)

    def embed(self, kind: str, features: Features) -> Tensor:
        """What it makes of a mini-batch of one kind, [n, D]."""
        if self.is_dual:
            e_nD: Tensor = getattr(self.inner, f"get_{kind}_features")(**features).pooler_output
        else:
            hidden_nTD = self.inner(**features, return_dict=True).last_hidden_state
            pool = last_token if len(self.kinds) > 1 else _mean
            e_nD = pool(hidden_nTD, features["attention_mask"])
        for layer in self._layers():
            e_nD = layer(e_nD)
        return e_nD

    def maker(self, kind: str, *, text_tokens: int, visual_tokens: int = 0) -> Callable[[int], Features]:
        """Makes the features of some equal inputs.

        Args:
            text_tokens: Of each, a template's included.
            visual_tokens: Of each page.

        Raises:
            CannotTraceError: The model does not say how it reads them.
        """
        if kind == "image" and not self.pages.is_known:
            raise CannotTraceError("its config does not say how a page becomes tokens")
        if kind not in ("text", "image"):
            raise CannotTraceError(f"it reads {kind}, whose length is not known")
        if not self.is_dual:
            return self._sequence_maker(self._text_length(text_tokens), visual_tokens if kind == "image" else 0)
        return self._page if kind == "image" else self._text_maker(self._text_length(text_tokens))

    def _text_length(self, tokens: int) -> int:
        text = getattr(self.inner.config, "text_config", self.inner.config)
        most = getattr(text, "max_position_embeddings", tokens)
        return int(most) if self.pads_texts else min(tokens, int(most))

    @property
    def pads_texts(self) -> bool:
        """Whether texts are padded to the length that it was trained with, as SigLIP's (`farnear.model.load`)."""
        return self.is_dual and str(self.inner.config.model_type).startswith("siglip")

    def _text_maker(self, tokens: int) -> Callable[[int], Features]:
        def make(inputs: int) -> Features:
            input_ids = torch.ones(inputs, tokens, dtype=torch.int64)
            # SigLIP's tokenizer masks nothing.
            mask = {} if self.pads_texts else {"attention_mask": torch.ones_like(input_ids)}
            return {"input_ids": input_ids, **mask}

        return make

    def _page(self, inputs: int) -> Features:
        """Pages of a dual encoder."""
        pages, side = self.pages, getattr(self.inner.config.vision_config, "image_size", None)
        if side is not None:
            return {"pixel_values": torch.empty(inputs, pages.channels, side, side, device="meta")}
        patches = pages.most_tokens
        rows = max(number for number in range(1, int(patches**0.5) + 1) if patches % number == 0)
        columns = pages.channels * pages.patch_pixels**2
        return {
            "pixel_values": torch.empty(inputs, patches, columns, device="meta"),
            "pixel_attention_mask": torch.ones(inputs, patches, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[rows, patches // rows]] * inputs),
        }

    def _sequence_maker(self, text_tokens: int, visual_tokens: int) -> Callable[[int], Features]:
        """Of a model that reads all as one sequence. A page's visual tokens stand in one row: their number counts."""
        pages, settings = self.pages, self._settings
        image_token = settings.number("image_token_id", least=0) or settings.number("image_token_index", least=0) or 0
        start_token = settings.number("vision_start_token_id", least=0)

        def make(inputs: int) -> Features:
            before = torch.full((inputs, text_tokens // 2), 1)
            if visual_tokens and start_token is not None and text_tokens > 1:
                before[:, -1] = start_token
            after = torch.full((inputs, text_tokens - text_tokens // 2), 1)
            visual = torch.full((inputs, visual_tokens), image_token)
            input_ids = torch.cat([before, visual, after], dim=1)
            features = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
            if visual_tokens:
                features |= pixels_of(pages, inputs, visual_tokens)
                features["mm_token_type_ids"] = (input_ids == image_token).to(torch.int32)
            return features

        return make

    def _add_layer(self, place: int, before: int, after: int, *, bias: bool) -> None:
        layer = nn.Module()
        layer.linear = nn.Linear(before, after, bias=bias, device="meta")
        self.add_module(str(place), layer)
        self.width = after

    def _layers(self) -> Iterator[nn.Linear]:
        for child in list(self.children())[1:]:
            yield child.linear  # type: ignore[misc]


def pixels_of(pages: PageShape, inputs: int, visual_tokens: int) -> Features:
    """Pages cut into patches, as the Qwen2-VL family's processors make them, each a row of tokens."""
    patches = inputs * visual_tokens * pages.merge**2
    columns = pages.channels * pages.frames * pages.patch_pixels**2
    return {
        "pixel_values": torch.empty(patches, columns, device="meta"),
        "image_grid_thw": torch.tensor([[1, pages.merge, visual_tokens * pages.merge]] * inputs),
    }


def last_token(hidden_nTD: Tensor, mask_nT: Tensor) -> Tensor:
    """[n, D] of each sequence's last place, as `farnear.model.load` adds it to a raw model."""
    mask_nTD = mask_nT.unsqueeze(-1).expand_as(hidden_nTD).to(hidden_nTD.dtype)
    last_n1D = torch.full((len(hidden_nTD), 1, hidden_nTD.shape[2]), hidden_nTD.shape[1] - 1)
    return torch.gather(hidden_nTD * mask_nTD, 1, last_n1D).squeeze(1)


def _mean(hidden_nTD: Tensor, mask_nT: Tensor) -> Tensor:
    mask_nT1 = mask_nT.unsqueeze(-1).to(hidden_nTD.dtype)
    return (hidden_nTD * mask_nT1).sum(1) / mask_nT1.sum(1).clamp(min=1e-9)


def _is_dual(settings: Declared) -> bool:
    """By the class that transformers has for a model of this type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    name = MODEL_MAPPING_NAMES.get(str(settings.values.get("model_type")))
    # Such a model has a tower a kind, and no hidden state of both.
    return isinstance(name, str) and hasattr(getattr(transformers, name), "get_text_features")


def _of_dual(own: Any, config: ModelConfig, folder: Path) -> tuple[int, PageShape]:
    """Width of the embeddings, and how pages are read, by transformers' own config of a dual encoder."""
    vision = getattr(own, "vision_config", None)
    width = getattr(own, "projection_dim", None) or getattr(vision, "hidden_size", None)
    if not width:
        raise UserError(
            f"{folder / CONFIG} tells no projection_dim, so the embeddings' width is not known; copy the model's own "
            "file there"
        )
    if hasattr(vision, "patch_size"):
        return int(width), pages_of_one_size(config, vision, folder)
    return int(width), PageShape(16, 1, 3, 1, 16**2, 1_000_000, is_known=False)


def _kinds_of(inner: Any, settings: Declared) -> tuple[str, ...]:
    def reads(kind: str) -> bool:
        return hasattr(inner, f"get_{kind}_features") or (kind == "image" and "vision_config" in settings.values)

    return ("text", *(kind for kind in KINDS if kind != "text" and reads(kind)))


def _on_meta(settings: Declared, config: ModelConfig, task: str) -> nn.Module:
    import transformers
    from transformers.initialization import no_init_weights

    known = {key: value for key, value in settings.values.items() if key != "auto_map"}
    try:
        built = transformers.AutoConfig.for_model(**{**known, **config.model_kwargs.get("config_kwargs", {})})
        with torch.device("meta"), no_init_weights():
            model: nn.Module = getattr(transformers, task).from_config(
                built, attn_implementation=_traced_attention(config), dtype=torch.float32
            )
        # Which making weights would have done.
        model.tie_weights()  # type: ignore[operator]
    except Exception as error:  # whatever a config makes transformers raise
        raise UserError(
            f"the config.json of model {config.name_or_path} describes no model that transformers knows here "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); install the version that it needs"
        ) from error
    return model


def _traced_attention(config: ModelConfig) -> str | None:
    """Packed and compiled attentions are traced as sdpa: they save the same. None leaves it to transformers."""
    return config.attn_implementation if config.attn_implementation in (None, "eager") else "sdpa"
