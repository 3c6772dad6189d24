"""Whether one model is better than another, or only luckier with these queries; and on which queries it is.

Two models are measured on the same queries, so what is looked at is the difference query by query. Its mean would be
another one with other queries: a paired bootstrap draws as many queries as there are, with replacement, thousands of
times, and the interval holds the middle 95 % of the means (Efron's percentiles; for retrieval: Sakai, "Evaluating
evaluation metrics based on the bootstrap", SIGIR 2006). An interval that holds 0 says that these queries cannot tell
the two apart. The draws are a pure function of the seed, the same with every version of numpy.

Shapes: Q queries, R resamples, M differences that are looked at together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from farnear.data.plan import random_bits

Float64 = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
_AT_ONCE = 500


@dataclass(frozen=True)
class Difference:
    """Of a measure, a model's less the baseline's.

    Attributes:
        low, high: Of the interval.
        better, worse: Queries on which it is above, and below, the baseline's.
    """

    mean: float
    low: float
    high: float
    better: int
    worse: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def differences(difference_QM: Float64, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Difference]:
    """Mean and interval of every column, all by the same draws."""
    mean_RM = np.concatenate(list(_resampled_means(difference_QM, resamples, seed)))
    outside = 50 * (1 - CONFIDENCE)
    low_M, high_M = np.percentile(mean_RM, [outside, 100 - outside], axis=0)
    better_M, worse_M = (difference_QM > 0).sum(axis=0), (difference_QM < 0).sum(axis=0)
    columns = zip(difference_QM.mean(axis=0), low_M, high_M, better_M, worse_M, strict=True)
    return [Difference(float(m), float(low), float(high), int(b), int(w)) for m, low, high, b, w in columns]


def _resampled_means(difference_QM: Float64, resamples: int, seed: int) -> Iterator[Float64]:
    queries = len(difference_QM)
    for first in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - first)
        bits = random_bits(f"{seed}/bootstrap", np.arange(first * queries, (first + rows) * queries))
        drawn = ((bits >> np.uint64(32)) * np.uint64(queries) >> np.uint64(32)).astype(np.int64)
        # How often each query was drawn, of all these resamples in one count.
        drawn += np.repeat(np.arange(rows), queries) * queries
        times_rQ = np.bincount(drawn, minlength=rows * queries).reshape(rows, queries)
        yield times_rQ.astype(np.float64) @ difference_QM / queries
