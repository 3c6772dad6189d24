"""A reranker from its base model to its export: lists, their losses, and ranking what an embedder has found."""

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import numpy as np
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
from farnear.model.reranker import Reranker, same_scores_shared, shares_images
from farnear.parallel.collectives import exchange_ints
from farnear.parallel.world import World, on_main_rank
from farnear.reranker_section import DISTILLATIONS, RerankerConfig
from farnear.retrieve.embeddings import Embeddings
from farnear.retrieve.evaluate import RetrievalTask
from farnear.retrieve.measure import measure
from farnear.retrieve.rerank import given_candidates, pairs_of, reranked, score_pairs
from farnear.training.checkpoint import Progress
from farnear.training.choices import Choices
from farnear.training.engine import BuiltModel, casts_kept
from farnear.training.kind import Evaluated, Gradient, Setting
from farnear.training.rerank_step import RerankStep
from farnear.training.scale import LearnedScale
from farnear.training.shards import RunData, kinds_held, refuse_unsupported
from farnear.training.watch import Watch

ONE_SCORE = "1"
"""A pair's score is one number: where an embedder's measures stand by dimension, a reranker's stand here."""
# In half precision scores from shared features are rounded otherwise than those from pixels.
_SAME_IN_HALF = 3e-2
_SEEN_APART = {"text", "image", "image+text"}


class RerankerKind:
    """See `farnear.training.kind.Kind`."""

    def __init__(self, config: RunConfig, reranker: RerankerConfig) -> None:
        self._config = config
        self._reranker = reranker
        self._pick: PairPicker | None = None
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
        refuse_unsupported(model, self._config, data)
        hard = 0 if self._config.data.num_negatives == 0 else len(data.negatives.rows)
        if not hard and not self._reranker.num_negatives:
            raise UserError(
                "every list would hold its positive alone: there are no hard negatives (data.negatives, "
                "data.num_negatives) and reranker.num_negatives is 0; give it some of either"
            )
        if self._reranker.loss in DISTILLATIONS and not np.isfinite(data.negatives.teacher).any():
            raise UserError(
                f"reranker.loss {self._reranker.loss} learns from a teacher's scores, and data.negatives holds none; "
                "let `farnear mine` write them (mining.reranker), or set another loss"
            )
        if self._reranker.embeddings is not None:
            try:
                embeddings = Embeddings.open(Path(self._reranker.embeddings).expanduser())
                self._similarity = embeddings.similarity_in(data.train)
            except UserError as error:
                raise UserError(f"reranker.embeddings: {error}") from None

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
        if self._pick is not None and not self._seen_apart(built, data, world):
            self._pick = None
        built.preprocess.shares_images = self._pick is not None
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

    def _seen_apart(self, built: BuiltModel, data: RunData, world: World) -> bool:
        """Whether a page goes through the tower once for all its pairs: tried, and agreed on. A collective."""
        if not kinds_held(data) <= _SEEN_APART:
            return False
        training = self._config.training
        half = training.precision != "fp32"
        assert self._pick is not None
        built.strategy.train(False)
        same = same_scores_shared(
            built.strategy.forward,
            built.preprocess,
            self._pick,
            world.device,
            **({"tolerance": _SAME_IN_HALF} if half else {}),
        )
        return min(one for (one,) in exchange_ints([int(same)], world.device)) == 1

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
        candidate_Qk = on_main_rank(setting.world, lambda: given_candidates(task, evaluation.rerank_k))
        query_n, document_n = pairs_of(task, candidate_Qk)
        started = perf_counter()
        built.strategy.train(False)
        try:
            score_n = score_pairs(
                built.strategy,
                setting.world,
                task.index,
                task.store,
                built.preprocess,
                query_n,
                document_n,
                batch_size=evaluation.per_device_eval_batch_size,
                num_workers=self._config.data.dataloader_num_workers,
                pick=self._pick,
                between=setting.between,
            )
        finally:
            built.strategy.train(True)
        seconds = perf_counter() - started
        measures = measure(reranked(candidate_Qk, score_n.numpy()), task.relevant)
        more = {"pairs": len(score_n), "seconds_per_query": {"reranker": seconds / len(candidate_Qk)}}
        return Evaluated({ONE_SCORE: measures}, ONE_SCORE, f"{measures['ndcg@10']:.4f}", more)

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """See `Kind`."""
        export_model(self._config.model, weights, folder, self._reranker)
