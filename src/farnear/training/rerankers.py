"""A reranker from its base model to its export: lists, their losses, and ranking what an embedder has found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from torch import Tensor, nn

from farnear.config import RunConfig
from farnear.data.list_dealing import ListDealing
from farnear.data.lists import Similarity
from farnear.errors import UserError
from farnear.model.export import export_model
from farnear.model.load_reranker import load_reranker
from farnear.model.pairs import PairPicker, PairPreprocessing
from farnear.model.pixels import page_tokens
from farnear.model.reranker import Reranker, shares_images
from farnear.parallel.world import World
from farnear.reranker_section import DISTILLATIONS, RerankerConfig
from farnear.retrieve.embeddings import Embeddings
from farnear.retrieve.evaluate import RetrievalTask
from farnear.retrieve.two_stage import FirstStage, found_by, given, rerank
from farnear.training.beside import embedder_beside
from farnear.training.checkpoint import Progress
from farnear.training.choices import Choices
from farnear.training.engine import BuiltModel, casts_kept
from farnear.training.kind import Evaluated, Gradient, Setting
from farnear.training.pages_once import settle_pages_once
from farnear.training.rerank_step import RerankStep
from farnear.training.scale import LearnedScale
from farnear.training.shards import RunData, kinds_held, kinds_of, refuse_unsupported, refuse_without_teacher
from farnear.training.watch import Watch

ONE_SCORE = "1"
"""A pair's score is one number: where an embedder's measures stand by dimension, a reranker's stand here."""


class RerankerKind:
    """See `farnear.training.kind.Kind`."""

    def __init__(self, config: RunConfig, reranker: RerankerConfig) -> None:
        self._config = config
        self._reranker = reranker
        self._pick: PairPicker | None = None
        self._found: dict[str, FirstStage] = {}
        self._similarity: Similarity | None = None

    def load(self, *, dtype: torch.dtype, with_weights: bool) -> CrossEncoder:
        """See `Kind`."""
        return load_reranker(self._config.model, self._reranker, dtype=dtype, with_weights=with_weights)

    def wrap(self, model: CrossEncoder) -> nn.Module:
        """See `Kind`."""
        training = self._config.training
        return Reranker(model, bf16=training.bf16, fp16=training.fp16)

    def preprocessing(self, model: CrossEncoder) -> PairPreprocessing:
        """See `Kind`."""
        self._pick = PairPicker(model) if shares_images(model) else None
        return PairPreprocessing(model, shares_images=self._pick is not None)

    def scale(self) -> LearnedScale | None:
        """See `Kind`: a reranker's scale is fixed."""
        return None

    def refuse(self, model: CrossEncoder, data: RunData) -> None:
        """See `Kind`."""
        refuse_unsupported(model, self._config.model.title, kinds_held(data))
        hard = 0 if self._config.data.num_negatives == 0 else len(data.negatives.rows)
        if not hard and not self._reranker.num_negatives:
            raise UserError(
                "every list would hold its positive alone: there are no hard negatives (data.negatives, "
                "data.num_negatives) and reranker.num_negatives is 0; give it some of either"
            )
        if self._reranker.loss in DISTILLATIONS:
            refuse_without_teacher(f"reranker.loss {self._reranker.loss}", data, self._config.data.num_negatives)
        if self._reranker.embeddings is not None:
            try:
                embeddings = Embeddings.open(Path(self._reranker.embeddings).expanduser())
                self._similarity = embeddings.similarity_in(data.train)
            except UserError as error:
                raise UserError(f"reranker.embeddings: {error}") from None

    def prepare(self, data: RunData, setting: Setting) -> None:
        """See `Kind`: the candidates that the embedder of evaluation.embedder finds, which stay the same."""
        name, k = self._config.evaluation.embedder, self._config.evaluation.rerank_k
        tasks = [data.whole, data.sample if self._config.evaluation.eval_steps is not None else None]
        if name is None or data.whole is None:
            return
        with embedder_beside(
            self._config,
            name,
            kinds_of(data.whole.index),
            setting.world,
            between=setting.between,
            moved=setting.moved,
            told=setting.told,
        ) as embedder:
            self._found = {task.fingerprint: found_by(embedder, task, k) for task in tasks if task is not None}

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
        training = self._config.training
        built.strategy.train(False)
        self._pick = settle_pages_once(
            built.strategy.forward,
            built.preprocess,
            self._pick,
            kinds_held(data),
            world,
            half_precision=training.precision != "fp32",
        )
        built.strategy.train(True)
        num_tokens = {side: tokens for side, tokens in training.mini_batch_num_tokens_of.items() if tokens != "auto"}
        choices = Choices(num_tokens, float(training.keep_graphs), 1, 0)
        step = RerankStep(
            built.strategy,
            world,
            self._reranker,
            self._config.seed,
            self._pick,
            choices.keep_graphs,
            casts_kept(self._config, world),
            watch,
        )
        return step.gradient, choices

    def dealing(self, data: RunData, built: BuiltModel, choices: Choices, world: World) -> ListDealing:
        """See `Kind`."""
        training = self._config.training
        return ListDealing(
            rank=world.rank,
            world_size=world.world_size,
            page_tokens=page_tokens(built.model),
            mini_batch_size=training.mini_batch_size_of,
            mini_batch_num_tokens=choices.mini_batch_num_tokens,
            negatives=data.negatives,
            num_hard=self._config.data.num_negatives,
            num_in_batch=self._reranker.num_negatives,
            similarity=self._similarity,
            shares_images=self._pick is not None,
            same_modalities=built.strategy.forward_is_collective,
        )

    def evaluate(self, task: RetrievalTask, built: BuiltModel, setting: Setting) -> Evaluated:
        """See `Kind`: the measures of the reranked candidates."""
        evaluation = self._config.evaluation
        first = self._found.get(task.fingerprint) or given(task, evaluation.rerank_k)
        by = built.inference(self._config, setting.world, pick=self._pick, between=setting.between, told=setting.told)
        second = rerank(task, first, by)
        seconds = {"embedder": first.seconds_per_query, "reranker": second.seconds_per_query}
        more: dict[str, Any] = {"rerank_k": evaluation.rerank_k, "pairs": second.pairs, "embedder": first.measures}
        more["seconds_per_query"] = {stage: of_stage for stage, of_stage in seconds.items() if of_stage is not None}
        text = f"{second.measures['ndcg@10']:.4f}"
        if first.measures is not None:
            text += f", by the embedder alone {first.measures['ndcg@10']:.4f}"
        rankings = second.rankings if setting.ranked else None
        return Evaluated({ONE_SCORE: second.measures}, ONE_SCORE, text, more, rankings)

    def export(self, weights: Mapping[str, Tensor], folder: Path, card: str) -> None:
        """See `Kind`."""
        export_model(self._config.model, weights, folder, self._reranker, card=card)
