"""A model beside the one in training, which is asked and not trained.

A reranker judges what an embedder mines; an embedder finds the pages that a reranker is evaluated on. Every rank holds
it whole, whatever the run's strategy, and only as long as it is needed. It computes in the run's precision and reads
its inputs as its own folder says: prompts, instruction and pixels are those that it was exported with.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from farnear.config import RunConfig, model_beside
from farnear.errors import UserError
from farnear.model.embedder import Embedder, Preprocessing
from farnear.model.hub import refuse_missing_folder
from farnear.model.load import load_model
from farnear.model.load_reranker import load_reranker
from farnear.model.pairs import PairPicker, PairPreprocessing
from farnear.model.reranker import Reranker, shares_images
from farnear.model.stored import stored_kind
from farnear.model.trainable import frozen_hash
from farnear.parallel.forward_only import ForwardOnly
from farnear.parallel.world import World
from farnear.reranker_section import RerankerConfig
from farnear.retrieve.inference import Inference, nothing
from farnear.retrieve.mine import Mined, mine
from farnear.retrieve.rerank import score_own_pairs
from farnear.training.engine import inference_of
from farnear.training.pages_once import settle_pages_once
from farnear.training.shards import Held, RunData, kinds_of, refuse_unsupported


@contextmanager
def embedder_beside(
    config: RunConfig,
    name: str,
    kinds: Collection[Held],
    world: World,
    *,
    between: Callable[[], None] = nothing,
    moved: Callable[[], None] = nothing,
    told: Callable[[str, int, int], None] = nothing,
) -> Iterator[Inference]:
    """An embedder, held until the context ends.

    Args:
        kinds: Of the inputs that it is to embed.

    Raises:
        UserError: It cannot be loaded, or does not take such inputs.
    """
    with _told_by("evaluation.embedder"):
        model = load_model(model_beside(config, name), dtype=_stored_in(config))
        refuse_unsupported(model, name, kinds)
    preprocess = Preprocessing(model)
    module = Embedder(model, bf16=config.training.precision == "bf16", fp16=config.training.fp16)
    forward = ForwardOnly(module.to(world.device))
    yield inference_of(config, forward, model, preprocess, world, between=between, moved=moved, told=told)


@contextmanager
def reranker_beside(
    config: RunConfig,
    name: str,
    kinds: Collection[Held],
    world: World,
    *,
    between: Callable[[], None] = nothing,
    told: Callable[[str, int, int], None] = nothing,
) -> Iterator[tuple[Inference, str]]:
    """A cross-encoder, held until the context ends, and a fingerprint of its weights. A collective.

    Args:
        kinds: Of the inputs that it is to score.

    Raises:
        UserError: It cannot be loaded, or does not take such inputs.
    """
    section = model_beside(config, name)
    with _told_by("mining.reranker"):
        refuse_missing_folder(name)
        kind = stored_kind(section)
        if kind == "SentenceTransformer":
            raise UserError(f"model {name} is an embedder, which judges no pairs; name a CrossEncoder")
        model = load_reranker(section, RerankerConfig(), dtype=_stored_in(config))
        refuse_unsupported(model, name, kinds)
    if kind is None and world.is_main:
        print(f"mining.reranker {name} is a bare language model: a score is what it says for yes, less for no")
    precision = config.training.precision
    pick = PairPicker(model) if shares_images(model) else None
    preprocess = PairPreprocessing(model, shares_images=pick is not None)
    module = Reranker(model, bf16=precision == "bf16", fp16=precision == "fp16")
    forward = ForwardOnly(module.to(world.device))
    half = precision != "fp32"
    pick = settle_pages_once(forward.forward, preprocess, pick, kinds, world, half_precision=half)
    by = inference_of(config, forward, model, preprocess, world, pick=pick, between=between, told=told)
    yield by, frozen_hash(module)


def mine_judged(config: RunConfig, data: RunData, by: Inference, folder: Path, facts: Mapping[str, Any]) -> Mined:
    """Mine the training pairs' negatives, judged by the reranker of mining.reranker if there is one. A collective.

    Args:
        by: The embedder.
        folder, facts: As in `farnear.retrieve.mine.mine`, which tells of errors too.
    """
    most, name = config.data.max_bad_fraction, config.mining.reranker
    with ExitStack() as stack:
        judge: dict[str, Any] = {}
        if name is not None:
            kinds = kinds_of(data.train)
            beside = reranker_beside(config, name, kinds, by.world, between=by.between, told=by.told)
            teacher, weights = stack.enter_context(beside)
            judge["score_pairs"] = partial(score_own_pairs, teacher, data.train, data.store, needed=most == 0)
            judge["reranker_facts"] = {"name": name, "weights": weights}
        return mine(
            by,
            data.train,
            data.store,
            config.mining,
            folder,
            facts,
            seed=config.seed,
            max_bad_fraction=most,
            **judge,
        )


@contextmanager
def _told_by(key: str) -> Iterator[None]:
    """Errors of loading name the run file's key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {str(error).replace('model.name_or_path', key)}") from None


def _stored_in(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32
