"""What an evaluation has ranked, kept beside its measures: they say how good a model is, this says at what.

Shapes: Q queries, K ranks that were looked at, k first ones that are kept.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

KEPT = 10
LOOKED_AT = 1000
"""Ranks in which an embedder's right page is looked for: a page behind them is told apart by no reader."""


@dataclass(frozen=True, eq=False)
class Rankings:
    """Of all queries of a task.

    Attributes:
        page_Qk: Positions among the task's pages, best first; below 0 where there are fewer.
        score_Qk: Their scores.
        rank_Q: Of the first page that answers the query, from 1; 0 where none is among ``looked_at`` ranks.
        right_Q: That page's position; where it was not found, that of any page that answers.
        looked_at: How many ranks of each query were looked at.
    """

    page_Qk: Int64
    score_Qk: Float32
    rank_Q: Int64
    right_Q: Int64
    looked_at: int


def rankings_of(page_QK: Int64, score_QK: Float32, relevant: Sequence[Collection[int]]) -> Rankings:
    """Cut rankings to what is kept, once the first right page of each is found.

    Args:
        relevant: For each query the positions of the pages that answer it.
    """
    rank_Q = np.zeros(len(page_QK), np.int64)
    right_Q = np.array([min(pages) for pages in relevant], np.int64)
    for query, (page_K, pages) in enumerate(zip(page_QK, relevant, strict=True)):
        hits = np.flatnonzero(np.isin(page_K, list(pages)))
        if len(hits):
            rank_Q[query], right_Q[query] = hits[0] + 1, page_K[hits[0]]
    return Rankings(page_QK[:, :KEPT].copy(), score_QK[:, :KEPT].copy(), rank_Q, right_Q, page_QK.shape[1])
