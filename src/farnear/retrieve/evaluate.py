"""How well a model finds pages: every evaluation query against the corpus, at every Matryoshka dimension.

The corpus is every distinct document of the evaluation shards, positives and hard negatives, and of the corpus shards.
A document's identity is its content and a query's its text, so a page stored twice is one page, and a query that stands
with two pages has two relevant ones. Published figures come from corpora with hard negatives in them; without these
they do not compare.

During a run a fixed sample is measured. It is taken by hash, so it is the same on every machine, whatever the order of
the shards.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from farnear.data.index import Index
from farnear.data.shard_store import ShardStore
from farnear.parallel.world import on_main_rank
from farnear.retrieve.encode import encode
from farnear.retrieve.inference import Inference
from farnear.retrieve.measure import measure
from farnear.retrieve.rankings import LOOKED_AT, Rankings, rankings_of
from farnear.retrieve.search import top_k

DEPTH = 10


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, corpus and which page answers which query.

    Attributes:
        index: Of the evaluation shards and the corpus shards.
        store: How they are read.
        query_pair_Q: Pair row of each distinct query.
        page_row_P: Input row of each distinct document.
        relevant: For each query the positions in ``page_row_P`` of its documents.
    """

    index: Index
    store: ShardStore
    query_pair_Q: npt.NDArray[np.int64]
    page_row_P: npt.NDArray[np.int64]
    relevant: tuple[frozenset[int], ...]

    @property
    def pages(self) -> int:
        """Size of the corpus."""
        return len(self.page_row_P)

    @property
    def fingerprint(self) -> str:
        """Of the queries' texts, the pages' contents and what answers what: measures compare where it is the same."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(self.index.query_hash_N[self.query_pair_Q].tobytes())
        digest.update(self.index.input_hash_I[self.page_row_P].tobytes())
        digest.update(repr([sorted(pages) for pages in self.relevant]).encode())
        return digest.hexdigest()


def build_task(index: Index, store: ShardStore) -> RetrievalTask:
    """The whole evaluation: all queries, all pages."""
    _, query_pair_Q, query_of_pair_N = np.unique(index.query_hash_N, return_index=True, return_inverse=True)
    documents = np.concatenate([index.positives, index.negatives, index.corpus_C])
    hash_P, first_P = np.unique(index.input_hash_I[documents], return_index=True)
    position_of_positive = np.searchsorted(hash_P, index.input_hash_I[index.positives])
    query_of_positive = np.repeat(query_of_pair_N, np.diff(index.positive_start_N1))
    relevant: list[set[int]] = [set() for _ in query_pair_Q]
    for query, position in zip(query_of_positive.tolist(), position_of_positive.tolist(), strict=True):
        relevant[query].add(position)
    return RetrievalTask(index, store, query_pair_Q, documents[first_P], tuple(frozenset(pages) for pages in relevant))


def sample_task(task: RetrievalTask, queries: int, pages: int) -> RetrievalTask:
    """A fixed part of a task: the queries and pages of the lowest hashes, and all pages relevant to those queries.

    Pages of the pairs come before those of the corpus shards, for hard negatives say more than any page.
    """
    # np.unique has sorted queries and pages by hash already.
    relevant = task.relevant[:queries]
    needed = np.unique(np.fromiter((p for of_query in relevant for p in of_query), dtype=np.int64))
    others = np.setdiff1d(np.arange(len(task.page_row_P)), needed)
    is_distractor = np.isin(task.page_row_P[others], task.index.corpus_C)
    others = others[np.argsort(is_distractor, kind="stable")]
    kept = np.sort(np.concatenate([needed, others[: max(0, pages - len(needed))]]))
    new_position = {int(old): new for new, old in enumerate(kept)}
    return RetrievalTask(
        task.index,
        task.store,
        task.query_pair_Q[:queries],
        task.page_row_P[kept],
        tuple(frozenset(new_position[p] for p in of_query) for of_query in relevant),
    )


def evaluate(
    task: RetrievalTask, by: Inference, dims: Sequence[int], *, ranked: bool = False
) -> tuple[dict[str, dict[str, float]], Rankings | None]:
    """Measures by dimension (as text), the same on every rank. A collective; leaves a strategy in training mode.

    Args:
        dims: Prefixes of the embedding to search with; the full one among them.
        ranked: Whether rank 0 is to have the rankings at the full dimension too.
    """
    query_QD, page_PD = embeddings_of(task, by)
    rankings: Rankings | None = None

    def measure_dims() -> dict[str, dict[str, float]]:
        nonlocal rankings
        measures = {}
        for dim in dims:
            # The first ranks of a deeper search are those of a shallow one.
            is_kept = ranked and dim == max(dims)
            score_Qk, page_Qk = top_k(query_QD, page_PD, LOOKED_AT if is_kept else DEPTH, dim=dim, moved=by.moved)
            measures[str(dim)] = measure(page_Qk[:, :DEPTH], task.relevant)
            if is_kept:
                rankings = rankings_of(page_Qk.numpy(), score_Qk.numpy(), task.relevant)
        return measures

    return on_main_rank(by.world, measure_dims), rankings


def embeddings_of(task: RetrievalTask, by: Inference) -> tuple[Tensor, Tensor]:
    """Embeddings of a task's queries [Q, D] and pages [P, D], on every rank's CPU. A collective, as `evaluate`."""
    by.model.train(False)
    try:
        query_QD = encode(by, task.index, task.store, "query", task.index.query_N[task.query_pair_Q])
        return query_QD, encode(by, task.index, task.store, "document", task.page_row_P)
    finally:
        by.model.train(True)
