"""A model from its config.json alone: its parameters counted, its passes traced, no weight read.

The model is built on torch's meta device as a run would build it: its parts joined, trained parts chosen, adapters put
in, activations checkpointed, what no input reaches left out; then it is made hollow (`farnear.model.hollow`). Around
what goes through it stand as many tokens as the index's costs assume for a template.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.model.blueprint_tower import Tower
from farnear.model.config_files import RouterFiles, TowerFiles, find_model
from farnear.model.declared import PageShape
from farnear.model.hollow import CannotTraceError, Trace, hollow_out, trace
from farnear.model.patches import multiply_patches
from farnear.model.towers import SIDES, leader_of, leave_out_unreached, parts_beside, routes_of_kinds
from farnear.sections import ModelConfig

TOKENS_OF_TEMPLATE = 16
"""As `farnear.data.budget` counts them."""

LARGEST_SMALL_BLOCK = 32 * 2**20
"""Larger ones glibc's malloc gives back to the system at once, smaller ones stay in its heap."""


class Blueprint(nn.Module):
    """A hollow model, with modules of the names that a SentenceTransformer has for them.

    Attributes:
        folders: With the config.json of each of its transformers, by route; of one alone under "".
        pages: How it reads them.
        parameters_in_all, trained: Elements.
        weight_bytes: As a run holds them.
        largest_trained: Elements of the largest trained parameter.
        small_trained: Elements of trained parameters that are small blocks for malloc.
        units: Elements of each transformer block, the last entry being all the rest: what FSDP2 gathers together.
    """

    folders: dict[str, Path]
    pages: PageShape
    autocast: torch.dtype | None

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    @property
    def transformers_model(self) -> Any:
        """By the name that a SentenceTransformer has for it, the first one."""
        raise NotImplementedError

    def unreached(self) -> list[str]:
        """Names of what `farnear.model.towers` takes out."""
        raise NotImplementedError

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Of all parts that can, as sentence-transformers does."""
        for module in self.modules():
            can = getattr(module, "supports_gradient_checkpointing", True) is not False
            if module is not self and can and hasattr(module, "gradient_checkpointing_enable"):
                enable: Any = module.gradient_checkpointing_enable
                enable(**kwargs)

    def _settle(self, config: RunConfig) -> None:
        """What a run does to a model that it has loaded, and what is known of it then."""
        from farnear.model.trainable import checkpoint_activations, choose_trainable, store_frozen_in

        training = config.training
        multiply_patches(self)
        if training.pure_bf16:
            for parameter in self.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        stand_in: Any = self
        with torch.device("meta"):
            choose_trainable(stand_in, config.model, seed=config.seed)
        if (training.bf16 or training.fp16) and config.strategy in ("single", "ddp"):
            store_frozen_in(torch.bfloat16 if training.bf16 else torch.float16, self)
        if training.gradient_checkpointing:
            checkpoint_activations(stand_in)
        leave_out_unreached(self)
        parameters = list(self.parameters())
        trained = [parameter.numel() for parameter in parameters if parameter.requires_grad]
        self.parameters_in_all, self.trained = sum(p.numel() for p in parameters), sum(trained)
        self.weight_bytes = sum(parameter.nbytes for parameter in parameters)
        self.element_bytes = 2 if training.pure_bf16 else 4
        self.largest_trained = max(trained)
        self.small_trained = sum(n for n in trained if n * self.element_bytes < LARGEST_SMALL_BLOCK)
        self.units = units_of(self)
        self.autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
        self.train()
        hollow_out(self)


class EmbedderBlueprint(Blueprint):
    """One transformer, or several joined by a Router; pooled and normalised.

    Attributes:
        width: Of its embeddings.
    """

    def __init__(self, config: RunConfig, run_file: Path) -> None:
        """Raises ``UserError`` where there is no config.json, or none that describes a model.

        Args:
            run_file: Beside it the model's config.json may lie.
        """
        super().__init__()
        found, stored = _files_of(config.model, run_file)
        self.folders = {route: files.folder for route, files in found.items()}
        # Routes of a stored Router may share their modules.
        built = {
            id(files): Tower(config.model.towers.get(route, config.model), files) for route, files in found.items()
        }
        towers = {route: built[id(files)] for route, files in found.items()}
        if config.model.router is not None:
            for tower in towers.values():
                tower.project_to(towers[leader_of(towers)].width)
        self._routes = _routes_of(config.model, stored, towers)
        if self._routes is None:
            for name, child in towers[""].named_children():
                self.add_module(name, child)
        else:
            router: Any = nn.Module()
            router.sub_modules, router.route_mappings = nn.ModuleDict(towers), self._routes.mappings
            self.add_module("0", router)
        # Not registered once more: names are those of a SentenceTransformer.
        self._towers = towers
        first = next(iter(towers.values()))
        self.width, self.pages = first.width, (self._reader("document", "image") or first).pages
        self._settle(config)

    @property
    def transformers_model(self) -> Any:
        return next(iter(self._towers.values())).inner

    @property
    def has_tower_of_each_side(self) -> bool:
        """Whether pages and texts meet no weights in common."""
        reader = self._reader("query", "text")
        return reader is not None and (reader.is_dual or reader is not self._reader("document", "image"))

    @property
    def pads_queries(self) -> bool:
        """Whether all texts are brought to one length."""
        reader = self._reader("query", "text")
        return reader is not None and reader.pads_texts

    def unreached(self) -> list[str]:
        names = {id(module): name for name, module in self.named_modules()}
        return [
            f"{names[id(tower.inner)]}.{name}"
            for tower in dict.fromkeys(self._towers.values())
            if tower.is_dual
            for name in parts_beside(
                tower.inner, {kind for side in SIDES for kind in tower.kinds if self._reader(side, kind) is tower}
            )
        ]

    def units_of_side(self, side: str) -> tuple[int, ...]:
        """`units` of the part that pages (of "document") or texts (of "query") go through."""
        reader = self._reader(side, "image" if side == "document" else "text")
        return units_of(reader) if reader is not None else self.units

    def trace(self, inputs: int, *, text_tokens: int, visual_tokens: int = 0, together: int | None = None) -> Trace:
        """Follow a mini-batch of equal inputs.

        Args:
            text_tokens: Of each, a template's included.
            visual_tokens: Of each; 0 for texts.
            together: Inputs of the forward without graph; None leaves it out.

        Raises:
            CannotTraceError: The model cannot be followed.
        """
        side, kind = ("document", "image") if visual_tokens else ("query", "text")
        reader = self._reader(side, kind)
        if reader is None or kind not in reader.kinds:
            raise CannotTraceError("nothing in it reads pages" if visual_tokens else "nothing in it reads texts")
        make = reader.maker(kind, text_tokens=text_tokens, visual_tokens=visual_tokens)

        def embed(features: dict[str, Any]) -> Tensor:
            return nn.functional.normalize(reader.embed(kind, features), dim=1)

        return trace(self, embed, make(inputs), self.autocast, merged=None if together is None else make(together))

    def _reader(self, side: str, kind: str) -> Tower | None:
        route = "" if self._routes is None else self._routes.route_of(side, kind)
        return self._towers.get(route) if route is not None else None


@dataclass(frozen=True)
class _Routes:
    """Which input goes where: by (side, kind), None standing for any, and what no mapping names by default."""

    mappings: Mapping[tuple[Any, Any], str]
    default: str | None
    routes: Collection[str]

    def route_of(self, side: str, kind: str) -> str | None:
        """As the Router resolves it: the most exact mapping, then a route of the side's or the kind's own name."""
        for key in ((side, kind), (side, None), (None, kind), (None, None)):
            if key in self.mappings:
                return self.mappings[key]
        return next((name for name in (side, kind) if name in self.routes), self.default)


def _files_of(config: ModelConfig, run_file: Path) -> tuple[Mapping[str, TowerFiles], RouterFiles | None]:
    """The files of each of the model's transformers by route, one alone under "", and the Router that was stored."""
    if config.router is None:
        found = find_model(config, run_file)
        return ({"": found}, None) if isinstance(found, TowerFiles) else (found.towers, found)
    of_route: dict[str, TowerFiles] = {}
    for route, tower in config.towers.items():
        try:
            found = find_model(tower, run_file, is_one_of_several=True)
        except UserError as error:
            key = f"model.router.{route}"
            raise UserError(f"{key}: {str(error).replace('model.name_or_path', key)}") from None
        if not isinstance(found, TowerFiles):
            raise UserError(
                f"model.router.{route}: model {tower.name_or_path} is a Router itself, and those that are joined are "
                "not; name one that reads what it is named for"
            )
        of_route[route] = found
    return of_route, None


def _routes_of(config: ModelConfig, stored: RouterFiles | None, towers: Mapping[str, Tower]) -> _Routes | None:
    if stored is not None:
        return _Routes(stored.mappings, stored.default, towers.keys())
    if config.router is None:
        return None
    if "document" in towers:
        return _Routes({}, "document", towers.keys())
    routes = routes_of_kinds({route: tower.kinds for route, tower in towers.items()})
    return _Routes({(None, kind): route for kind, route in routes.items()}, None, towers.keys())


def units_of(model: nn.Module) -> tuple[int, ...]:
    """Elements of each transformer block, and of all the rest."""
    names = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks = [sum(p.numel() for p in part.parameters()) for part in model.modules() if type(part).__name__ in names]
    return (*blocks, sum(p.numel() for p in model.parameters()) - sum(blocks))
