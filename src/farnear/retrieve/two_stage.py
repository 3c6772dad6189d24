"""Two stages, as they are used: an embedder finds the pages nearest to a query, a reranker puts these into its order.

What each stage gives is measured apart, and what it takes: the seconds that a query waits when it comes alone, its
input prepared and the ranking ready, the pages being embedded before. A reranker that gains a hundredth and takes a
second is told so.

Without an embedder the candidates are given (`farnear.retrieve.rerank.given_candidates`), which says how well a
reranker tells pages apart, and nothing about a first stage.

Shapes: Q queries, k candidates of each.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from farnear.parallel.world import on_main_rank
from farnear.retrieve.alone import seconds_alone
from farnear.retrieve.encode import encode
from farnear.retrieve.evaluate import DEPTH, RetrievalTask, embeddings_of
from farnear.retrieve.inference import Inference, nothing
from farnear.retrieve.measure import measure
from farnear.retrieve.rankings import Rankings, rankings_of
from farnear.retrieve.rerank import given_candidates, pairs_of, reranked, score_pairs
from farnear.retrieve.search import top_k

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FirstStage:
    """The candidates of every query of a task; the same on every rank.

    Attributes:
        candidate_Qk: Positions among the task's pages, `farnear.retrieve.rerank.NO_CANDIDATE` where there is none.
        measures: Of the embedder's ranking; None where no embedder has made it.
        seconds_per_query: To embed a query that comes alone, and to search.
    """

    candidate_Qk: Int64
    measures: dict[str, float] | None = None
    seconds_per_query: float | None = None


@dataclass(frozen=True)
class SecondStage:
    """What came of the candidates; the same on every rank.

    Attributes:
        measures: Of the reranked candidates. A page that is not among them counts as not found.
        pairs: That were scored.
        rankings: Of the candidates.
        seconds_per_query: To score the candidates of a query that comes alone, their pages' reading included.
    """

    measures: dict[str, float]
    pairs: int
    rankings: Rankings
    seconds_per_query: float


def found_by(embedder: Inference, task: RetrievalTask, k: int) -> FirstStage:
    """The k pages nearest to each query. A collective."""
    query_QD, page_PD = embeddings_of(task, embedder)

    def search() -> tuple[Int64, dict[str, float]]:
        ranked_Qk = top_k(query_QD, page_PD, max(k, DEPTH), moved=embedder.moved)[1].numpy()
        return ranked_Qk[:, :k].astype(np.int64), measure(ranked_Qk, task.relevant)

    candidate_Qk, measures = on_main_rank(embedder.world, search)
    alone = replace(embedder, num_workers=0, told=nothing)

    def one(query: int) -> None:
        row = task.index.query_N[task.query_pair_Q[[query]]]
        top_k(encode(alone, task.index, task.store, "query", row), page_PD, k)

    return FirstStage(candidate_Qk, measures, seconds_alone(one, len(candidate_Qk)))


def given(task: RetrievalTask, k: int) -> FirstStage:
    """The candidates where there is no embedder."""
    return FirstStage(given_candidates(task, k))


def rerank(task: RetrievalTask, first: FirstStage, reranker: Inference) -> SecondStage:
    """Score the candidates and measure their new order. A collective; leaves a strategy in training mode."""
    alone = replace(reranker, num_workers=0, told=nothing)
    candidate_Qk = first.candidate_Qk

    def score(by: Inference, candidate_qk: Int64, query_q: slice) -> npt.NDArray[np.float32]:
        return score_pairs(by, task.index, task.store, *pairs_of(task, candidate_qk, query_q))

    reranker.model.train(False)
    try:
        score_n = score(reranker, candidate_Qk, slice(None))
        seconds = seconds_alone(
            lambda query: score(alone, candidate_Qk[query : query + 1], slice(query, query + 1)), len(candidate_Qk)
        )
    finally:
        reranker.model.train(True)
    page_Qk, score_Qk = reranked(candidate_Qk, score_n)
    rankings = rankings_of(page_Qk, score_Qk, task.relevant)
    return SecondStage(measure(page_Qk, task.relevant), len(score_n), rankings, seconds)
