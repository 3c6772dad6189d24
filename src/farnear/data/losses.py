"""How many pairs the faults of some shards cost: as far as it is known, and as far as it can be guessed.

A scan counts what it sees. Of a shard that was cut short it sees the sample at the cut, and nothing tells what stood
behind. A run that goes on with half of a shard must not count that as one pair, so such a shard is taken for as long as
the whole shards of its source are on average.
"""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

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
    known_of_shard: Counter[str] = Counter()
    for fault in index.faults:
        known_of_shard[fault.shard] += fault.pairs_lost
    cut_short = {fault.shard for fault in index.faults if fault.kind == "cut_short"}
    pairs_S = np.bincount(index.pair_shard_N, minlength=len(index.shards))
    presumed, no_measure = 0, []
    for first, stop in itertools.pairwise(index.source_start_K1.tolist()) if cut_short else ():
        numbers = np.unique(index.pair_shard_N[first:stop]).tolist()
        whole = [pairs_S[number] for number in numbers if index.shards[number] not in cut_short]
        for number in numbers:
            shard = index.shards[number]
            if shard in cut_short and whole:
                presumed += max(0, round(np.mean(whole)) - int(pairs_S[number]) - known_of_shard[shard])
            elif shard in cut_short:
                no_measure.append(shard)
    return Losses(sum(known_of_shard.values()), presumed, tuple(no_measure))
