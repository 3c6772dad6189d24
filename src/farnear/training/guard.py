"""Stopping together: a signal at any one rank makes all ranks save at the same step and end with code 75.

Ranks ask each other after every step, before every batch of an evaluation, and between the parts of a run's start. The
answer is the same on all of them, so all stop at the same place: after a step with a checkpoint of it, before the first
step without one. An evaluation that is broken off is made up for when the run continues.

The same question carries whether a checkpoint has failed on some rank, whose thread cannot tell the others' training.
"""

from dataclasses import dataclass
from signal import Signals as Signal

import torch

from farnear.parallel.collectives import agree_on_max
from farnear.parallel.world import World
from farnear.signals import Signals

_CPU = torch.device("cpu")
_RANKS = 1 << 32


class StopAskedError(Exception):
    """Raised on every rank alike where nothing can be saved: the caller ends what it is doing."""

    def __init__(self, asked: "Asked") -> None:
        super().__init__(str(asked))
        self.asked = asked


@dataclass(frozen=True)
class Asked:
    """What the ranks have agreed on.

    Attributes:
        signal: That came at a rank.
        rank: Which.
        save_failed: Whether some rank's save has.
    """

    signal: Signal | None = None
    rank: int = 0
    save_failed: bool = False

    def __str__(self) -> str:
        return f"{self.signal.name} at rank {self.rank}" if self.signal else "nothing"


class Guard:
    """Asks all ranks for what has come to one of them."""

    def __init__(self, world: World, signals: Signals | None = None) -> None:
        self._world, self._signals = world, signals

    def ask(self, *, save_failed: bool = False) -> Asked:
        """What has come to any rank so far. A collective."""
        first = self._signals.first if self._signals else None
        own = [first * _RANKS + self._world.rank if first else 0, int(save_failed)]
        found, any_failed = agree_on_max(own, _CPU, self._world.control)
        number, rank = divmod(found, _RANKS)
        return Asked(Signal(number) if number else None, rank, bool(any_failed))

    def stop_if_asked(self) -> None:
        """Raise StopAskedError, on every rank, when a signal has come. A collective."""
        asked = self.ask()
        if asked.signal:
            raise StopAskedError(asked)
