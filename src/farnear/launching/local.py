"""Starts a training on this machine: the command that a person would type, watched until its last process has ended.

`farnear launch` adds three things to ``accelerate launch``. It picks the accelerate config of the run file's strategy
and prints the whole command, which does the same when typed by hand. It validates the run file and the run folder
before any process starts. And it sees the processes off: torchrun starts each rank in a session of its own, which
neither Ctrl-C nor the end of the launcher reaches, so that a stopped launch can leave ranks behind on the GPUs. SIGINT,
SIGTERM, SIGHUP and SIGUSR1 are passed on to the ranks, which save and end with code 75; a second SIGINT ends them at
once.

Every process of a launch inherits the name of the launch's outcome file in its environment. That is how they are all
found at the end, data workers and orphans included.
"""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from farnear.config import load_config
from farnear.errors import RunInterruptedError, RunStoppedError, UserError
from farnear.outcome import OUTCOME_FILE, announced, read_outcome
from farnear.processes import end_with_parent
from farnear.resources import resource_root
from farnear.run_folder import Resume, RunFolder, check_start, claimed, published_checkpoints
from farnear.status import write_failure

SECONDS_BETWEEN_LOOKS = 0.1
# After the first error another rank may report a different one.
SECONDS_FOR_OTHER_RANKS = 1.0
SECONDS_FROM_SIGTERM_TO_SIGKILL = 5.0
RESUME_WORDS: dict[Resume | None, tuple[str, ...]] = {None: (), "newest": ("--resume",), "auto": ("--resume", "auto")}
SIGNALS_TO_END_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def launch(
    run_file: Path,
    overrides: Sequence[str],
    *,
    resume: Resume | None = None,
    config_file: Path | None = None,
    num_processes: int | None = None,
) -> int:
    """Check a run, print the command that trains it, run that command.

    Args:
        run_file: The run file.
        overrides: `section.key=value` words.
        resume: See `farnear.train`.
        config_file: An accelerate config to use in place of the strategy's own.
        num_processes: Ranks; wins over the run file's.

    Returns:
        The exit code: 0, or that of the training, 75 where a signal has stopped it in good order, or 128 + the number
        of the signal that has ended it.

    Raises:
        UserError: Before the start, or the one that a rank met.
    """
    if num_processes is not None:
        overrides = [*overrides, f"num_processes={num_processes}"]
    config = load_config(run_file, overrides)
    check_start(Path(config.output_dir), resume)
    model = Path(config.model.name_or_path)
    if not model.exists() and not model.is_absolute() and model.parent != Path() and model.parent.is_dir():
        print(f"there is no folder {model}; looking for a model of that name on the hub", flush=True)
    arguments = [str(run_file), *overrides, *RESUME_WORDS[resume]]
    environment: dict[str, str] = {}
    if config.strategy == "single":
        if config_file is not None:
            raise UserError(
                f"strategy single starts one process without accelerate, so {config_file} would not be read; "
                "drop --config_file, or set strategy=ddp"
            )
        shown, run = python_command(arguments)
    else:
        shown, run = accelerate_command(config.strategy, arguments, config_file, config.num_processes)
        environment = threads_of_a_rank(config.num_processes)
    print(shlex.join(shown), flush=True)
    folder = RunFolder(Path(config.output_dir))
    code = supervise(run, environment)
    if code not in (0, RunInterruptedError.exit_code) and folder.lock.exists():
        # Another launch that holds the folder will speak for itself.
        with suppress(UserError), claimed(folder):
            write_failure(folder, RunStoppedError(f"a process of the launch ended with code {code}"))
    if code > 128:
        published = published_checkpoints(folder.checkpoints)
        how = (
            f"with --resume continues from {published[-1].name}"
            if published
            else "starts anew: no checkpoint was saved"
        )
        print(f"farnear: the same command {how}", file=sys.stderr)
    return code


def python_command(arguments: Sequence[str], program: str = "train.py") -> tuple[list[str], list[str]]:
    """The command for one process: as a person types it, and as it is run."""
    words = ["-u", _short(resource_root() / "launch" / program), *arguments]
    return [_program(Path(sys.executable).name), *words], [sys.executable, *words]


def accelerate_command(
    strategy: str,
    arguments: Sequence[str],
    config_file: Path | None,
    num_processes: int | None,
    program: str = "train.py",
) -> tuple[list[str], list[str]]:
    """The command for several processes: as a person types it, and as it is run.

    Args:
        program: In the folder `launch`.

    Raises:
        UserError: The accelerate config does not exist.
    """
    if config_file is not None and not config_file.is_file():
        raise UserError(f"accelerate config {config_file} does not exist; name an existing file or drop --config_file")
    root = resource_root()
    words = ["--config_file", _short(config_file or root / "accelerate_configs" / f"{strategy}.yaml")]
    if num_processes is not None:
        words += ["--num_processes", str(num_processes)]
    words += [_short(root / "launch" / program), *arguments]
    return [_program("accelerate"), "launch", *words], [sys.executable, "-m", "accelerate.commands.launch", *words]


def threads_of_a_rank(num_processes: int | None) -> dict[str, str]:
    """The cores' share for each rank. torchrun would set one, with a warning; without a number of ranks so do we."""
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // num_processes) if num_processes else 1
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def supervise(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, seconds: float = math.inf
) -> int:
    """Run a command whose processes report through an outcome file, and leave none of them behind.

    Args:
        command: The program and its arguments.
        environment: Variables beside this process's own.
        seconds: That it may take.

    Returns:
        Its exit code, or 128 + the number of the signal that ended it or this process's wait for it.

    Raises:
        UserError: The first one that a rank met, or that the time is over.
    """
    with tempfile.TemporaryDirectory(prefix="farnear-") as folder, _signals_received() as received:
        outcome = Path(folder, "outcome.json")
        child = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONWARNINGS": _warnings(), **(environment or {}), OUTCOME_FILE: str(outcome)},
            # The terminal's Ctrl-C reaches this process alone, which then ends the others in order.
            start_new_session=True,
            # torchrun, for its part, ends its ranks when it takes a SIGTERM.
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
        at_once = is_late = False
        try:
            at_once = _wait(child, outcome, received, time.monotonic() + seconds)
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
        if received and child.returncode != 0:
            print(f"farnear: stopped by {received[0].name}; no process is left", file=sys.stderr)
            return 128 + received[0]
        if child.returncode != 0:
            print("farnear: a process failed; the first error above says why", file=sys.stderr)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _wait(child: subprocess.Popen[bytes], outcome: Path, received: Sequence[signal.Signals], deadline: float) -> bool:
    """Until the child has ended, a rank has told of an error, or time or a signal is to end them; whether at once."""
    passed_on = 0
    while child.poll() is None and not outcome.exists() and time.monotonic() < deadline:
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
    return ",".join(filter(None, ["ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS")]))


def _short(path: Path) -> str:
    """The path as one would type it: relative when it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _program(name: str) -> str:
    """A program of this Python's environment: its bare name where the shell finds that very one."""
    path = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(path) or not path.exists() else _short(path)
