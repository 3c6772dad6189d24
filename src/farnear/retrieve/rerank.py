"""Score pairs of a query and a page with all ranks, and put what an embedder has found into the reranker's order.

A corpus is too large for a cross-encoder, so it is given what is found for each query without it: the *candidates*.
They are an embedder's nearest pages, or, where no embedder is named, the query's own pages, its hard negatives and
others by hash: that says how well a reranker tells them apart, not how well both work together.

Measures count a relevant page that is not among the candidates as one that was not found, as
sentence-transformers' InformationRetrievalEvaluator does.

Shapes: Q queries, k candidates of each, n pairs.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.data.index import Index, modality_name
from farnear.data.list_dealing import pair_job
from farnear.data.read import InputReader
from farnear.data.shard_store import ShardStore
from farnear.data.workers import Preprocess, Workers
from farnear.errors import RunStoppedError
from farnear.model.embedder import to_device
from farnear.model.pairs import PairPicker, image_features_of_job
from farnear.model.reranker import images_apart
from farnear.parallel.collectives import agree_on_max, exchange_ints, gather_together
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World
from farnear.retrieve.evaluate import RetrievalTask

Int64 = npt.NDArray[np.int64]

NO_CANDIDATE = -1


@torch.no_grad()
def score_pairs(
    strategy: Strategy,
    world: World,
    index: Index,
    store: ShardStore,
    preprocess: Preprocess,
    query_n: Int64,
    document_n: Int64,
    *,
    batch_size: int,
    num_workers: int,
    pick: PairPicker | None,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Raw scores of pairs of input rows, the same on every rank. A collective.

    Args:
        query_n, document_n: Input rows of the index; the same on every rank.
        batch_size: Pairs that go through the model at once on one rank.
        num_workers: Worker processes that read, decode and preprocess.
        pick: Makes features of pairs anew, where pages can be seen apart from their pairs.
        between: Called before every batch, equally often on every rank, so that it may be a collective.

    Returns:
        float32 [n] on the CPU.

    Raises:
        RunStoppedError: On every rank, when a score is not finite.
    """
    kind_n = index.input_modality_I[query_n] | index.input_modality_I[document_n]
    parts, places = [torch.zeros(0, device=world.device)], [torch.zeros(0, dtype=torch.int64, device=world.device)]
    for kind in np.unique(kind_n):
        of_kind = np.flatnonzero(kind_n == kind)
        # Entries of one page beside each other: it is read, and seen, once for all of them in a batch.
        of_kind = of_kind[np.argsort(document_n[of_kind], kind="stable")]
        own = np.array_split(of_kind, world.world_size)[world.rank]
        # A rank without a share still takes part in collective forwards; what it scores is cut off again.
        share = own if len(own) else of_kind[:1]
        batches = -(-len(share) // batch_size)
        turns = agree_on_max([batches], world.device)[0]
        features: dict[str, Any] = {}
        loaded = _pair_features(index, store, preprocess, query_n[share], document_n[share], batch_size, num_workers)
        for number, features in enumerate(loaded):
            between()
            score = _score(strategy, world, features, pick)
            part = share[number * batch_size : (number + 1) * batch_size][: len(own)]
            parts.append(score[: len(part)])
            places.append(torch.from_numpy(part).to(world.device))
        for _ in range(turns - batches):
            between()
            if strategy.forward_is_collective:
                _score(strategy, world, features, pick)
    score_n, place_n = torch.cat(parts), torch.cat(places)
    rows_W = [(rows, rows) for (rows,) in exchange_ints([len(score_n)], world.device)]
    score_N, place_N = gather_together([score_n, place_n], rows_W)
    if bad := int((~score_N.isfinite()).sum()):
        raise RunStoppedError(
            f"{bad} of {len(score_N)} scores are not finite, so nothing can be ranked: the weights have gone wrong; "
            "lower training.learning_rate and continue from the checkpoint before"
        )
    return score_N[place_N.argsort()].cpu()


def given_candidates(task: RetrievalTask, k: int) -> Int64:
    """Candidates without an embedder: a query's pages, its hard negatives, then others by hash. int64 [Q, k].

    Positions among the task's pages; `NO_CANDIDATE` where the corpus holds no more. A query with more than k pages of
    its own has k of them.
    """
    index = task.index
    position_of_hash = {int(content): place for place, content in enumerate(index.input_hash_I[task.page_row_P])}
    candidate_Qk = np.full((len(task.relevant), k), NO_CANDIDATE, np.int64)
    for query, pair in enumerate(task.query_pair_Q.tolist()):
        hard = (position_of_hash.get(int(index.input_hash_I[row])) for row in index.negatives_of(pair))
        known = [*sorted(task.relevant[query]), *(place for place in hard if place is not None)]
        # Pages stand in the order of their hashes: those that follow are any.
        start = int(index.query_hash_N[pair]) % task.pages
        others = ((start + step) % task.pages for step in range(min(task.pages, k + len(known))))
        chosen = list(dict.fromkeys([*known, *others]))[:k]
        candidate_Qk[query, : len(chosen)] = chosen
    return candidate_Qk


def pairs_of(task: RetrievalTask, candidate_Qk: Int64) -> tuple[Int64, Int64]:
    """Input rows of query and page of each candidate, query after query."""
    query_Q = task.index.query_N[task.query_pair_Q]
    is_one_Qk = candidate_Qk != NO_CANDIDATE
    return np.repeat(query_Q, is_one_Qk.sum(axis=1)), task.page_row_P[candidate_Qk[is_one_Qk]]


def reranked(candidate_Qk: Int64, score_n: npt.NDArray[np.float32]) -> Int64:
    """Candidates by falling score, equal ones by the lower page, and the places without one last. int64 [Q, k].

    Args:
        score_n: Of each candidate, query after query.
    """
    is_one_Qk = candidate_Qk != NO_CANDIDATE
    score_Qk = np.full(candidate_Qk.shape, -np.inf, np.float64)
    score_Qk[is_one_Qk] = score_n
    by_page_Qk = np.argsort(np.where(is_one_Qk, candidate_Qk, np.iinfo(np.int64).max), axis=1, kind="stable")
    score_Qk = np.take_along_axis(score_Qk, by_page_Qk, axis=1)
    ordered_Qk = np.argsort(-score_Qk, axis=1, kind="stable")
    return np.take_along_axis(candidate_Qk, np.take_along_axis(by_page_Qk, ordered_Qk, axis=1), axis=1)


def _score(strategy: Strategy, world: World, features: dict[str, Any], pick: PairPicker | None) -> Tensor:
    """Scores of one batch's pairs; each of its pages is seen once where the model can be run in two halves."""
    on_device = to_device(features, world.device)
    if pick is not None and "image_of_occurrence" in features:
        images = images_apart(strategy.forward(image_features_of_job(on_device)), features["distinct_grid_thw"])
        picked, occurrences = pick([features], [(0, pair) for pair in range(len(features["input_ids"]))])
        on_device = to_device(picked, world.device)
        on_device["image_features"] = tuple(images[image] for _, image in occurrences)
    score_n: Tensor = strategy.forward(on_device)
    return score_n.float()


def _pair_features(
    index: Index,
    store: ShardStore,
    preprocess: Preprocess,
    query_n: Int64,
    document_n: Int64,
    batch_size: int,
    num_workers: int,
) -> Generator[dict[str, Any], None, None]:
    """The features of pairs of one kind, batch after batch.

    Raises ``UserError`` for an input that cannot be used, for there is no ranking without it.
    """
    jobs = []
    for start in range(0, len(query_n), batch_size):
        part = slice(start, start + batch_size)
        kind = index.input_modality_I[query_n[start]] | index.input_modality_I[document_n[start]]
        jobs.append(pair_job(modality_name(int(kind)), query_n[part], document_n[part], needed=True))
    workers = Workers(InputReader(index, store), preprocess, min(num_workers, len(jobs)), 2, False)
    with closing(workers.run(iter(jobs))) as results:
        for features, _ in results:
            yield features
