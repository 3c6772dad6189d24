"""Lists laid end to end: an array that says where each starts takes the place of many small arrays."""

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


def ranges(start_n: Int64, size_n: Int64) -> Int64:
    """``start``, ``start + 1``, ... of the first list, ``size`` numbers, then those of the second, and so on."""
    numbers: Int64 = np.repeat(start_n - np.cumsum(size_n) + size_n, size_n) + np.arange(size_n.sum())
    return numbers
