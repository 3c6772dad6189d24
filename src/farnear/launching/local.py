"""Starts a training on this machine: the command that a person would type, watched until its last process has ended.

`farnear launch` adds three things to ``accelerate launch``. It picks the accelerate config of the run file's strategy,
or checks the one it is given, and prints the whole command, which does the same when typed by hand. It validates the
run file, the run folder and the number of ranks before any process starts. And it sees the processes off: torchrun
starts each rank in a session of its own, which neither Ctrl-C nor the end of the launcher reaches, so that a stopped
launch can leave ranks behind on the GPUs.

Signals are for the ranks, which save and end with code 75: SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to them,
and a second SIGINT ends them at once. torchrun would give them 30 seconds and then kill them, so it is told to handle
none. Where a signal reaches every process, as SLURM's do, torchrun dies of it, and the ranks are waited for without it.

Every process of a launch inherits the name of the launch's outcome file in its environment. That is how they are all
found at the end, data workers and orphans included. On several machines each has a launch of its own, for its ranks.
"""

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

from farnear.config import RunConfig, load_config
from farnear.errors import RunInterruptedError, RunStoppedError, UserError
from farnear.launching.accelerate_config import check_config_file
from farnear.launching.hardware import Hardware, read_hardware
from farnear.launching.nodes import Nodes
from farnear.outcome import OUTCOME_FILE, announced, read_outcome
from farnear.processes import end_with_parent
from farnear.rank_logs import LOG_DIR
from farnear.resources import resource_root
from farnear.run_folder import Resume, RunFolder, check_start, claimed, published_checkpoints
from farnear.status import write_failure
from farnear.wording import counted

SECONDS_BETWEEN_LOOKS = 0.1
# After the first error another rank may report a different one.
SECONDS_FOR_OTHER_RANKS = 1.0
SECONDS_FROM_SIGTERM_TO_SIGKILL = 5.0
SECONDS_TO_LET_GO = 2.0
RESUME_WORDS: dict[Resume | None, tuple[str, ...]] = {None: (), "newest": ("--resume",), "auto": ("--resume", "auto")}
SIGNALS_TO_END_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def launch(
    run_file: Path,
    overrides: Sequence[str],
    *,
    resume: Resume | None = None,
    config_file: Path | None = None,
    num_processes: int | None = None,
    nodes: Nodes | None = None,
    log_dir: Path | None = None,
) -> int:
    """Check a run, print the command that trains it, run that command.

    Args:
        run_file: The run file.
        overrides: `section.key=value` words.
        resume: See `farnear.train`.
        config_file: An accelerate config to use in place of the strategy's own.
        num_processes: Ranks on all machines together; wins over the run file's.
        nodes: This machine's place among several.
        log_dir: Where each rank is to have a log of its own.

    Returns:
        The exit code: 0, or that of the training, 75 where a signal has stopped it in good order, or 128 + the number
        of the signal that has ended it.

    Raises:
        UserError: Before the start, or the one that a rank met.
    """
    nodes = nodes or Nodes()
    if num_processes is not None:
        overrides = [*overrides, f"num_processes={num_processes}"]
    config = load_config(run_file, overrides)
    check_start(Path(config.output_dir), resume)
    model = Path(config.model.name_or_path)
    if not model.exists() and not model.is_absolute() and model.parent != Path() and model.parent.is_dir():
        print(f"there is no folder {model}; looking for a model of that name on the hub", flush=True)
    hardware = read_hardware()
    ranks_here = ranks_of_machine(config, nodes, hardware)
    arguments = [str(run_file), *overrides, *RESUME_WORDS[resume]]
    if config.strategy == "single":
        if config_file is not None:
            raise UserError(
                f"strategy single starts one process without accelerate, so {config_file} would not be read; "
                "drop --config_file, or set strategy=ddp"
            )
        shown, run = python_command(arguments)
    else:
        if config_file is not None:
            check_config_file(config_file, config.strategy)
        total = config.num_processes
        if nodes.num_machines > 1:
            total = ranks_here * nodes.num_machines
        shown, run = accelerate_command(config.strategy, arguments, config_file, total, nodes)
    environment = {**threads_of_a_rank(ranks_here), **nodes.environment()}
    if log_dir is not None:
        environment[LOG_DIR] = os.path.abspath(log_dir)
    print(f"on {hardware}: {counted(ranks_here, 'rank')}{' here' if nodes.num_machines > 1 else ''}", flush=True)
    print(shlex.join(shown), flush=True)
    folder = RunFolder(Path(config.output_dir))
    code = supervise(run, environment)
    if code not in (0, RunInterruptedError.exit_code) and folder.lock.exists():
        # Another launch that holds the folder will speak for itself. What was killed may hold it for a moment still.
        with suppress(UserError), claimed(folder, seconds=SECONDS_TO_LET_GO):
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


