"""A model with all that it takes to embed or to score what shards hold, handed on as one thing.

The model may be the one in training, under its strategy, or one beside it that every rank holds whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from farnear.data.budget import PageTokens
from farnear.data.workers import Preprocess
from farnear.model.pairs import PairPicker
from farnear.parallel.strategy import Forward
from farnear.parallel.world import World


def nothing(*_: object) -> None:
    """Do nothing, in place of a call that is not wanted."""


@dataclass(frozen=True)
class Inference:
    """How a model computes on the ranks.

    Attributes:
        model: Features in; embeddings, or a reranker's scores, out.
        preprocess: From inputs, or pairs of them, to features.
        page_tokens: What a page costs, by its size.
        batch_size: Inputs, or pairs, that go through the model at once on one rank.
        num_workers: Worker processes a rank that read, decode and preprocess.
        pick: For a reranker: makes features of pairs anew, where pages can be seen apart from their pairs.
        between: Called before every batch, equally often on every rank, so that it may be a collective; what it raises
            ends the work.
        moved: Called as a rank goes on alone.
        told: Called before every batch with what is counted ("pages"), how many of them are done, of how many, on all
            ranks together.
    """

    model: Forward
    world: World
    preprocess: Preprocess
    page_tokens: PageTokens
    batch_size: int
    num_workers: int
    pick: PairPicker | None = None
    between: Callable[[], None] = nothing
    moved: Callable[[], None] = nothing
    told: Callable[[str, int, int], None] = nothing

    def turn(self, what: str, done: int, total: int) -> None:
        """What comes before every batch; see ``told`` and ``between``."""
        self.told(what, min(done, total), total)
        self.between()

    def forward(self, features: dict[str, Any]) -> Any:
        """What the model makes of features on its device."""
        return self.model.forward(features)
