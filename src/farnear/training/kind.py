"""What is trained: an embedder, or, where the run file has a section `reranker`, a cross-encoder.

All that differs between the two, in the order in which a run comes to it. Whatever a run does beside is the same for
both: shards, plan, strategy, loop, checkpoint, signals, watchdog.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from farnear.data.loader import Deals
from farnear.model.embedder import WorkerPreprocessing
from farnear.parallel.world import World
from farnear.retrieve.evaluate import RetrievalTask
from farnear.retrieve.inference import nothing
from farnear.retrieve.rankings import Rankings
from farnear.training.checkpoint import Progress
from farnear.training.choices import Choices
from farnear.training.scale import LearnedScale
from farnear.training.shards import RunData
from farnear.training.step import StepFigures
from farnear.training.watch import Watch


class Outcome(Protocol):
    """What a step's gradient is told by, beside the figures; the same on every rank."""

    @property
    def reaches_weights(self) -> bool:
        """Whether any rank has something to train in this step."""

    @property
    def dlog_scale(self) -> float:
        """Gradient of the loss with respect to the logarithm of a trained scale."""


Gradient = Callable[[Any, StepFigures], Outcome]
"""Leaves the gradient of a batch in the strategy, reduced over ranks, and fills the figures."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation.

    Attributes:
        measures: By dimension, as text; a reranker's scores have one.
        headline: The dimension that decides.
        text: How the measures are told in a line.
        more: What else goes into the evaluation's record.
        rankings: At the dimension that decides, on rank 0, if the setting asks for them.
    """

    measures: dict[str, dict[str, float]]
    headline: str
    text: str
    more: dict[str, Any] = field(default_factory=dict)
    rankings: Rankings | None = None


@dataclass(frozen=True)
class Setting:
    """Where a model is evaluated.

    Attributes:
        folder: Of the run.
        between: Called before every batch, equally often on every rank; what it raises ends the evaluation.
        moved: Called as rank 0 goes on alone.
        told: Called before every batch with what is counted, how many of them are done, of how many.
        ranked: Whether the rankings are to be kept.
    """

    world: World
    folder: Path
    between: Callable[[], None]
    moved: Callable[[], None]
    told: Callable[[str, int, int], None] = nothing
    ranked: bool = False


class Kind(Protocol):
    """An embedder or a reranker, from its base model to its export."""

    def load(self, *, dtype: torch.dtype, with_weights: bool) -> Any:
        """The base model on the CPU, a sequence of sentence-transformers' modules."""

    def wrap(self, model: Any) -> nn.Module:
        """What strategies train: features in, a tensor or a tuple of them out. The model is its attribute ``model``."""

    def preprocessing(self, model: Any) -> WorkerPreprocessing:
        """From inputs, or pairs of them, to features; ``model`` is as loaded."""

    def scale(self) -> LearnedScale | None:
        """What is trained beside the model, if anything is."""

    def refuse(self, model: Any, data: RunData) -> None:
        """Raise UserError for shards or settings that do not fit the model."""

    def prepare(self, data: RunData, setting: Setting) -> None:
        """Compute once what evaluations need beside the model. A collective.

        Raises:
            UserError: Another model that the run file names cannot be loaded, or does not take the shards' inputs.
        """

    def step(
        self,
        built: Any,
        data: RunData,
        progress: Progress,
        world: World,
        watch: Watch,
        scale: LearnedScale | None,
    ) -> tuple[Gradient, Choices]:
        """The gradient of a batch, and what was chosen for it by the memory that was found. A collective.

        Args:
            built: A `farnear.training.engine.BuiltModel`.
        """

    def dealing(self, data: RunData, built: Any, choices: Choices, world: World) -> Deals[Any, Any]:
        """How global batches are dealt to ranks."""

    def evaluate(self, task: RetrievalTask, built: Any, setting: Setting) -> Evaluated:
        """Measure the model as it is, the same on every rank. A collective; leaves the strategy in training mode."""

    def export(self, weights: Mapping[str, Tensor], folder: Path, card: str) -> None:
        """Write the model as sentence-transformers loads it; ``weights`` are those that were trained.

        Args:
            card: Its README.md.
        """
