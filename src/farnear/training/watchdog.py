"""The watchdog: when no rank makes progress any more, one report that says where each of them is, then the end.

A thread on every rank tells the others, by a small file in the run folder, where its rank is and how much it has done
(a heartbeat). A rank that has done nothing for the whole limit looks at the others' heartbeats. Where one of them has
moved, the wait is a long one and nothing more: rank 0 may be searching. Where none has, the run hangs:

- the first rank to find that opens a folder for the report; every rank whose watchdog still runs, for a rank that waits
  in a collective has threads that do, leaves its place, the pairs in its hands and the stacks of all its threads there;
- those that left nothing are named from their last heartbeats: stopped, swapped out, or on a machine that is gone;
- the report is put together, its first line is told as the run's error on every machine, and every rank ends its
  process at once, as nothing else would get it out of a collective.

The process groups' own timeouts come after: they end a rank whose watchdog is wrong, or whose peers do everything but
what it waits for.
"""

import faulthandler
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from farnear.errors import RunStoppedError
from farnear.run_folder import RunFolder
from farnear.training.watch import Watch
from farnear.wording import some_of, utc_now

SHARE_OF_TIMEOUT = 0.7
"""Of the process groups' timeout: when the watchdog reports, so that its report comes before theirs."""

_MOST_RANKS_TOLD = 4


