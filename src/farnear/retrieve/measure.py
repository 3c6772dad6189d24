"""How good a ranking is: nDCG, recall, reciprocal rank and average precision, for pages that are relevant or not.

A query may have several relevant pages. With hit(i) = 1 where the page at rank i (from 1) is relevant and R relevant
pages for the query, over the first k ranks:

- nDCG@k   = sum of hit(i) / log2(i + 1), divided by that of a perfect ranking, which has min(R, k) hits in front;
- recall@k = hits / R, so recall@1 of a query with two relevant pages is at most one half;
- MRR@k    = 1 / rank of the first hit, 0 without one;
- MAP@k    = the mean, over the min(R, k) pages that could be there, of hits up to i / i at each hit i.

Each is averaged over the queries. These are the definitions of sentence-transformers' InformationRetrievalEvaluator,
and a test holds farnear to its figures, so that a number in a run folder can be compared with one published elsewhere.
trec_eval, and with it ir_measures, has the same but for MAP, where it divides by R: the two are one where no query has
more than k relevant pages. nDCG: Jarvelin and Kekalainen, "Cumulated gain-based evaluation of IR techniques", TOIS
20(4), 2002.

Shapes: Q queries, k ranks.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Float64 = npt.NDArray[np.float64]

OF_A_RUN = ("ndcg@1", "ndcg@5", "ndcg@10", "recall@1", "recall@5", "recall@10", "mrr@10")
"""What a training measures of its model on the way."""
OF_AN_EVALUATION = (
    "ndcg@1",
    "ndcg@5",
    "ndcg@10",
    "recall@1",
    "recall@5",
    "recall@10",
    "recall@100",
    "mrr@10",
    "map@100",
)
"""What `farnear evaluate` measures."""


def measure(
    ranked_Qk: Tensor | npt.NDArray[np.int64], relevant: Sequence[Collection[int]], names: Sequence[str] = OF_A_RUN
) -> dict[str, float]:
    """The mean over the queries of each measure in ``names``; arguments and errors as in `measures_by_query`."""
    return {name: float(value_Q.mean()) for name, value_Q in measures_by_query(ranked_Qk, relevant, names).items()}


def measures_by_query(
    ranked_Qk: Tensor | npt.NDArray[np.int64], relevant: Sequence[Collection[int]], names: Sequence[str]
) -> dict[str, Float64]:
    """Each measure in ``names`` of each query, float64 [Q] in [0, 1].

    Args:
        ranked_Qk: Page ids, best first, as ``search.top_k`` returns them; it may have fewer columns than k where the
            corpus is that small.
        relevant: For each query the pages that answer it (best as a set).
        names: ``ndcg@k``, ``recall@k``, ``mrr@k``, ``map@k``.

    Raises:
        ValueError: When there is no query, when the lengths differ, and for a query without any relevant page: no
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
    hit_Qk = np.array(
        [[page in pages for page in row] for row, pages in zip(ranked_Qk.tolist(), pages_of_query, strict=True)],
        dtype=np.float64,
    ).reshape(len(relevant), ranked_Qk.shape[1])
    relevant_Q = np.array([len(pages) for pages in pages_of_query])
    return {
        name: _OF_KIND[kind](hit_Qk[:, : int(k)], relevant_Q, int(k)) for name in names for kind, k in [_parts(name)]
    }


def _parts(name: str) -> tuple[str, str]:
    kind, _, k = name.partition("@")
    if kind not in _OF_KIND or not k.isdecimal() or int(k) < 1:
        raise ValueError(f"{name!r} is no measure; these are: {', '.join(f'{known}@k' for known in _OF_KIND)}")
    return kind, k


def _ndcg(hit_Qk: Float64, relevant_Q: npt.NDArray[np.int64], k: int) -> Float64:
    gain_of_rank = 1.0 / np.log2(np.arange(2, k + 2))
    best_dcg_of_hits = np.concatenate([[0.0], gain_of_rank.cumsum()])
    dcg_Q = (hit_Qk * gain_of_rank[: hit_Qk.shape[1]]).sum(axis=1)
    return dcg_Q / best_dcg_of_hits[np.minimum(relevant_Q, k)]


def _recall(hit_Qk: Float64, relevant_Q: npt.NDArray[np.int64], k: int) -> Float64:
    return hit_Qk.sum(axis=1) / relevant_Q


def _reciprocal_rank(hit_Qk: Float64, relevant_Q: npt.NDArray[np.int64], k: int) -> Float64:
    return (hit_Qk / np.arange(1, hit_Qk.shape[1] + 1)).max(axis=1, initial=0.0)


def _average_precision(hit_Qk: Float64, relevant_Q: npt.NDArray[np.int64], k: int) -> Float64:
    precision_Qk = hit_Qk.cumsum(axis=1) / np.arange(1, hit_Qk.shape[1] + 1)
    return (precision_Qk * hit_Qk).sum(axis=1) / np.minimum(relevant_Q, k)


_OF_KIND = {"ndcg": _ndcg, "recall": _recall, "mrr": _reciprocal_rank, "map": _average_precision}
