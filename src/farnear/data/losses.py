"""How many pairs the faults of some shards cost: as far as it is known, and as far as it can be guessed.

A scan counts what it sees. Of a shard that was cut short, or is garbage from some place on, it sees the sample at that
place, and nothing tells what stood behind. A run that goes on with half of a shard must not count that as one pair, so
such a shard is taken for as long as the whole shards of its source are on average.
"""

from dataclasses import dataclass

import numpy as np

from farnear.data.faults import pairs_lost
from farnear.data.index import Index


@dataclass(frozen=True)
class Losses:
    """Pairs lost.

    Attributes:
        known: By all faults together, at least.
        presumed: Beside those, behind the ends of shards that were cut short.
        no_measure: Shards that were cut short and whose source has no whole one to compare them with.
    """

    known: int
    presumed: int
    no_measure: tuple[str, ...]

    def share(self, pairs: int) -> float:
        """Of all pairs, where ``pairs`` are left: 1 where there is no measure."""
        lost = self.known + self.presumed
        return 1.0 if self.no_measure else lost / max(1, pairs + lost)


def losses_of(index: Index) -> Losses:
    """What the faults of an index cost. Pairs that were excluded are no loss."""
    ends_unseen = {fault.shard for fault in index.faults if fault.kind == "cut_short"} | _without_an_end(index)
    is_cut_S = np.array([shard in ends_unseen for shard in index.shards], np.bool_)
    presumed, no_measure = 0, []
    for number in np.flatnonzero(is_cut_S & (index.shard_source_S >= 0)).tolist():
        whole_S = ~is_cut_S & (index.shard_source_S == index.shard_source_S[number])
        if whole_S.any():
            presumed += max(0, round(index.shard_pairs_S[whole_S].mean()) - int(index.shard_pairs_S[number]))
        else:
            no_measure.append(index.shards[number])
    return Losses(pairs_lost(index.faults), presumed, tuple(no_measure))


def _without_an_end(index: Index) -> set[str]:
    """Shards with a damaged header behind which nothing usable was found: all the rest may have been lost with it."""
    damaged = [fault for fault in index.faults if fault.kind == "damaged_header"]
    if not damaged:  # nearly always, and the parts of all shards are many
        return set()
    last_S = np.zeros(len(index.shards), np.int64)
    np.maximum.at(last_S, index.part_shard_M, index.part_offset_M)
    last_of_shard = dict(zip(index.shards, last_S.tolist(), strict=True))
    return {fault.shard for fault in damaged if fault.offset > last_of_shard[fault.shard]}