class Watchdog:
    """Watches one rank.

    Args:
        watch: Tells where the rank is, and how long a rank may stand there.
        end: Ends the process, with the error that is to be told or, where there is none to be read, without. It
            does not return.
    """

    def __init__(
        self,
        watch: Watch,
        folder: RunFolder,
        rank: int,
        world_size: int,
        end: Callable[[RunStoppedError | None], None],
    ) -> None:
        self._watch, self._folder, self._rank, self._world_size, self._end = watch, folder, rank, world_size, end
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._seen: dict[int, Any] = {}

    @property
    def _interval(self) -> float:
        return min(10.0, self._watch.limit / 10)

    def __enter__(self) -> "Watchdog":
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        with suppress(OSError):
            _heartbeat(self._folder, self._rank).unlink()

    def _run(self) -> None:
        moves, moved_at = -1, time.monotonic()
        beaten = moved_at
        while not self._stopped.wait(min(1.0, self._interval)):
            if time.monotonic() - beaten < self._interval:
                continue
            beaten = time.monotonic()
            self._beat()
            if self._folder.hang.is_dir():
                self._leave_report()
                self._wait_for_the_end()
            if self._watch.moves != moves:
                moves, moved_at = self._watch.moves, time.monotonic()
                self._seen = {}
                continue
            stuck = time.monotonic() - moved_at
            # Looked at twice at least, for only a change tells that a rank moves.
            if stuck > self._watch.limit / 2 and self._another_moves():
                moved_at = time.monotonic()
            elif stuck > self._watch.limit:
                self._report(stuck)

    def _beat(self) -> None:
        facts = {
            "rank": self._rank,
            "host": platform.node(),
            "pid": os.getpid(),
            "moves": self._watch.moves,
            **self._watch.place.as_plain(),
            "place": str(self._watch.place),
            "pairs": some_of(self._watch.names_of_pairs()),
            "saves": str(self._watch.saves) if self._watch.saves else None,
            "time": utc_now(),
        }
        path = _heartbeat(self._folder, self._rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".tmp")
            fresh.write_text(json.dumps(facts), encoding="utf-8")
            os.replace(fresh, path)
        except OSError:
            return  # a full disk is told by what needs it; the next beat may get through

    def _another_moves(self) -> bool:
        """Whether a heartbeat has changed since it was looked at last; the first look at a rank tells nothing."""
        before = self._seen
        heard = {rank: read_heartbeat(self._folder, rank) for rank in range(self._world_size) if rank != self._rank}
        self._seen = {rank: (facts["pid"], facts["moves"]) for rank, facts in heard.items() if facts}
        return any(rank in before and before[rank] != moves for rank, moves in self._seen.items())

    def _report(self, seconds: float) -> None:
        """Open the report, wait for the others' parts, put it together, and end."""
        try:
            self._folder.path.mkdir(parents=True, exist_ok=True)
            self._folder.hang.mkdir()
        except OSError:
            # Another rank was first, or nothing can be written here: then the stacks are all there is.
            if not self._folder.hang.is_dir():
                faulthandler.dump_traceback(all_threads=True)
                self._end(RunStoppedError(f"rank {self._rank} hangs in {self._watch.place}; its stacks are above"))
                return
            self._leave_report()
            self._wait_for_the_end()
            return
        self._leave_report()
        # They look once an interval.
        deadline = time.monotonic() + 1.5 * self._interval
        while time.monotonic() < deadline and len(self._answers()) < self._world_size:
            time.sleep(self._interval / 10)
        line = self._compose(seconds)
        self._end(RunStoppedError(line))

    def _leave_report(self) -> None:
        path = self._folder.hang / f"rank-{self._rank:05d}.txt"
        if path.exists():
            return
        try:
            with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as file:
                place, pairs = self._watch.place, self._watch.names_of_pairs()
                saves = f", and saves: {self._watch.saves}" if self._watch.saves else ""
                file.write(f"rank {self._rank} ({platform.node()}, process {os.getpid()}): {place}{saves}\n")
                file.write(f"pairs in hand: {' '.join(pairs) or 'none'}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            os.replace(path.with_suffix(".tmp"), path)
        except OSError:
            return

    def _wait_for_the_end(self) -> None:
        """The rank that puts the report together is done when it moves the folder; then this rank may end too.

        It tells the same line, which on another machine nobody else would.
        """
        deadline = time.monotonic() + 3 * self._interval
        while self._folder.hang.is_dir() and time.monotonic() < deadline:
            time.sleep(self._interval / 10)
        line = None
        with suppress(OSError, IndexError):
            newest = max((self._folder.path / "hangs").glob("*/report.txt"))
            line = newest.read_text(encoding="utf-8").splitlines()[0]
        self._end(RunStoppedError(line) if line and not self._folder.hang.is_dir() else None)

    def _answers(self) -> list[int]:
        return [rank for rank in range(self._world_size) if (self._folder.hang / f"rank-{rank:05d}.txt").exists()]

    def _compose(self, seconds: float) -> str:
        """Write the report, move it where reports stay, and give the line that sums it up."""
        answered = self._answers()
        silent = [rank for rank in range(self._world_size) if rank not in answered]
        told = [_last_words(self._folder, rank) for rank in silent[:_MOST_RANKS_TOLD]]
        told += ["..."] if len(silent) > _MOST_RANKS_TOLD else []
        report = self._folder.path / "hangs" / utc_now().replace(":", "")
        line = (
            f"no rank has made progress for {seconds:.0f} s: "
            + (f"silent: {'; '.join(told)}; " if silent else "every rank's watchdog answers; ")
            + f"rank {self._rank} waits in {self._watch.place}{_in_hand(some_of(self._watch.names_of_pairs()))}; "
            f"{report}/report.txt has the stacks; "
            "continue with --resume, or raise training.ddp_timeout if this was no hang"
        )
        texts = [f"{line}\n", *(f"{_last_words(self._folder, rank)}\n" for rank in silent)]
        try:
            texts += [(self._folder.hang / f"rank-{rank:05d}.txt").read_text(encoding="utf-8") for rank in answered]
            (self._folder.hang / "report.txt").write_text("\n".join(texts), encoding="utf-8")
            report.parent.mkdir(exist_ok=True)
            os.rename(self._folder.hang, report)
        except OSError as error:
            line += f" (the report could not be written: {error})"
        return line


def clear_heartbeats(folder: RunFolder) -> None:
    """Forget what an earlier run has left. Reports of hangs stay."""
    for path in (folder.heartbeats, folder.hang):
        shutil.rmtree(path, ignore_errors=True)


def read_heartbeat(folder: RunFolder, rank: int) -> dict[str, Any] | None:
    """What a rank has told last, if it has."""
    try:
        facts: dict[str, Any] = json.loads(_heartbeat(folder, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts


def _last_words(folder: RunFolder, rank: int) -> str:
    facts = read_heartbeat(folder, rank)
    if facts is None:
        return f"rank {rank}, which has left no heartbeat"
    who = f"rank {rank} ({facts['host']}, process {facts['pid']})"
    return f"{who}, last heard of at {facts['time']} in {facts['place']}{_in_hand(facts['pairs'])}"


def _in_hand(pairs: str) -> str:
    return f" (pairs in hand: {pairs})" if pairs else ""


def _heartbeat(folder: RunFolder, rank: int) -> Path:
    return folder.heartbeats / f"rank-{rank:05d}.json"
