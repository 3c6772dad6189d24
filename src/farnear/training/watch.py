"""Where a rank is: the phase, step and mini-batch that its training is in, and the pairs that it has in hand.

The training says so as it goes, which costs an assignment. Others read it: the watchdog, which tells all ranks by
heartbeats, and reports it when nothing moves any more; and the terminal, which shows how far it is with what takes
long. The thread that saves checkpoints has a place of its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from farnear.parallel.world import PATIENCE

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Count:
    """How far a phase is, on all ranks together: ``done`` of ``total`` pages, queries, pairs."""

    what: str
    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.what}"


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        step: From 1, as in metrics.jsonl.
        mini_batch: From 1, of all that the phase goes through.
        pairs: Rows of the index that are in hand.
        count: How far the phase is, where that can be counted.
    """

    phase: str
    step: int | None = None
    mini_batch: int | None = None
    pairs: Int64 | None = None
    count: Count | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, [f"step {self.step}" if self.step is not None else "", self.in_step]))

    @property
    def in_step(self) -> str:
        """The same without the step."""
        parts = [self.phase]
        if self.mini_batch is not None:
            parts.append(f"mini-batch {self.mini_batch}")
        if self.count is not None:
            parts.append(str(self.count))
        return ", ".join(parts)

    def as_plain(self) -> dict[str, Any]:
        """For a record; without the pairs."""
        return {"phase": self.phase, "step": self.step, "mini_batch": self.mini_batch}


class Watch:
    """Where this rank is.

    Attributes:
        place: Of the training.
        saves: Of the thread that publishes checkpoints, while it does.
        moves: Grows with everything that is done, in either.
        limit: Seconds without a move of any rank that are no hang yet.
        name_of_pair: Of a row of the index, "shard name/KEY".
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.place = Place("start")
        self.saves: Place | None = None
        self.moves = 0
        self.name_of_pair: Callable[[int], str] = str

    def at(
        self,
        phase: str,
        *,
        step: int | None = None,
        mini_batch: int | None = None,
        pairs: Int64 | None = None,
        count: Count | None = None,
    ) -> None:
        """The training has come to this phase; it stays in its step, and has the step's pairs in hand, unless told."""
        self.place = Place(
            phase,
            self.place.step if step is None else step,
            mini_batch,
            self.place.pairs if pairs is None else pairs,
            count,
        )
        self.moves += 1

    def counts(self, phase: str, step: int | None = None) -> Callable[[str, int, int], None]:
        """What to call with (what, done, total) as a phase goes on."""
        return lambda what, done, total: self.at(phase, step=step, count=Count(what, done, total))

    @contextmanager
    def patient(self, seconds: float = PATIENCE.total_seconds()) -> Iterator[None]:
        """Inside, one rank may work that long without saying so."""
        before, self.limit = self.limit, max(seconds, self.limit)
        try:
            yield
        finally:
            self.moves += 1
            self.limit = before

    def saving(self, phase: str, step: int) -> None:
        """The saving thread has come to this phase."""
        self.saves = Place(phase, step)
        self.moves += 1

    def names_of_pairs(self) -> Sequence[str]:
        """The pairs in hand."""
        pairs = self.place.pairs
        return [] if pairs is None else [self.name_of_pair(int(pair)) for pair in pairs]
