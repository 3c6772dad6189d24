"""Starts a training on this machine: the command that a person would type, watched until its last process has ended.

`farnear launch` adds three things to ``accelerate launch``. It picks the accelerate config of the run file's strategy,
or checks the one it is given, and prints the whole command, which does the same when typed by hand. It validates the
run file, the run folder and the number of ranks before any process starts. And it sees the processes off
(`farnear.launching.supervision`). On several machines each has a launch of its own, for its ranks.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from farnear.config import RunConfig, load_config
from farnear.errors import RunInterruptedError, RunStoppedError, UserError
from farnear.launching.accelerate_config import check_config_file
from farnear.launching.hardware import Hardware, read_hardware
from farnear.launching.nodes import Nodes
from farnear.launching.supervision import supervise
from farnear.mining_section import strategy_of_mining
from farnear.noise import QUIET
from farnear.rank_logs import LOG_DIR
from farnear.resources import resource_root
from farnear.run_folder import Resume, RunFolder, check_start, claimed, published_checkpoints
from farnear.status import read_status, write_failure, write_status
from farnear.tracking import refuse_missing_trackers
from farnear.wording import counted, utc_now

SECONDS_TO_LET_GO = 2.0
RESUME_WORDS: dict[Resume | None, tuple[str, ...]] = {None: (), "newest": ("--resume",), "auto": ("--resume", "auto")}


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
    refuse_missing_trackers(config.training.report_to)
    check_start(Path(config.output_dir), resume)
    for model in config.model.by_key.values():
        tell_of_missing_folder(model.name_or_path)
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
    environment = {**variables_of_ranks(ranks_here, has_gpus=bool(hardware.gpus)), **nodes.environment()}
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        environment[LOG_DIR] = os.path.abspath(log_dir)
    print(f"on {hardware}: {counted(ranks_here, 'rank')}{' here' if nodes.num_machines > 1 else ''}", flush=True)
    print(shlex.join(shown), flush=True)
    folder = RunFolder(Path(config.output_dir))
    started = utc_now()
    nodes.meet()
    try:
        code = supervise(run, environment, has_failed=lambda: _state_since(started, folder) == "failed")
    except RunInterruptedError as stop:
        # Ranks have noted it themselves, if there were any.
        if _state_since(started, folder) is None:
            with suppress(UserError), claimed(folder):
                write_status(folder, "stopped", exit_code=stop.exit_code, reason=str(stop))
        raise
    if code not in (0, RunInterruptedError.exit_code) and folder.lock.exists():
        # Another launch that holds the folder will speak for itself. What was killed may hold it for a moment still.
        with suppress(UserError), claimed(folder, seconds=SECONDS_TO_LET_GO):
            write_failure(folder, RunStoppedError(f"a process of the launch ended with code {code}"))
    if code != 0:
        published = published_checkpoints(folder.checkpoints)
        how = (
            f"with --resume continues from {published[-1].name}"
            if published
            else "starts anew: no checkpoint was saved"
        )
        print(f"farnear: the same command {how}", file=sys.stderr)
    return code


def tell_of_missing_folder(model: str) -> None:
    """Say that a name which looks like a folder is taken for one on the hub, which may take a while to answer."""
    path = Path(model)
    if not path.exists() and not path.is_absolute() and path.parent != Path() and path.parent.is_dir():
        print(f"there is no folder {path}; looking for a model of that name on the hub", flush=True)


def _state_since(time: str, folder: RunFolder) -> str | None:
    """The run's state, if it was written then or later."""
    status = read_status(folder) or {}
    return status.get("state") if str(status.get("time", "")) >= time else None


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


def run_beside(program: str, config: RunConfig, arguments: Sequence[str], folder: Path) -> int:
    """Work that trains nothing, on the ranks of this machine, into a folder. Returns the exit code.

    Args:
        program: In the folder `launch`.

    Raises:
        UserError: Before the start, or the one that a rank met.
    """
    hardware = read_hardware()
    ranks = ranks_of_machine(config, Nodes(), hardware)
    strategy = strategy_of_mining(config.strategy)
    if strategy == "single":
        _, command = python_command(arguments, program)
    else:
        _, command = accelerate_command(strategy, arguments, None, config.num_processes, program=program)
    print(f"on {hardware}: {counted(ranks, 'rank')}, {config.model.title}, into {folder}", flush=True)
    return supervise(command, variables_of_ranks(ranks, has_gpus=bool(hardware.gpus)))


def python_command(arguments: Sequence[str], program: str = "train.py") -> tuple[list[str], list[str]]:
    """The command for one process: as a person types it, and as it is run."""
    words = ["-u", _short(resource_root() / "launch" / program), *arguments]
    return [_program(Path(sys.executable).name), *words], [sys.executable, *words]


def accelerate_command(
    strategy: str,
    arguments: Sequence[str],
    config_file: Path | None,
    num_processes: int | None,
    nodes: Nodes | None = None,
    program: str = "train.py",
) -> tuple[list[str], list[str]]:
    """The command for several processes: as a person types it, and as it is run.

    Args:
        program: In the folder `launch`.
    """
    root = resource_root()
    words = ["--config_file", _short(config_file or root / "accelerate_configs" / f"{strategy}.yaml")]
    if nodes is not None:
        words += nodes.words()
    if num_processes is not None:
        words += ["--num_processes", str(num_processes)]
    if nodes is not None and nodes.num_machines > 1 and strategy.startswith("zero"):
        # DeepSpeed's own ways start the other machines from this one, over ssh.
        words += ["--deepspeed_multinode_launcher", "standard"]
    words += [_short(root / "launch" / program), *arguments]
    return [_program("accelerate"), "launch", *words], [sys.executable, "-m", "accelerate.commands.launch", *words]


def variables_of_ranks(ranks: int, *, has_gpus: bool) -> dict[str, str]:
    """What launchers and ranks of this machine find in their environment, as far as the user has not set it."""
    cores = len(os.sched_getaffinity(0))
    variables = {
        # The cores' share; torchrun would set one, with a warning.
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        # Said before anybody asks DeepSpeed, which warns when it has to find out.
        **({} if has_gpus else {"DS_ACCELERATOR": "cpu"}),
        **QUIET,
    }
    return {name: os.environ.get(name, value) for name, value in variables.items()}


def _short(path: Path) -> str:
    """The path as one would type it: relative when it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _program(name: str) -> str:
    """A program of this Python's environment: its bare name where the shell finds that very one."""
    path = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(path) or not path.exists() else _short(path)
