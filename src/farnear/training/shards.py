"""The shards of a run, indexed: scanned once a node, mapped by every rank.

What the scan could not use is told before the first step, and counted against `data.max_bad_fraction`: a run that lost
a shard to a broken copy must not learn so from its results.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from farnear.data.faults import fault_table, pairs_lost
from farnear.data.index import Index, modality_name
from farnear.data.index_cache import ShardSet, cache_folder, cached_index
from farnear.data.losses import Losses, losses_of
from farnear.data.negatives import Negatives
from farnear.data.negatives_file import read_negatives
from farnear.data.remote import is_remote, shown
from farnear.data.run_shards import shard_sets, shard_store, shards_to_encode
from farnear.data.shard_store import ShardStore
from farnear.errors import UserError
from farnear.model.towers import is_router, modalities_of, takes
from farnear.parallel.world import World, on_main_rank
from farnear.retrieve.evaluate import RetrievalTask, build_task, sample_task
from farnear.sections import DataConfig, EvaluationConfig
from farnear.wording import counted

FAULTS_SHOWN = 20


@dataclass(frozen=True)
class RunData:
    """The pairs that are trained on, and the evaluation, whole and sampled, where the run file names shards for it.

    Attributes:
        negatives: The hard ones of the pairs: what `data.negatives` names, else what the shards hold.
    """

    store: ShardStore
    train: Index
    negatives: Negatives
    whole: RetrievalTask | None
    sample: RetrievalTask | None


def open_data(data: DataConfig, evaluation: EvaluationConfig, world: World) -> RunData:
    """Scan the shards that the run file names, as far as that is not done, and open their indexes. A collective.

    Raises:
        UserError: A shard is missing or useless, stands on both sides, or more is lost than `data.max_bad_fraction`.
    """
    cache = cache_folder(data.cache_dir)
    store = shard_store(data, cache)
    train, evaluated = on_main_rank(world, lambda: shard_sets(data, store.expand))
    store = _tried(store, [train] if evaluated is None else [train, evaluated], world)

    def index(shard_set: ShardSet, what: str) -> Index:
        return _index(shard_set, what, cache, store, data.max_bad_fraction, world)

    train_index = index(train, "training")
    negatives = _negatives(data, train_index, world)
    if evaluated is None:
        return RunData(store, train_index, negatives, None, None)
    whole = build_task(index(evaluated, "evaluation"), store)
    sample = sample_task(whole, evaluation.sample_queries, evaluation.sample_pages)
    return RunData(store, train_index, negatives, whole, sample)


def open_to_encode(data: DataConfig, world: World) -> tuple[Index, ShardStore]:
    """The index of what `farnear encode` embeds, and how it is read. A collective; errors as in `open_data`."""
    cache = cache_folder(data.cache_dir)
    store = shard_store(data, cache)
    shard_set = on_main_rank(world, lambda: shards_to_encode(data, store))
    store = _tried(store, [shard_set], world)
    return _index(shard_set, "given", cache, store, data.max_bad_fraction, world), store


def _tried(store: ShardStore, shard_sets: Sequence[ShardSet], world: World) -> ShardStore:
    """The store with the facts of all shards behind URLs: a server is asked about each once and not by every rank."""
    urls = [shard for of in shard_sets for shard, _ in of.shards() if is_remote(shard)]
    store = replace(store, known=on_main_rank(world, lambda: {url: store.facts(url) for url in urls}))
    on_main_rank(world, store.try_out)
    return store


def _index(
    shard_set: ShardSet, what: str, cache: Path, store: ShardStore, max_bad_fraction: float, world: World
) -> Index:
    # Rank 0 first, alone, so that an error is told once; a node with a cache of its own scans for itself.
    on_main_rank(world, lambda: check_index(cached_index(shard_set, cache, store), what, max_bad_fraction))
    return cached_index(shard_set, cache, store)


def _negatives(data: DataConfig, index: Index, world: World) -> Negatives:
    """As `index` in `open_data`: rank 0 first, and then each from what it has kept."""
    if not data.negatives:
        own = Negatives.of_index(index)
        if world.is_main and (left_out := len(index.negatives) - len(own.rows)):
            print(
                f"{counted(left_out, 'hard negative')} of the shards answer their query: they are left out", flush=True
            )
        return own

    def read(tell: bool) -> Negatives:
        return read_negatives(data.negatives, index, data.max_bad_fraction, tell=tell)

    on_main_rank(world, lambda: read(True) and None)
    return read(False)


Held = tuple[str, str]
"""A side, and a kind of inputs that it holds as `farnear.model.towers` calls them."""


def kinds_held(data: RunData) -> set[Held]:
    """The kinds of inputs that the shards of training and evaluation hold on each side."""
    indexes = [data.train, *([data.whole.index] if data.whole else [])]
    return set().union(*map(kinds_of, indexes))


def kinds_of(index: Index) -> set[Held]:
    """The kinds of inputs that an index holds on each side."""
    sides = {"query": np.unique(index.query_N), "document": index.documents()}
    return {
        (side, modality_name(int(bits)))
        for side, rows in sides.items()
        for bits in np.unique(index.input_modality_I[rows])
    }


def refuse_unsupported(model: Any, name: str, kinds: Collection[Held]) -> None:
    """Raise UserError for inputs that the model does not take, before its first batch would fail.

    Args:
        name: What the run file calls the model.
        kinds: As `kinds_held` gives them.
    """
    for side, kind in sorted(kinds):
        if not takes(model, side, kind):
            raise UserError(
                f"the shards hold {'queries' if side == 'query' else 'documents'} of the kind {kind}, which model "
                f"{name} does not take{' there' if is_router(model[0]) else ''} (modalities: {modalities_of(model)}); "
                "take another model, or leave those samples out"
            )


def refuse_without_teacher(setting: str, data: RunData, num_negatives: int | None) -> None:
    """Raise UserError where an objective, by the name of its ``setting``, has no scores of a teacher to learn from."""
    if num_negatives == 0:
        raise UserError(
            f"{setting} learns from a teacher's scores of hard negatives, and data.num_negatives: 0 leaves all out; "
            "take it out"
        )
    if not (np.isfinite(data.negatives.teacher).any() and np.isfinite(data.negatives.positive_teacher).any()):
        raise UserError(
            f"{setting} learns from a teacher's scores, and data.negatives holds none; let `farnear mine` write them "
            "(mining.reranker), or take another loss"
        )


def check_index(index: Index, what: str, max_bad_fraction: float) -> None:
    """``tell_faults``, and whether anything is left.

    Raises:
        UserError: More than ``max_bad_fraction`` of the pairs is lost, or all of a source.
    """
    tell_faults(index, what, max_bad_fraction)
    for source, pairs in zip(index.sources, np.diff(index.source_start_K1).tolist(), strict=True):
        if pairs == 0:
            of_source = f" of source {source!r}" if len(index.sources) > 1 else ""
            raise UserError(
                f"no {what} pair{of_source} is left: data.exclude names {counted(index.excluded, 'pair')}, and "
                f"{counted(pairs_lost(index.faults), 'pair')} in all are lost to faults; mend the shards, or leave "
                f"{'the source' if of_source else 'them'} out"
            )


def tell_faults(index: Index, what: str, max_bad_fraction: float) -> None:
    """Print what the scan could not use.

    Raises:
        UserError: It is, or may be, more than ``max_bad_fraction`` of the pairs.
    """
    if not index.faults:
        return
    losses = losses_of(index)
    summary = _summary(index, losses, what)
    if losses.share(len(index)) > max_bad_fraction:
        first = next((one for one in index.faults if one.kind == "cut_short" or one.pairs_lost), index.faults[0])
        raise UserError(
            f"{summary}, which {'may be' if losses.no_measure else 'is'} above data.max_bad_fraction "
            f"({max_bad_fraction:g}); the first: shard {shown(first.shard)} at byte {first.offset}: {first.detail}. "
            "`farnear shards verify` lists them; mend the shards, or "
            + ("set it to 1" if losses.no_measure else "raise it")
        )
    print(f"{summary}; they are left out:")
    print(fault_table(index.faults[:FAULTS_SHOWN]), flush=True)
    if len(index.faults) > FAULTS_SHOWN:
        print(f"and {len(index.faults) - FAULTS_SHOWN} more; `farnear shards verify` lists them all", flush=True)


def _summary(index: Index, losses: Losses, what: str) -> str:
    faults = counted(len(index.faults), "fault")
    shards = counted(len({fault.shard for fault in index.faults}), f"{what} shard")
    text = f"{faults} in {shards} cost{'s' * (len(index.faults) == 1)} at least {losses.known} of "
    text += counted(len(index) + losses.known, "pair")
    if losses.no_measure:
        return f"{text}, and behind the end of a shard that was cut short may have stood any number"
    if losses.presumed:
        return f"{text}, and about {losses.presumed:,} more if what was cut short was as long as the others"
    return text
