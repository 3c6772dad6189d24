"""What something takes for one query that comes alone, as queries do where a model is used."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np

_TIMED = 9
"""That are timed one by one, after one that warms up."""


def seconds_alone(once: Callable[[int], object], count: int) -> float:
    """The median time of ``once`` over some of the numbers below ``count``, which is above 0, one at a time."""
    seconds = []
    for number in np.linspace(0, count - 1, 1 + _TIMED).astype(int).tolist():
        started = perf_counter()
        once(number)
        seconds.append(perf_counter() - started)
    return median(seconds[1:])
