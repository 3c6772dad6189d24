"""Several models joined to one by a Router, as `model.router` of the run file names them.

Each model keeps its modules: transformer, pooling, normalisation, prompts. They need not embed in one width, so those
beside the pages' get a linear layer to the width of the pages' embeddings: pages are the many, what is known of them is
in that space, and a text encoder is trained into it (as in LiT; Zhai et al. 2022, arXiv:2111.07991). The layer begins
as torch initialises it, by the run's seed, so that every rank has the same, and is trained with the rest. One
normalisation comes last.

What no model is named for goes to the first that reads it, those for media first: chat messages and pages with text to
a vision-language model that reads the images.
"""

from collections.abc import Mapping

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import nn

from farnear.errors import UserError
from farnear.model.towers import KINDS, combinations_of, leader_of, modalities_of, routes_of_kinds
from farnear.sections import ModelConfig


def join(towers: Mapping[str, SentenceTransformer], config: ModelConfig, *, seed: int) -> SentenceTransformer:
    """One model of several.

    Args:
        towers: By route, as `model.router` names them; all on one device.
        config: Section `model`.
        seed: Of the linear layers.

    Raises:
        UserError: A model does not read what it is named for, or prompts contradict each other.
    """
    widths = {name: width_of(tower) for name, tower in towers.items()}
    leader = leader_of(towers)
    routes: dict[str, list[nn.Module]] = {name: list(tower) for name, tower in towers.items()}
    device = towers[leader].device
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        for name, width in widths.items():
            if width != widths[leader]:
                routes[name].append(Dense(width, widths[leader], bias=False, activation_function=None))
    if "document" in towers:
        router = Router(routes, default_route="document")  # type: ignore[arg-type]
    else:
        router = Router(routes, allow_empty_key=False, route_mappings=_mappings(towers, config))  # type: ignore[arg-type]
    last = [Normalize()] if config.normalize else []
    prompts = _prompts(towers) if config.prompts is None else config.prompts
    return SentenceTransformer(modules=[router, *last], device=device.type, prompts=prompts)


def width_of(model: SentenceTransformer) -> int:
    """Of its embeddings."""
    width = model.get_embedding_dimension()
    if width is None:
        raise RuntimeError("the model does not tell its embedding dimension")
    return width


def _mappings(
    towers: Mapping[str, SentenceTransformer], config: ModelConfig
) -> dict[tuple[str | None, str | tuple[str, ...] | None], str]:
    for name, tower in towers.items():
        if not tower.supports(name):  # type: ignore[arg-type]
            raise UserError(
                f"model.router.{name}: model {config.towers[name].name_or_path} reads no {name} (modalities: "
                f"{modalities_of(tower)}); name one that does"
            )
    read = {
        name: [*(kind for kind in (*KINDS, "message") if kind in tower.modalities), *combinations_of(tower[0])]
        for name, tower in towers.items()
    }
    return {(None, kind): route for kind, route in routes_of_kinds(read).items()}


def _prompts(towers: Mapping[str, SentenceTransformer]) -> dict[str, str] | None:
    """Those of all models under their names."""
    prompts: dict[str, str] = {}
    for tower in towers.values():
        for name, text in tower.prompts.items():
            if text and prompts.setdefault(name, text) != text:
                raise UserError(
                    f"the models of model.router have different prompts of the name '{name}', {prompts[name]!r} and "
                    f"{text!r}; say in model.prompts which is meant"
                )
    return prompts or None
