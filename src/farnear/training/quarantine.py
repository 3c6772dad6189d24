"""Pairs that could not be used while training: named once in `quarantine.jsonl`, counted, and too many stop the run.

A pair is counted once, however often its turn comes. What the scan of the shards lost counts too: the limit,
`data.max_bad_fraction`, is a share of all the pairs that there should be.

All ranks know all records, so all of them stop at the same step.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from farnear.data.batch import Quarantined
from farnear.data.index import Index
from farnear.data.losses import losses_of
from farnear.data.remote import short_name
from farnear.errors import RunStoppedError, UserError
from farnear.parallel.collectives import gather_objects
from farnear.parallel.world import World, on_main_rank
from farnear.wording import printable


class Quarantine:
    """What a run could not use so far.

    Args:
        path: `quarantine.jsonl`, cut back to the step where the run stands.
        max_bad_fraction: Share of the pairs that may be lost.
    """

    def __init__(self, path: Path, index: Index, max_bad_fraction: float, world: World) -> None:
        self._path = path
        self._world = world
        losses = losses_of(index)
        self._lost_before = losses.known + losses.presumed
        self._pairs = len(index) + self._lost_before
        self._max_bad_fraction = max_bad_fraction
        self._known: set[Quarantined] = on_main_rank(world, lambda: set(_read(path)))

    def add(self, step: int, records: Iterable[Quarantined]) -> None:
        """Write down what this step could not use. A collective."""
        new = [one for of_rank in gather_objects(list(records)) for one in of_rank if one not in self._known]
        new = list(dict.fromkeys(new))
        self._known.update(new)
        if self._world.is_main and new:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **asdict(one)}) + "\n" for one in new)
            for one in new:
                pair = printable(f"{short_name(one.shard)}/{one.key}")
                print(f"step {step}: {pair} is left out: {one.input} {one.reason}", flush=True)

    def stop_if_too_many(self, step: int) -> None:
        """Raise RunStoppedError, on every rank, when more is lost than the run file allows."""
        lost = self._lost_before + len({(one.shard, one.key) for one in self._known})
        if lost > self._max_bad_fraction * self._pairs:
            raise RunStoppedError(
                f"step {step}: {lost} of {self._pairs} pairs cannot be used, above data.max_bad_fraction "
                f"({self._max_bad_fraction:g}), so the run stops; {self._path} names them: raise the limit and "
                "start again with --resume auto, or put that file into data.exclude and start in a new output_dir"
            )


def _read(path: Path) -> Iterable[Quarantined]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            yield Quarantined(*(record[name] for name in ("shard", "key", "input", "reason")))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} line {number} names no pair, so the limit could not be kept; remove the line or restore the "
                "file from a copy"
            ) from error
