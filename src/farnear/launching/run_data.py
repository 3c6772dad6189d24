"""What a plan knows of a run's pairs: from the index of its shards, from a number that a person gives, or nothing.

Shards behind URLs are not asked about: a plan needs no network.
"""

from dataclasses import dataclass

import numpy as np

from farnear.config import RunConfig
from farnear.data.budget import PageTokens, input_cost
from farnear.data.index import Index
from farnear.data.index_cache import cache_folder, cached_index
from farnear.data.negatives import Negatives
from farnear.data.negatives_file import read_negatives
from farnear.data.order import Order
from farnear.data.plan import PairFacts, schedule_of
from farnear.data.quotas import Schedule
from farnear.data.run_order import plan_settings, steps_in_all
from farnear.data.run_shards import names_remote_shards, shard_sets, shard_store
from farnear.errors import UserError

QUERY_TOKENS_ASSUMED = 64
_STEPS_LOOKED_AT = 16


@dataclass(frozen=True)
class Tokens:
    """Of an input: the largest, by which memory goes, and the mean, by which time goes."""

    largest: int
    mean: float


@dataclass(frozen=True)
class RunData:
    """What is known of the pairs.

    Attributes:
        pairs: None where nobody says.
        steps, steps_of_epoch: None likewise.
        negatives: Hard ones of a pair, the mean.
        most_negatives: Hard ones of the pair with most.
        query, page: Tokens, a template's included.
        pages: Distinct positive pages; None where there is no index.
        shards, shards_of_step: In all, and those that a global batch touches, the mean.
        known_by: Where this comes from, as a sentence.
        faults: What the pairs cannot do, each a line.
    """

    pairs: int | None
    steps: int | None
    steps_of_epoch: int | None
    negatives: float
    most_negatives: int
    query: Tokens
    page: Tokens
    pages: int | None
    shards: int | None
    shards_of_step: float | None
    known_by: str
    faults: tuple[str, ...] = ()


def fingerprints(config: RunConfig) -> dict[str, str]:
    """Of what the run's shards hold, by what a person calls it. Scans those that are not scanned yet."""
    cache = cache_folder(config.data.cache_dir)
    store = shard_store(config.data, cache)
    sets = zip(("data.train", "data.eval"), shard_sets(config.data, store.expand), strict=True)
    return {
        f"content of {name}": cached_index(shards, cache, store).fingerprint
        for name, shards in sets
        if shards is not None
    }


def run_data(config: RunConfig, page_tokens: PageTokens, most_page_tokens: int, pairs: int | None) -> RunData:
    """What is known of a run's pairs.

    Args:
        page_tokens: What a page costs, by its size.
        most_page_tokens: What a page may cost, where no page is known.
        pairs: What a person says.
    """
    if names_remote_shards(config.data):
        why = "the shards are behind URLs, and a plan uses no network"
    else:
        try:
            cache = cache_folder(config.data.cache_dir)
            store = shard_store(config.data, cache)
            train, _ = shard_sets(config.data, store.expand)
            return _of_index(config, cached_index(train, cache, store), page_tokens)
        except UserError as error:
            why = f"the shards are not on this machine ({str(error).partition(',')[0]})"
    return _without_index(config, most_page_tokens, pairs, why)


