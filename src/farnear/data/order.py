"""The order of a run's pairs, by a step's number: the schedule, and each epoch's plan from where it is kept."""

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from farnear.data.index import Index
from farnear.data.plan import PairFacts, Plan, PlanSettings, drawn_positive, schedule_of
from farnear.data.plan_store import stored_plan

Int64 = npt.NDArray[np.int64]

_PLANS_KEPT = 2  # workers are fed ahead, over the edge of an epoch


class Order:
    """Which pairs form the global batch of a step. The same on every rank; any thread may ask.

    ``plans`` is the folder where plans are kept.
    """

    def __init__(self, index: Index, settings: PlanSettings, plans: Path) -> None:
        self.index = index
        self.settings = settings
        self._facts = pair_facts(index)
        self.schedule = schedule_of(self._facts, settings)
        self._plans = plans
        self._plan_of_epoch: dict[int, Plan] = {}
        self._lock = threading.Lock()

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch; those of the last two epochs asked for are kept open."""
        with self._lock:
            plan = self._plan_of_epoch.get(epoch)
            if plan is None:
                if len(self._plan_of_epoch) >= _PLANS_KEPT:
                    del self._plan_of_epoch[next(iter(self._plan_of_epoch))]
                plan = self._plan_of_epoch[epoch] = stored_plan(self._plans, self._facts, self.settings, epoch)
        return plan

    def global_batch(self, step: int) -> Int64:
        """Pair rows of the global batch of ``step``, counted over all epochs."""
        epoch = self.schedule.epoch_of(step)
        row_G: Int64 = self.plan(epoch).rows_SG[step - self.schedule.steps_before(epoch)]
        return row_G[row_G >= 0]

    def positives(self, pairs: Int64, epoch: int) -> Int64:
        """Input rows of the positive documents that an epoch draws for some pairs, one each."""
        drawn: Int64 = self.index.positives[self.places_of_positives(pairs, epoch)]
        return drawn

    def places_of_positives(self, pairs: Int64, epoch: int) -> Int64:
        """Where those stand in `Index.positives`."""
        start, stop = self.index.positive_start_N1[pairs], self.index.positive_start_N1[pairs + 1]
        return start + drawn_positive(self.settings.seed, epoch, pairs, stop - start)


def pair_facts(index: Index) -> PairFacts:
    """What a plan needs to know of an index's pairs, of which every source has one."""
    first_positive = index.positives[index.positive_start_N1[:-1]]
    return PairFacts(
        fingerprint=index.fingerprint,
        query_hash_N=index.query_hash_N,
        positive_hash=index.input_hash_I[index.positives],
        positive_start_N1=index.positive_start_N1,
        shard_N=index.part_shard_M[index.part_start_I1[first_positive]],
        source_start_K1=index.source_start_K1,
    )
