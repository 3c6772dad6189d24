"""How well a model finds pages: every evaluation query against the corpus, at every Matryoshka dimension.

The corpus is every distinct page of the evaluation shards, positives and hard negatives, and of the shards of
distractors. A page's identity is its content and a query's its text, so a page stored twice is one page, and a query
that stands with two pages has two relevant ones. Published figures come from corpora with hard negatives in them;
without these they do not compare.

During a run a fixed sample is measured. It is taken by hash, so it is the same on every machine, whatever the order of
the shards.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from farnear.data.index import Index
from farnear.data.loader import Preprocess
from farnear.data.read import PairReader
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World, on_main_rank
from farnear.retrieve.encode import encode
from farnear.retrieve.measure import measure
from farnear.retrieve.search import top_k

DEPTH = 10


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, corpus and which page answers which query.

    Attributes:
        index: Of the evaluation shards.
        distractors: Of the shards of further pages, if any.
        query_pair_Q: Pair row of each distinct query.
        page_row_P: Page row, in ``index``, of each distinct page.
        distractor_row_R: Page row, in ``distractors``, of each page that ``index`` does not hold.
        relevant: For each query the positions in the corpus, pages before distractors, of its pages.
    """

    index: Index
    distractors: Index | None
    query_pair_Q: npt.NDArray[np.int64]
    page_row_P: npt.NDArray[np.int64]
    distractor_row_R: npt.NDArray[np.int64]
    relevant: tuple[frozenset[int], ...]

    @property
    def pages(self) -> int:
        """Size of the corpus."""
        return len(self.page_row_P) + len(self.distractor_row_R)

    @property
    def fingerprint(self) -> str:
        """Of the queries' texts, the pages' contents and what answers what: measures compare where it is the same."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(self.index.query_hash_N[self.query_pair_Q].tobytes())
        digest.update(self.index.page_hash_P[self.page_row_P].tobytes())
        if self.distractors is not None:
            digest.update(self.distractors.page_hash_P[self.distractor_row_R].tobytes())
        digest.update(repr([sorted(pages) for pages in self.relevant]).encode())
        return digest.hexdigest()


def build_task(index: Index, distractors: Index | None = None) -> RetrievalTask:
    """The whole evaluation: all queries, all pages."""
    _, query_pair_Q, query_of_pair_N = np.unique(index.query_hash_N, return_index=True, return_inverse=True)
    page_hash_P, page_row_P, position_of_page = np.unique(index.page_hash_P, return_index=True, return_inverse=True)
    distractor_row_R = np.zeros(0, dtype=np.int64)
    if distractors is not None:
        hash_R, distractor_row_R = np.unique(distractors.page_hash_P, return_index=True)
        distractor_row_R = distractor_row_R[~np.isin(hash_R, page_hash_P)]
    relevant: list[set[int]] = [set() for _ in query_pair_Q]
    for query, position in zip(query_of_pair_N, position_of_page[index.positive_N], strict=True):
        relevant[query].add(int(position))
    return RetrievalTask(
        index, distractors, query_pair_Q, page_row_P, distractor_row_R, tuple(frozenset(pages) for pages in relevant)
    )


def sample_task(task: RetrievalTask, queries: int, pages: int) -> RetrievalTask:
    """A fixed part of a task: the queries and pages of the lowest hashes, and all pages relevant to those queries."""
    # np.unique has sorted queries and pages by hash already.
    relevant = task.relevant[:queries]
    needed = np.unique(np.fromiter((p for of_query in relevant for p in of_query), dtype=np.int64))
    room = max(0, pages - len(needed))
    others = np.setdiff1d(np.arange(len(task.page_row_P)), needed)
    kept = np.sort(np.concatenate([needed, others[:room]]))
    new_position = {int(old): new for new, old in enumerate(kept)}
    return RetrievalTask(
        task.index,
        task.distractors,
        task.query_pair_Q[:queries],
        task.page_row_P[kept],
        task.distractor_row_R[: max(0, room - len(others))],
        tuple(frozenset(new_position[p] for p in of_query) for of_query in relevant),
    )


def evaluate(
    task: RetrievalTask,
    strategy: Strategy,
    world: World,
    preprocess: Preprocess,
    dims: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
) -> dict[str, dict[str, float]]:
    """Measures by dimension (as text), the same on every rank. A collective; leaves the strategy in training mode.

    Args:
        dims: Prefixes of the embedding to search with; the full one among them.
        batch_size: Inputs that go through the model at once on one rank.
        num_workers: Worker processes a rank that prepare them.
    """
    strategy.train(False)
    how = {"batch_size": batch_size, "num_workers": num_workers}
    reader = PairReader(task.index)
    q_QD = encode(strategy, world, reader, preprocess, "query", task.query_pair_Q, **how)
    k_PD = encode(strategy, world, reader, preprocess, "document", task.page_row_P, **how)
    if len(task.distractor_row_R) and task.distractors is not None:
        further = PairReader(task.distractors)
        k_PD = torch.cat([k_PD, encode(strategy, world, further, preprocess, "document", task.distractor_row_R, **how)])
    strategy.train(True)

    def measure_dims() -> dict[str, dict[str, float]]:
        return {str(dim): measure(top_k(q_QD, k_PD, DEPTH, dim=dim)[1], task.relevant) for dim in dims}

    return on_main_rank(world, measure_dims)
