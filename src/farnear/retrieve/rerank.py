"""Score pairs of a query and a page with all ranks, and put what an embedder has found into the reranker's order.

A corpus is too large for a cross-encoder, so it is given what is found for each query without it: the *candidates*.
They are an embedder's nearest pages, or, where no embedder is named, the query's own pages, its hard negatives and
others by hash: that says how well a reranker tells them apart, not how well both work together.

Measures count a relevant page that is not among the candidates as one that was not found, as
sentence-transformers' InformationRetrievalEvaluator does.

Shapes: Q queries, k candidates of each, n pairs.
"""

from contextlib import closing
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.data.index import Index, modality_name
from farnear.data.list_dealing import pair_job
from farnear.data.read import InputReader
from farnear.data.shard_store import ShardStore
from farnear.data.workers import Workers
from farnear.errors import RunStoppedError
from farnear.model.embedder import to_device
from farnear.model.image_features import images_apart
from farnear.model.pairs import image_features_of_job
from farnear.parallel.collectives import agree_on_max, exchange_ints, gather_together
from farnear.retrieve.evaluate import RetrievalTask
from farnear.retrieve.inference import Inference

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

NO_CANDIDATE = -1


@torch.no_grad()
def score_pairs(by: Inference, index: Index, store: ShardStore, query_n: Int64, document_n: Int64) -> Float32:
    """Raw scores of pairs of input rows, by all ranks together. A collective.

    Args:
        query_n, document_n: Input rows of the index; the same on every rank.

    Returns:
        float32 [n], the same on every rank.

    Raises:
        RunStoppedError: On every rank, when a score is not finite.
    """
    world = by.world
    kind_n = index.input_modality_I[query_n] | index.input_modality_I[document_n]
    parts, places = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    done = 0
    for kind in np.unique(kind_n):
        of_kind = np.flatnonzero(kind_n == kind)
        # Entries of one page beside each other: it is read, and seen, once for all of them in a batch.
        of_kind = of_kind[np.argsort(document_n[of_kind], kind="stable")]
        own = np.array_split(of_kind, world.world_size)[world.rank]
        # A rank without a share still takes part in collective forwards; what it scores is cut off again.
        share = own if len(own) else of_kind[:1]
        score_n, _ = _score_in_turns(by, index, store, query_n[share], document_n[share], done=done, total=len(kind_n))
        done += len(of_kind)
        parts.append(score_n[: len(own)])
        places.append(own)
    own_n = [torch.from_numpy(np.concatenate(columns)).to(world.device) for columns in (parts, places)]
    rows_W = [(rows, rows) for (rows,) in exchange_ints([len(own_n[0])], world.device)]
    score_N, place_N = gather_together(own_n, rows_W)
    in_order_N: Float32 = score_N[place_N.argsort()].cpu().numpy()
    _refuse_not_finite(_not_finite(in_order_N), len(in_order_N))
    return in_order_N


@torch.no_grad()
def score_own_pairs(
    by: Inference,
    index: Index,
    store: ShardStore,
    query_n: Int64,
    document_n: Int64,
    *,
    needed: bool = True,
) -> Float32:
    """Raw scores of pairs that are this rank's alone, by a model that each rank has whole. A collective all the same.

    Args:
        needed: Whether an input that cannot be used is an error; else its pairs' scores are NaN.

    Raises:
        UserError: Such an input is needed.
        RunStoppedError: On every rank, when a score of any is not finite.
    """
    assert not by.model.forward_is_collective
    kind_n = index.input_modality_I[query_n] | index.input_modality_I[document_n]
    # Pages beside each other within a kind, and kinds one after the other.
    order = np.lexsort([document_n, kind_n])
    in_turn_n, is_usable_n = _score_in_turns(by, index, store, query_n[order], document_n[order], needed=needed)
    told_W = exchange_ints([_not_finite(in_turn_n), len(order)], by.world.device)
    _refuse_not_finite(sum(bad for bad, _ in told_W), sum(count for _, count in told_W))
    score_n = np.empty(len(order), np.float32)
    score_n[order] = np.where(is_usable_n, in_turn_n, np.float32(np.nan))
    return score_n


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


