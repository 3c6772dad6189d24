"""An embedder from its base model to its export: gradient cache, contrastive loss, search at every dimension."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from farnear.config import RunConfig
from farnear.data.batch import RankBatch
from farnear.data.dealing import Dealing
from farnear.errors import UserError
from farnear.loss.own import load_own_loss
from farnear.model.embedder import Embedder, Preprocessing
from farnear.model.export import export_model
from farnear.model.load import load_model
from farnear.model.pixels import page_tokens
from farnear.model.router import width_of
from farnear.parallel.world import World
from farnear.retrieve.evaluate import RetrievalTask, evaluate
from farnear.retrieve.mine import weights_fingerprint
from farnear.training.checkpoint import Progress
from farnear.training.choices import Choices
from farnear.training.engine import BuiltModel, build_step
from farnear.training.kind import Evaluated, Gradient, Outcome, Setting
from farnear.training.scale import LearnedScale
from farnear.training.shards import RunData, kinds_held, refuse_unsupported, refuse_without_teacher
from farnear.training.step import StepFigures
from farnear.training.watch import Watch


class EmbedderKind:
    """See `farnear.training.kind.Kind`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._own_loss = load_own_loss(config.loss.function) if config.loss.function else None

    def load(self, *, dtype: torch.dtype, with_weights: bool) -> SentenceTransformer:
        """See `Kind`."""
        return load_model(self._config.model, dtype=dtype, with_weights=with_weights, seed=self._config.seed)

    def wrap(self, model: SentenceTransformer) -> nn.Module:
        """See `Kind`."""
        training = self._config.training
        return Embedder(model, bf16=training.bf16, fp16=training.fp16)

    def preprocessing(self, model: SentenceTransformer) -> Preprocessing:
        """See `Kind`."""
        return Preprocessing(model)

    def scale(self) -> LearnedScale | None:
        """See `Kind`."""
        return LearnedScale(self._config.loss, self._config.training) if self._config.loss.learn_scale else None

    def refuse(self, model: SentenceTransformer, data: RunData) -> None:
        """See `Kind`."""
        refuse_unsupported(model, self._config.model.title, kinds_held(data))
        measured_dims(self._config, width_of(model))
        # What the run mines on its way has scores.
        if self._config.loss.distillation is not None and self._config.mining.refresh_every is None:
            refuse_without_teacher(
                f"loss.distillation {self._config.loss.distillation}", data, self._config.data.num_negatives
            )

    def prepare(self, data: RunData, setting: Setting) -> None:
        """See `Kind`: an embedder needs nothing beside itself."""

    def step(
        self,
        built: BuiltModel,
        data: RunData,
        progress: Progress,
        world: World,
        watch: Watch,
        scale: LearnedScale | None,
    ) -> tuple[Gradient, Choices]:
        """See `Kind`."""
        loss = self._config.loss
        step, choices = build_step(self._config, data, built, self._own_loss, progress, world, watch)

        def gradient(batch: RankBatch, figures: StepFigures) -> Outcome:
            now = loss.scale if scale is None else scale.value
            figures.scale = None if loss.function else now
            return step.gradient(batch, figures, scale=now)

        return gradient, choices

    def dealing(self, data: RunData, built: BuiltModel, choices: Choices, world: World) -> Dealing:
        """See `Kind`."""
        training = self._config.training
        return Dealing(
            rank=world.rank,
            world_size=world.world_size,
            page_tokens=page_tokens(built.model),
            mini_batch_size=training.mini_batch_size_of,
            mini_batch_num_tokens=choices.mini_batch_num_tokens,
            num_negatives=self._config.data.num_negatives,
            same_modalities=built.strategy.forward_is_collective,
            negatives=data.negatives,
        )

    def evaluate(self, task: RetrievalTask, built: BuiltModel, setting: Setting) -> Evaluated:
        """See `Kind`: the measures by Matryoshka dimension, the full one decides."""
        dims = measured_dims(self._config, width_of(built.model))
        by = built.inference(
            self._config, setting.world, between=setting.between, moved=setting.moved, told=setting.told
        )
        measures, rankings = evaluate(task, by, dims, ranked=setting.ranked)
        figures = "  ".join(f"{dim}: {of_dim['ndcg@10']:.4f}" for dim, of_dim in measures.items())
        return Evaluated(measures, str(dims[0]), f"by dim  {figures}", rankings=rankings)

    def export(self, weights: Mapping[str, Tensor], folder: Path, card: str) -> None:
        """See `Kind`."""
        export_model(self._config.model, weights, folder, card=card)


def embedder_facts(config: RunConfig, built: BuiltModel, world: World) -> dict[str, Any]:
    """What embeddings by the model as it is are known by. A collective."""
    return {
        "model": config.model.title,
        "weights": weights_fingerprint(built.strategy, world, built.frozen_hash),
        "dim": width_of(built.model),
        "prompts": dict(built.model.prompts),
        "precision": config.training.precision,
        "max_pixels": config.model.max_pixels,
        "min_pixels": config.model.min_pixels,
    }


def measured_dims(config: RunConfig, full: int) -> tuple[int, ...]:
    """The Matryoshka dims and the full dimension, largest first.

    Raises:
        UserError: A dim is larger than the embedding.
    """
    dims: Sequence[int] = config.loss.matryoshka_dims or ()
    if dims and max(dims) > full:
        raise UserError(
            f"loss.matryoshka_dims names {', '.join(str(dim) for dim in dims if dim > full)}, but the embeddings of "
            f"{config.model.title} have {full} dimensions; take out what is above"
        )
    return tuple(sorted({*dims, full}, reverse=True))
