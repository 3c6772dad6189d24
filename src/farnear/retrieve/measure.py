"""How good a ranking is: nDCG, recall and the reciprocal rank, for pages that are relevant or not.

A query may have several relevant pages. With hit(i) = 1 where the page at rank i (from 1) is relevant and R relevant
pages for the query, over the first k ranks:

- nDCG@k   = sum of hit(i) / log2(i + 1), divided by that of a perfect ranking, which has min(R, k) hits in front;
- recall@k = hits / R, so recall@1 of a query with two relevant pages is at most one half;
- MRR@k    = 1 / rank of the first hit, 0 without one.

Each is averaged over the queries. These are the definitions of sentence-transformers' InformationRetrievalEvaluator,
and a test holds farnear to its figures, so that a number in a run folder can be compared with one published elsewhere.
nDCG: Jarvelin and Kekalainen, "Cumulated gain-based evaluation of IR techniques", TOIS 20(4), 2002.

Shapes: Q queries, k ranks.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor


def measure(
    ranked_Qk: Tensor | npt.NDArray[np.int64], relevant: Sequence[Collection[int]], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """``ndcg@k`` and ``recall@k`` for every k of ``ks`` and ``mrr@k`` for the largest, each in [0, 1].

    ``ranked_Qk`` holds page ids, best first, as ``search.top_k`` returns them; it may have fewer columns than k where
    the corpus is that small. ``relevant[q]`` holds the pages that answer query q (best as a set).

    Raises ValueError when there is no query, when the lengths differ, and for a query without any relevant page: no
    measure is defined for it, and leaving it out would change the mean without a word.
    """
    if len(relevant) != len(ranked_Qk) or not relevant:
        raise ValueError(
            f"{len(ranked_Qk)} rankings and {len(relevant)} sets of relevant pages: need one each, not zero"
        )
    unanswered = [query for query, pages in enumerate(relevant) if not pages]
    if unanswered:
        raise ValueError(f"query {unanswered[0]} has no relevant page ({len(unanswered)} such), so nothing is measured")
    pages_of_query = [set(pages) for pages in relevant]
    columns = ranked_Qk.shape[1]
    hit_Qk = np.array(
        [[page in pages for page in row] for row, pages in zip(ranked_Qk.tolist(), pages_of_query, strict=True)],
        dtype=np.float64,
    ).reshape(len(relevant), columns)
    relevant_Q = np.array([len(pages) for pages in pages_of_query])
    gain_of_rank = 1.0 / np.log2(np.arange(2, max(columns, *ks) + 2))
    best_dcg_of_hits = np.concatenate([[0.0], gain_of_rank.cumsum()])

    measures: dict[str, float] = {}
    for k in ks:
        dcg_Q = (hit_Qk[:, :k] * gain_of_rank[: min(k, columns)]).sum(axis=1)
        measures[f"ndcg@{k}"] = float((dcg_Q / best_dcg_of_hits[np.minimum(relevant_Q, k)]).mean())
    for k in ks:
        measures[f"recall@{k}"] = float((hit_Qk[:, :k].sum(axis=1) / relevant_Q).mean())
    largest = max(ks)
    reciprocal_Qk = hit_Qk[:, :largest] / np.arange(1, min(largest, columns) + 1)
    measures[f"mrr@{largest}"] = float(reciprocal_Qk.max(axis=1, initial=0.0).mean())
    return measures