def ranks_of_machine(config: RunConfig, nodes: Nodes, hardware: Hardware) -> int:
    """Ranks that are started here, as the run file says, or as the hardware does.

    Raises:
        UserError: Machines would have unequally many, or this one more than it has GPUs.
    """
    if config.strategy == "single":
        if nodes.num_machines > 1:
            raise UserError(
                f"strategy single is one process, not one on each of {nodes.num_machines} machines; set ddp"
            )
        return 1
    if config.num_processes is None:
        return hardware.ranks
    ranks, left = divmod(config.num_processes, nodes.num_machines)
    if left or not ranks:
        raise UserError(
            f"num_processes counts the ranks of all {nodes.num_machines} machines, which have equally many, and "
            f"{config.num_processes} cannot be shared out; set a multiple of {nodes.num_machines}"
        )
    hardware.refuse_more_ranks(ranks)
    return ranks


def python_command(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command for one process: as a person types it, and as it is run."""
    words = ["-u", _short(resource_root() / "launch" / "train.py"), *arguments]
    return [_program(Path(sys.executable).name), *words], [sys.executable, *words]


def accelerate_command(
    strategy: str,
    arguments: Sequence[str],
    config_file: Path | None,
    num_processes: int | None,
    nodes: Nodes | None = None,
) -> tuple[list[str], list[str]]:
    """The command for several processes: as a person types it, and as it is run."""
    root = resource_root()
    words = ["--config_file", _short(config_file or root / "accelerate_configs" / f"{strategy}.yaml")]
    if nodes is not None:
        words += nodes.words()
    if num_processes is not None:
        words += ["--num_processes", str(num_processes)]
    if nodes is not None and nodes.num_machines > 1 and strategy.startswith("zero"):
        # DeepSpeed's own ways start the other machines from this one, over ssh.
        words += ["--deepspeed_multinode_launcher", "standard"]
    words += [_short(root / "launch" / "train.py"), *arguments]
    return [_program("accelerate"), "launch", *words], [sys.executable, "-m", "accelerate.commands.launch", *words]


def threads_of_a_rank(ranks: int) -> dict[str, str]:
    """The cores' share for each rank of this machine. torchrun would set one, with a warning."""
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // ranks)))}


def supervise(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command whose processes report through an outcome file, and leave none of them behind.

    Args:
        command: The program and its arguments.
        environment: Variables beside this process's own.

    Returns:
        Its exit code, or 128 + the number of the signal that ended it or this process's wait for it.

    Raises:
        UserError: The first one that a rank met.
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
            # torchrun, for its part, ends its ranks when it takes a SIGTERM.
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
        at_once = False
        try:
            at_once = _wait(child, outcome, received)
            if outcome.exists():
                time.sleep(SECONDS_FOR_OTHER_RANKS)
        finally:
            if child.returncode != 0:
                _end(child, str(outcome), grace=0.0 if at_once else SECONDS_FROM_SIGTERM_TO_SIGKILL)
        if not at_once and (error := read_outcome(outcome)):
            raise error
        if received and child.returncode != 0:
            print(f"farnear: stopped by {received[0].name}; no process is left", file=sys.stderr)
            return 128 + received[0]
        if child.returncode != 0:
            print("farnear: a process failed; the first error above says why", file=sys.stderr)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _wait(child: subprocess.Popen[bytes], outcome: Path, received: Sequence[signal.Signals]) -> bool:
    """Until the child has ended, a rank has told of an error, or a signal is to end them all; whether at once."""
    passed_on = 0
    while not outcome.exists() and (child.poll() is None or (child.returncode < 0 and _ranks_left(outcome))):
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
    return ",".join(filter(None, ["ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS")]))


def _short(path: Path) -> str:
    """The path as one would type it: relative when it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _program(name: str) -> str:
    """A program of this Python's environment: its bare name where the shell finds that very one."""
    path = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(path) or not path.exists() else _short(path)
