"""Sees a launch's processes off: passes signals on to its ranks, and leaves none of its processes behind.

torchrun starts each rank in a session of its own, which neither Ctrl-C nor the end of the launcher reaches, so that a
stopped launch can leave ranks behind on the GPUs. Here every process of a launch inherits the name of the launch's
outcome file in its environment, and that is how they are all found at the end, data workers and orphans included.

Signals are for the ranks, which save and end with code 75: SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to them,
and a second SIGINT ends them at once. torchrun would give them 30 seconds and then kill them, so it is told to handle
none. Where a signal reaches every process, as SLURM's do, torchrun dies of it, and the ranks are waited for without it.
Before there are ranks there is nothing to save: a SIGUSR1, by which a scheduler asks for a save, has been obeyed then.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from farnear.errors import RunInterruptedError, UserError
from farnear.noise import OWN_WARNINGS
from farnear.outcome import OUTCOME_FILE, announced, read_outcome
from farnear.processes import end_with_parent

SECONDS_BETWEEN_LOOKS = 0.1
# After the first error another rank may report a different one.
SECONDS_FOR_OTHER_RANKS = 1.0
SECONDS_FROM_SIGTERM_TO_SIGKILL = 5.0
SIGNALS_TO_END_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def supervise(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    seconds: float = math.inf,
    has_failed: Callable[[], bool] = lambda: False,
) -> int:
    """Run a command whose processes report through an outcome file, and leave none of them behind.

    Args:
        command: The program and its arguments.
        environment: Variables beside this process's own.
        seconds: That it may take.
        has_failed: Asked once a signal is passed on: whether the run has failed elsewhere, so that there is nothing
            that ranks here could still save.

    Returns:
        Its exit code; 1 if it was killed by a signal that was not sent from here, 128 + the number of one that was.

    Raises:
        UserError: The first one that a rank met, or that the time is over.
        RunInterruptedError: Also where a SIGUSR1 came before there were ranks.
    """
    with tempfile.TemporaryDirectory(prefix="farnear-") as folder, _signals_received() as received:
        outcome = Path(folder, "outcome.json")
        child = subprocess.Popen(
            command,
            env={
                **os.environ,
                "PYTHONWARNINGS": _warnings(),
                "PET_SIGNALS_TO_HANDLE": "SIGQUIT",
                **(environment or {}),
                OUTCOME_FILE: str(outcome),
            },
            # The terminal's Ctrl-C reaches this process alone, which then ends the others in order.
            start_new_session=True,
            # torchrun dies of it, and its ranks hear of that: what a killed launch leaves saves and ends.
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
        at_once = is_late = False
        try:
            at_once = _wait(child, outcome, received, time.monotonic() + seconds, has_failed)
            is_late = child.poll() is None and not outcome.exists() and not received
            if outcome.exists():
                time.sleep(SECONDS_FOR_OTHER_RANKS)
        finally:
            if child.returncode != 0:
                _end(child, str(outcome), grace=0.0 if at_once else SECONDS_FROM_SIGTERM_TO_SIGKILL)
        if not at_once and (error := read_outcome(outcome)):
            raise error
        if is_late:
            raise UserError(f"the ranks did not end within {seconds:.0f} s and were ended; give them longer")
        if received and received[0] == signal.SIGUSR1 and not announced(outcome):
            raise RunInterruptedError(
                "stopped by SIGUSR1 before the training began, with nothing to save; the same command continues"
            )
        if received and child.returncode != 0:
            print(f"farnear: stopped by {received[0].name}; no process is left", file=sys.stderr)
            return 128 + received[0]
        if child.returncode < 0:
            killed_by = signal.Signals(-child.returncode)
            why = " (out of memory?)" if killed_by == signal.SIGKILL else ""
            print(f"farnear: a process was killed by {killed_by.name}{why}", file=sys.stderr)
            return 1
        if child.returncode != 0:
            print("farnear: a process failed; the first error above says why", file=sys.stderr)
        return child.returncode


def _wait(
    child: subprocess.Popen[bytes],
    outcome: Path,
    received: Sequence[signal.Signals],
    deadline: float,
    has_failed: Callable[[], bool],
) -> bool:
    """Until the child has ended, a rank has told of an error, or time or a signal is to end them; whether at once."""
    passed_on = 0
    while (
        not outcome.exists()
        and time.monotonic() < deadline
        and (child.poll() is None or (child.returncode < 0 and _ranks_left(outcome)))
    ):
        if len(received) > passed_on:
            number, is_first = received[passed_on], passed_on == 0
            passed_on += 1
            if number == signal.SIGINT and not is_first:
                return True
            if not _pass_on(number, outcome):
                return False  # before there are ranks there is nothing to save
            if is_first:
                words = "all ranks save and stop; another Ctrl-C (SIGINT) ends them at once"
                print(f"farnear: {number.name}: {words}", file=sys.stderr, flush=True)
        elif passed_on and has_failed():
            return True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return False


@contextmanager
def _signals_received() -> Iterator[list[signal.Signals]]:
    """A list to which the signals that should end the launch are added, instead of ending this process."""
    received: list[signal.Signals] = []
    # Under nohup a signal is ignored on purpose; it stays so.
    previous = {number: signal.getsignal(number) for number in SIGNALS_TO_END_ON}
    heeded = [number for number, handler in previous.items() if handler is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, lambda caught, _: received.append(signal.Signals(caught)))
    try:
        yield received
    finally:
        for number in heeded:
            signal.signal(number, previous[number])


def _pass_on(number: signal.Signals, outcome: Path) -> bool:
    """Send a signal to the ranks that would save; whether there are any."""
    ranks = announced(outcome)
    for pid in ranks:
        with suppress(ProcessLookupError):
            # What a hangup asks for, ranks know by the other name.
            os.kill(pid, signal.SIGTERM if number == signal.SIGHUP else number)
    return bool(ranks)


def _ranks_left(outcome: Path) -> bool:
    """Whether a rank goes on without torchrun: it has heard of its end, and saves."""
    mark = str(outcome)
    return any(process.pid in announced(outcome) for process in _processes_with(mark))


def _end(child: subprocess.Popen[bytes], mark: str, grace: float) -> None:
    """End the child at once and every other process of the launch with some seconds of grace.

    torchrun goes first: alive, it would report each rank's end as a failure.
    """
    child.kill()
    child.wait()
    deadline = time.monotonic() + grace
    told: set[int] = set()
    while processes := _processes_with(mark):
        is_late = time.monotonic() >= deadline
        for process in processes:
            if is_late or process.pid not in told:
                told.add(process.pid)
                _send(process, signal.SIGKILL if is_late else signal.SIGTERM)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _processes_with(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(OUTCOME_FILE) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or another user's
    return found


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _warnings() -> str:
    """PYTHONWARNINGS without multiprocessing's complaint that ranks which were ended did not tidy up themselves."""
    return ",".join(filter(None, [OWN_WARNINGS, os.environ.get("PYTHONWARNINGS")]))