def pairs_of(task: RetrievalTask, candidate_Qk: Int64, queries: slice = slice(None)) -> tuple[Int64, Int64]:
    """Input rows of query and page of each candidate, query after query.

    Args:
        queries: Of the task, whose candidates they are.
    """
    query_Q = task.index.query_N[task.query_pair_Q[queries]]
    is_one_Qk = candidate_Qk != NO_CANDIDATE
    return np.repeat(query_Q, is_one_Qk.sum(axis=1)), task.page_row_P[candidate_Qk[is_one_Qk]]


def reranked(candidate_Qk: Int64, score_n: Float32) -> tuple[Int64, Float32]:
    """Candidates by falling score, equal ones by the lower page, and the places without one last. [Q, k] both.

    Args:
        score_n: Of each candidate, query after query.

    Returns:
        The candidates, and their scores, which are -inf where there is none.
    """
    is_one_Qk = candidate_Qk != NO_CANDIDATE
    score_Qk = np.full(candidate_Qk.shape, -np.inf, np.float32)
    score_Qk[is_one_Qk] = score_n
    # The last key counts first.
    order_Qk = np.lexsort([np.where(is_one_Qk, candidate_Qk, np.iinfo(np.int64).max), -score_Qk], axis=1)
    return np.take_along_axis(candidate_Qk, order_Qk, axis=1), np.take_along_axis(score_Qk, order_Qk, axis=1)


def _score_in_turns(
    by: Inference,
    index: Index,
    store: ShardStore,
    query_n: Int64,
    document_n: Int64,
    *,
    needed: bool = True,
    done: int = 0,
    total: int | None = None,
) -> tuple[Float32, Bool]:
    """Scores of this rank's pairs, in batches of one kind, and which are of inputs that can be used.

    Ranks take equally many turns, idle where a rank is done.

    Args:
        done, total: Pairs of all ranks before these, and in all; by the turns, unless given.
    """
    kind_n = index.input_modality_I[query_n] | index.input_modality_I[document_n]
    starts = np.append(np.flatnonzero(np.diff(kind_n, prepend=0)), len(kind_n))
    jobs = [
        pair_job(modality_name(int(kind_n[first])), query_n[part], document_n[part], needed=needed)
        for first, last in pairwise(starts.tolist())
        for part in (slice(start, min(start + by.batch_size, last)) for start in range(first, last, by.batch_size))
    ]
    turns = agree_on_max([len(jobs)], by.world.device)[0]
    of_turn = by.batch_size * by.world.world_size
    total = of_turn * turns if total is None else total
    parts, usable = [torch.zeros(0)], [np.zeros(0, np.bool_)]
    features: dict[str, Any] = {}
    workers = Workers(InputReader(index, store), by.preprocess, min(by.num_workers, len(jobs)), 2, False)
    with closing(workers.run(iter(jobs))) as results:
        for turn, (job, (features, bad)) in enumerate(zip(jobs, results, strict=True)):
            by.turn("pairs", done + turn * of_turn, total)
            parts.append(_score(by, features).cpu())
            assert job.pair_n2 is not None
            is_bad_n2 = np.isin(job.pair_n2, [place for place, _ in bad])
            usable.append(~(is_bad_n2[:, 0] | is_bad_n2[:, 1]))
    for turn in range(len(jobs), turns):
        by.turn("pairs", done + turn * of_turn, total)
        if by.model.forward_is_collective:
            _score(by, features)
    return torch.cat(parts).numpy(), np.concatenate(usable)


def _score(by: Inference, features: dict[str, Any]) -> Tensor:
    """Scores of one batch's pairs; each of its pages is seen once where the model can be run in two halves."""
    device = by.world.device
    on_device = to_device(features, device)
    if by.pick is not None and "image_of_occurrence" in features:
        images = images_apart(by.forward(image_features_of_job(on_device)), features["distinct_grid_thw"])
        picked, occurrences = by.pick([features], [(0, pair) for pair in range(len(features["input_ids"]))])
        on_device = to_device(picked, device)
        on_device["image_features"] = tuple(images[image] for _, image in occurrences)
    score_n: Tensor = by.forward(on_device)
    return score_n.float()


def _not_finite(score_n: Float32) -> int:
    return int((~np.isfinite(score_n)).sum())


def _refuse_not_finite(bad: int, count: int) -> None:
    if bad:
        raise RunStoppedError(
            f"{bad} of {count} scores are not finite, so nothing can be ranked: the weights have gone wrong; lower "
            "training.learning_rate and continue from the checkpoint before"
        )
