"""The blueprint of a reranker: its head, and its two halves, which a step runs apart (`farnear.training.rerank_step`).

    see     pages through the vision tower, to the image features that the language model takes of them
    score   pairs of a query and a page through the language model and the head, from these features; or, where the
            tower cannot be run apart, through the model as a whole

Heads are those of `farnear.model.heads`, with the layers that compute no more than a score needs.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.model.blueprint import Blueprint, units_of
from farnear.model.blueprint_tower import Features, Tower, last_token, pixels_of
from farnear.model.config_files import CONFIG, TowerFiles, find_model, stored_modules
from farnear.model.declared import read_declared
from farnear.model.hollow import CannotTraceError, Trace, trace
from farnear.model.image_features import Layout, layout_of
from farnear.model.score_layers import RowsLinear, ScoreLinear
from farnear.reranker_section import RerankerConfig

_TASKS = {
    "yes_no": "AutoModelForMultimodalLM",
    "linear": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
}


class RerankerBlueprint(Blueprint):
    """A cross-encoder.

    Attributes:
        head: yes_no, linear, or sequence-classification.
        sees_apart: Whether its vision tower may be run by itself: by its structure, as `shares_images` finds.
        feature_width: Numbers of an image feature a token; known once pages have been traced.
    """

    model_type = "CrossEncoder"

    def __init__(self, config: RunConfig, reranker: RerankerConfig, run_file: Path) -> None:
        """Raises ``UserError`` where there is no config.json, or none that describes a model.

        Args:
            run_file: Beside it the model's config.json may lie.
        """
        super().__init__()
        files = find_model(config.model, run_file)
        if not isinstance(files, TowerFiles):
            raise UserError(
                f"model {config.model.name_or_path} is a Router, which embeds and scores no pairs; set "
                "model.name_or_path to a vision-language model"
            )
        self.folders = {"": files.folder}
        self.head = _head_of(files.folder, reranker)
        # Layers behind the transformer are an embedder's, of which a reranker takes the model alone.
        tower = Tower(config.model, TowerFiles(files.folder), _TASKS[self.head])
        self.pages = tower.pages
        self.add_module("0", tower._modules["0"])
        if self.head == "linear":
            layer = nn.Module()
            layer.linear = ScoreLinear(tower.width, 1, device="meta")
            self.add_module("2", layer)
        self._tower, self._layout = [tower], None
        inner = self.transformers_model
        self.sees_apart = (
            self.pages.is_known
            and hasattr(inner, "get_image_features")
            and "mm_encoder_outputs" in inspect.signature(inner.forward).parameters
        )
        self._settle(config)
        self._score_cheaply()

    _layout: Layout | None

    @property
    def transformers_model(self) -> Any:
        return self._modules["0"].model  # type: ignore[union-attr]

    @property
    def feature_width(self) -> int:
        return 0 if self._layout is None else sum(width for of in self._layout.widths.values() for width in of)

    def unreached(self) -> list[str]:
        return []

    def units_of_side(self, side: str) -> tuple[int, ...]:
        """`units` of what a side goes through: of the whole model where that is not known."""
        return units_of(self)

    def trace_pages(self, inputs: int, *, visual_tokens: int) -> Trace:
        """Follow pages through the tower. Raises ``CannotTraceError`` where they cannot be followed."""
        features = pixels_of(self.pages, inputs, visual_tokens)
        return trace(self, self._see, features, self.autocast, merged=features)

    def trace_pairs(
        self, inputs: int, *, text_tokens: int, visual_tokens: int, of_features: bool, tower_trains: bool
    ) -> Trace:
        """Follow pairs, each with a page of its own.

        Args:
            text_tokens: Of each, both templates included.
            of_features: Whether they come with image features, as `trace_pages` found them, or with pixels.
            tower_trains: Whether the features take gradients.

        Raises:
            CannotTraceError: They cannot be followed.
        """
        features = self._tower[0].maker("image", text_tokens=text_tokens, visual_tokens=visual_tokens)(inputs)
        held = None
        if of_features:
            del features["pixel_values"]
            shape = (visual_tokens, self.feature_width)
            held = {
                "image_features": tuple(
                    torch.empty(shape, device="meta", requires_grad=tower_trains) for _ in range(inputs)
                )
            }
        return trace(self, self._score, features, self.autocast, merged=features, held=held)

    def _see(self, features: Features) -> Tensor:
        outputs = self.transformers_model.get_image_features(**features, return_dict=True)
        self._layout = layout_of(outputs, features["image_grid_thw"])
        if self._layout is None:
            raise CannotTraceError("its tower's outputs are not understood")
        return torch.cat(self._layout.together(outputs))

    def _score(self, features: Features) -> Tensor:
        inputs = {name: value for name, value in features.items() if name != "image_features"}
        if images := features.get("image_features"):
            assert self._layout is not None
            inputs["mm_encoder_outputs"] = {"image": self._layout.apart(images)}
        output = self.transformers_model(**inputs, return_dict=True)
        if self.head == "yes_no":
            logit_n2 = output.logits[:, -1]
            score_n1 = logit_n2[:, :1] - logit_n2[:, 1:2]
        elif self.head == "linear":
            layer: Any = self._modules["2"]
            score_n1 = layer.linear(last_token(output.last_hidden_state, features["attention_mask"]))
        else:
            score_n1 = output.logits
        return score_n1.squeeze(-1).float().clone()

    def _score_cheaply(self) -> None:
        """As `farnear.model.heads.score_cheaply`, with any two rows."""
        if self.head != "yes_no":
            return
        vocabulary: Any = self.transformers_model.get_output_embeddings()
        is_plain = type(vocabulary) is nn.Linear
        if is_plain:
            is_tied = vocabulary.weight is self.transformers_model.get_input_embeddings().weight
            vocabulary.__class__, vocabulary.rows = _TiedRows if is_tied else RowsLinear, (0, 1)


class _TiedRows(RowsLinear):
    """In a run the gradient of the rows is a sparse tensor, of as good as no size; here the rows are a leaf."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            weight_rD = embedding(torch.tensor(self.rows), self.weight.detach()).float()
            weight_rD.requires_grad_(self.weight.requires_grad)
            return linear(input[..., -1:, :].float(), weight_rD)


def _head_of(folder: Path, reranker: RerankerConfig) -> str:
    """The checkpoint's own head, or the one that it gets (`farnear.model.load_reranker`)."""
    modules = stored_modules(folder)
    about = folder / "config_sentence_transformers.json"
    if about.is_file() and read_declared(about).values.get("model_type") == "CrossEncoder":
        return "yes_no" if "LogitScore" in modules else "linear" if "Dense" in modules else "sequence-classification"
    architectures = read_declared(folder / CONFIG).values.get("architectures") or ()
    if not modules and any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return "sequence-classification"
    return "yes_no" if reranker.head in (None, "yes_no") else "linear"