def _of_index(config: RunConfig, index: Index, page_tokens: PageTokens) -> RunData:
    faults = []
    batch = config.training.global_batch_size
    positive_hash = index.input_hash_I[index.positives]
    pages = len(np.unique(positive_hash))
    if pages < min(batch, len(index)):
        faults.append(
            f"the training pairs have {pages:,} distinct pages, fewer than training.global_batch_size ({batch:,}): "
            "every batch holds pages twice, which are masked, so queries get fewer negatives than it says; lower it, "
            "or add pages"
        )
    steps = steps_of_epoch = touched = None
    try:
        order = Order(index, plan_settings(config), index.path.parent if index.path else cache_folder(None))
        steps, steps_of_epoch = steps_in_all(config.training, order.schedule), order.schedule.steps_before(1)
        looked_at = range(min(_STEPS_LOOKED_AT, steps_of_epoch))
        touched = float(np.mean([_shards_of(index, order.global_batch(step)) for step in looked_at]))
    except UserError as error:
        faults.append(str(error))
    pairs_of_source = dict(zip(index.sources, np.diff(index.source_start_K1).tolist(), strict=True))
    faults += [] if steps is None else _too_small(config, len(index), pairs_of_source)
    hard = Negatives.of_index(index)
    if config.data.negatives:
        try:
            hard = read_negatives(config.data.negatives, index, config.data.max_bad_fraction)
        except UserError as error:
            faults.append(str(error))
    counts = hard.counts(config.data.num_negatives)
    negatives, most_negatives = float(counts.mean()), int(counts.max())
    documents = np.unique(np.concatenate([index.positives, hard.rows] if negatives else [index.positives]))
    if config.mining.refresh_every is not None:
        negatives, documents = max(negatives, float(config.negatives_of_refresh)), index.documents()
        most_negatives = max(most_negatives, config.negatives_of_refresh)
    return RunData(
        pairs=len(index),
        steps=steps,
        steps_of_epoch=steps_of_epoch,
        negatives=negatives,
        most_negatives=most_negatives,
        query=_tokens(index, np.unique(index.query_N), page_tokens),
        page=_tokens(index, documents, page_tokens),
        pages=pages,
        shards=len(index.shards),
        shards_of_step=touched,
        known_by="by the index of the shards",
        faults=tuple(faults),
    )


def _without_index(config: RunConfig, most_page_tokens: int, pairs: int | None, why: str) -> RunData:
    steps = steps_of_epoch = None
    faults: list[str] = []
    if pairs is not None:
        why += f"; {pairs:,} pairs as --pairs says"
        try:
            schedule = _schedule_of_number(config, pairs)
            steps, steps_of_epoch = steps_in_all(config.training, schedule), schedule.steps_before(1)
        except UserError as error:
            faults.append(str(error))
        faults += [] if steps is None else _too_small(config, pairs, {})
    elif config.training.max_steps > 0:
        steps = config.training.max_steps
    negatives = config.data.num_negatives
    if negatives is None:
        # As many as `farnear mine` finds, where a file of it is named.
        negatives = config.mining.num_negatives if config.data.negatives else 0
    negatives = max(negatives, config.negatives_of_refresh)
    return RunData(
        pairs=pairs,
        steps=steps,
        steps_of_epoch=steps_of_epoch,
        negatives=float(negatives),
        most_negatives=negatives,
        query=Tokens(QUERY_TOKENS_ASSUMED, QUERY_TOKENS_ASSUMED),
        page=Tokens(most_page_tokens, most_page_tokens),
        pages=None,
        shards=None,
        shards_of_step=None,
        known_by=why,
        faults=tuple(faults),
    )


def _schedule_of_number(config: RunConfig, pairs: int) -> Schedule:
    """As if all pairs were of one source."""
    nothing = np.zeros(0, np.int64)
    facts = PairFacts("", nothing, nothing, nothing, np.zeros(0, np.int32), np.array([0, pairs]))
    settings = plan_settings(config.model_copy(update={"data": config.data.model_copy(update={"sources": {}})}))
    return schedule_of(facts, settings)


def _too_small(config: RunConfig, pairs: int, pairs_of_source: dict[str, int]) -> list[str]:
    batch = config.training.global_batch_size
    if pairs < batch:
        return [
            f"there are {pairs:,} training pairs, fewer than training.global_batch_size ({batch:,}), so no batch is "
            f"full; set it to {pairs:,} at most, or add pairs"
        ]
    if config.data.mixing == "within_batch":
        return []
    return [
        f"source {name!r} has {count:,} pairs, fewer than training.global_batch_size ({batch:,}), and under "
        f"data.mixing: per_batch a batch is of one source; lower it, add pairs, or set mixing=within_batch"
        for name, count in pairs_of_source.items()
        if count < batch
    ]


def _tokens(index: Index, rows: "np.typing.NDArray[np.int64]", page_tokens: PageTokens) -> Tokens:
    cost_n = input_cost(index, rows, page_tokens)
    return Tokens(int(cost_n.max()), float(cost_n.mean()))


def _shards_of(index: Index, pairs: "np.typing.NDArray[np.int64]") -> int:
    first_positive = index.positives[index.positive_start_N1[pairs]]
    of_pages = index.part_shard_M[index.part_start_I1[first_positive]]
    return len(np.unique(np.concatenate([of_pages, index.pair_shard_N[pairs]])))
