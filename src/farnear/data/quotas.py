"""How much of each source every step shows, and which steps make an epoch: whole numbers, before any pair is drawn.

A source is an endless stream of passes over its pairs. Each step takes a number of *units* from the streams: pairs
where sources are mixed within a batch, whole batches where each batch is of one source. After every prefix of steps,
counted from step 0 of the run and not from the start of an epoch, each source has given less than one unit more or less
than its weight says. Such an order exists for any weights (R. Tijdeman, "The chairman assignment problem", Discrete
Mathematics 32, 1980); it is found as in G. Steiner and S. Yeomans, "Level schedules for mixed-model, just-in-time
processes", Management Science 39, 1993: unit j of a source with weight w may be taken once j - 1 < w u, u being the
units taken of all sources by the end of the step, and must be taken once j <= w u; of those that may and need not, the
one that has to be taken first goes first.

An epoch is one pass of the largest source by weight. That one always gives exactly floor(w u), so that epochs begin at
steps that arithmetic finds. The others still fit in (Hall's condition: with any one source rounded so, the units that
are due within a stretch of steps are fewer than the stretch has room for, plus one; both are whole numbers).

All of this is done in integers: weights are read as the decimals they were written as, and nothing is rounded.

Shapes: K sources, S steps of an epoch, C cells of a source. A cell is what one batch shows of one source.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from farnear.errors import UserError

Mixing = Literal["per_batch", "within_batch"]
Tail = Literal["carry", "pad", "drop"]

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Stretch:
    """What an epoch shows of one source: cell c is a part of step ``step_C[c]`` of the epoch, steps ascending.

    It holds positions ``start_C[c]`` to ``stop_C[c]`` - 1 of the source's stream; with n pairs in the source, position
    x is number x % n of pass x // n. No cell is empty.
    """

    step_C: Int64
    start_C: Int64
    stop_C: Int64


@dataclass(frozen=True)
class Schedule:
    """Which stretch of each source's stream every step shows. Made by ``make_schedule``.

    ``shares`` are the weights as whole numbers without a common factor; source ``largest`` sets the length of an epoch.
    """

    pairs: tuple[int, ...]
    shares: tuple[int, ...]
    largest: int
    global_batch_size: int
    mixing: Mixing
    tail: Tail

    def steps_before(self, epoch: int) -> int:
        """Global steps before ``epoch``; the lengths of epochs may differ by one."""
        if self.tail == "carry":
            return math.floor(epoch * self._units_of_epoch / self._units_of_step)
        if self.mixing == "per_batch":
            return math.ceil(epoch * self._units_of_epoch)
        if self.tail == "drop":
            return epoch * (math.floor(self._units_of_epoch) // self.global_batch_size)
        # An epoch has floor(y) pairs, or one more; only where floor(y) fills its steps does that one cost a step.
        fewest = math.floor(self._units_of_epoch)
        full_steps, rest = divmod(fewest, self.global_batch_size)
        if rest:
            return epoch * (full_steps + 1)
        return epoch * full_steps + math.ceil(epoch * self._units_of_epoch) - epoch * fewest

    def epoch_of(self, step: int) -> int:
        """The epoch of a global step. Each epoch has at least one step, so no more than ``step`` lie before it."""
        return bisect_right(range(step + 2), step, key=self.steps_before) - 1

    def stretches(self, epoch: int) -> list[Stretch]:
        """What ``epoch`` shows of each source."""
        unit_SK = self._units_given(epoch)
        return [self._stretch(source, epoch, unit_SK[:, source]) for source in range(len(self.pairs))]

    def left_out(self, epoch: int) -> int:
        """Pairs that are cut off, under ``drop``, from the passes that end in ``epoch``."""
        if self.tail != "drop":
            return 0
        first_K, last_K = self._units_given(epoch)[[0, -1]].tolist()
        if self.mixing == "within_batch":
            return self.pairs[self.largest] - (last_K[self.largest] - first_K[self.largest])
        G = self.global_batch_size
        return sum(
            (pairs % G) * (last // (pairs // G) - first // (pairs // G))
            for pairs, first, last in zip(self.pairs, first_K, last_K, strict=True)
        )

    @property
    def _units_of_step(self) -> int:
        return self.global_batch_size if self.mixing == "within_batch" else 1

    @cached_property
    def _shares_of_all(self) -> int:
        return sum(self.shares)

    @cached_property
    def _units_of_epoch(self) -> Fraction:
        """Units of all sources in one pass of the largest: a whole number of its own units, divided by its weight."""
        pairs = self.pairs[self.largest]
        units = Fraction(pairs) if self.mixing == "within_batch" else self._batches_of_pass(self.largest)
        return units * self._shares_of_all / self.shares[self.largest]

    def _batches_of_pass(self, source: int) -> Fraction:
        batches = Fraction(self.pairs[source], self.global_batch_size)
        return batches if self.tail == "carry" else Fraction(math.ceil(batches) if self.tail == "pad" else int(batches))

    def _units_given(self, epoch: int) -> Int64:
        """Units that each source has given since the run began, at the start of ``epoch`` and after each step of it."""
        first = self.steps_before(epoch)
        restart = self._restart_before(epoch)
        units = self._units_from(restart, epoch)
        given = self._next([0] * len(self.pairs), units[0])
        history = [given]
        for unit in units[1:]:
            given = self._next(given, unit)
            history.append(given)
        return np.array(history[first - restart :], np.int64)

    def _next(self, given_K: list[int], units: int) -> list[int]:
        """What each source has given when all together have given ``units``; ``given_K`` is that of a step before."""
        total = self._shares_of_all
        due_K = [share * units // total for share in self.shares]
        next_K = [max(given, due) for given, due in zip(given_K, due_K, strict=True)]
        spare = units - sum(next_K)
        if spare:
            may_give = [
                (-(-(due_K[source] + 1) * total // share), source)  # the units at which its next one has to be given
                for source, share in enumerate(self.shares)
                if source != self.largest and next_K[source] == due_K[source] and share * units % total
            ]
            for _, source in sorted(may_give)[:spare]:
                next_K[source] += 1
        return next_K

    def _restart_before(self, epoch: int) -> int:
        """The last step up to the start of ``epoch`` at which what was given follows from the units given by then.

        That is any step with one or two sources, and with more any at which every weight gives a whole number.
        """
        first = self.steps_before(epoch)
        if len(self.pairs) <= 2:
            return first
        if self._ends_short:
            share = self.shares[self.largest]
            return self.steps_before(epoch - epoch % (share // math.gcd(share, self.pairs[self.largest])))
        return first - first % (self._shares_of_all // math.gcd(self._shares_of_all, self._units_of_step))

    @property
    def _ends_short(self) -> bool:
        """Whether the last step of an epoch takes fewer units than the others."""
        return self.tail == "pad" and self.mixing == "within_batch"

    def _units_from(self, step: int, epoch: int) -> list[int]:
        """Units of all sources at each step from ``step`` to the end of ``epoch``."""
        stop = self.steps_before(epoch + 1)
        if not self._ends_short:
            return [self._units_of_step * number for number in range(step, stop + 1)]
        units: list[int] = []
        for each in range(self.epoch_of(step), epoch + 1):
            start, end = math.ceil(each * self._units_of_epoch), math.ceil((each + 1) * self._units_of_epoch)
            units += range(start, end, self.global_batch_size)
        return [*units, end]

    def _stretch(self, source: int, epoch: int, unit_S: Int64) -> Stretch:
        step_C = np.flatnonzero(np.diff(unit_S))
        start_C, stop_C = unit_S[step_C], unit_S[step_C + 1]
        pairs, G = self.pairs[source], self.global_batch_size
        if self.mixing == "per_batch":
            if self.tail == "carry":
                return Stretch(step_C, start_C * G, stop_C * G)
            pass_C, batch_C = np.divmod(start_C, int(self._batches_of_pass(source)))
            start_C = pass_C * pairs + batch_C * G
            return Stretch(step_C, start_C, np.minimum(start_C + G, (pass_C + 1) * pairs))
        if self.tail == "drop" and source == self.largest:
            skipped = epoch * pairs - unit_S[0]
            return Stretch(step_C, start_C + skipped, stop_C + skipped)
        return Stretch(step_C, start_C, stop_C)


def make_schedule(
    pairs: Sequence[int], weights: Sequence[float] | None, *, global_batch_size: int, mixing: Mixing, tail: Tail
) -> Schedule:
    """The schedule of sources with ``pairs`` pairs each.

    ``weights`` need not sum to 1; None weighs a source by its pairs. The largest source is the one with the largest
    weight, of equal ones that with more pairs, then the first. Raises ``UserError`` for weights that are none, and for
    a global batch that would have to hold a pair twice.
    """
    shares = _whole_numbers(pairs, weights)
    largest = max(range(len(pairs)), key=lambda source: (shares[source], pairs[source], -source))
    schedule = Schedule(tuple(int(count) for count in pairs), shares, largest, global_batch_size, mixing, tail)
    _refuse_repeats(schedule)
    return schedule


def _whole_numbers(pairs: Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    if weights is None:
        weights = pairs
    if len(weights) != len(pairs):
        raise UserError(
            f"there are {len(weights)} weights for {len(pairs)} sources, so it is open how often a source is shown; "
            "give one weight a source"
        )
    for source, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"the weight of {_name(source, pairs)} is {weight}, and a source is shown by its weight; "
                "give a positive number, or leave the source out"
            )
    # 0.7 means seven tenths here, not the binary fraction next to it: 0.7 and 0.3 weigh the same as 7 and 3.
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return tuple(share // math.gcd(*whole) for share in whole)


def _refuse_repeats(schedule: Schedule) -> None:
    for source, pairs in enumerate(schedule.pairs):
        needed = _pairs_in_a_batch(schedule, source, schedule.tail)
        if needed <= pairs:
            continue
        padding_helps = schedule.tail != "pad" and all(
            _pairs_in_a_batch(schedule, each, "pad") <= schedule.pairs[each] for each in range(len(schedule.pairs))
        )
        whole = f"a global batch of {schedule.global_batch_size} pairs"
        share = "" if needed == schedule.global_batch_size else f" takes {needed} of them and"
        raise UserError(
            f"{_name(source, schedule.pairs)} has {pairs} pairs, but {whole}{share} must not hold a pair twice; "
            f"set a smaller training.global_batch_size{', or data.tail: pad' if padding_helps else ''}"
        )


def _pairs_in_a_batch(schedule: Schedule, source: int, tail: Tail) -> int:
    """The pairs of a source that a batch holds, no more than a pair over its average."""
    G, pairs, shares = schedule.global_batch_size, schedule.pairs, schedule.shares
    if schedule.mixing == "per_batch":
        return min(G, pairs[source]) if tail == "pad" else G
    weight = Fraction(shares[source], sum(shares))
    if tail != "pad":
        return math.ceil(weight * G)
    pairs_of_epoch = Fraction(pairs[schedule.largest] * sum(shares), shares[schedule.largest])
    return math.ceil(weight * min(Fraction(G), pairs_of_epoch))


def _name(source: int, pairs: Sequence[int]) -> str:
    return f"source {source + 1} of {len(pairs)}" if len(pairs) > 1 else "the data"
