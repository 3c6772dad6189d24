"""`farnear submit`: a run as a SLURM job, whose script a person can read, edit and submit without farnear.

The script is ``slurm/train.sbatch`` with two parts filled in: the lines for sbatch, and what this run and this cluster
need. All else, how ranks meet, what becomes of signals, when the job goes back into the queue, stands there and is the
same for everybody.

Before a night in the queue the run is planned (`farnear.launching.forecast`): what is foreseen to go wrong is told
instead of submitted. The signal before the time limit must come early enough for a save. How early follows from what
the run's saves have taken so far, in `saves.jsonl` of its folder; before the first one, from the size of a checkpoint.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from farnear.config import RunConfig, dump_config, load_config
from farnear.course import is_number
from farnear.errors import UserError
from farnear.files import readable_lines, replace_text
from farnear.resources import resource_root
from farnear.run_folder import RunFolder, check_start
from farnear.slurm_section import SlurmConfig
from farnear.tracking import refuse_missing_trackers
from farnear.wording import counted

LEAST_LEAD_SECONDS = 60
"""Before the end of the job."""

MOST_LEAD_SECONDS = 65535
"""That SLURM takes."""

UNKNOWN_LEAD_SECONDS = 300
"""Where nothing is known about the model or its saves."""

_NO_CLUSTER = ("configuration source", "Unable to contact", "Connection refused")

# Of saves and steps, whose times vary: the longest of the last ones, and as much again.
_LAST = 50
_SPARE_SECONDS = 30


def submit(run_file: Path, overrides: Sequence[str], *, nodes: int, dry_run: bool, planned: bool = True) -> int:
    """Check and plan a run, write its script into the run folder, and hand that to sbatch; or print the script.

    Args:
        planned: Whether what the plan foresees keeps the job from being submitted.

    Returns:
        The exit code.

    Raises:
        UserError: The run cannot start or is foreseen to fail, there is no SLURM here, or SLURM refuses the job.
    """
    config = load_config(run_file, overrides)
    folder = RunFolder(Path(config.output_dir))
    check_start(folder.path, "auto")
    _refuse_what_cannot_be(config, nodes)
    for note in _notes(config):
        print(f"note: {note}", file=sys.stderr)
    seconds = plan(config, run_file, nodes) if planned else None
    if dry_run:
        print(job_script(config, [str(run_file), *overrides], nodes, seconds), end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here, so no job can be submitted; run this on a login node, or --dry-run")
    if (waiting := _jobs_called(_job_name(folder))) and folder.submitted.exists():
        print(f"note: job {waiting} of this name is in the queue already", file=sys.stderr)
    logs = _logs(folder)
    logs.mkdir(parents=True, exist_ok=True)
    # What is submitted is trained, whatever becomes of the run file until the job starts, or starts again.
    replace_text(folder.submitted, dump_config(config))
    path = folder.path / "submit.sbatch"
    replace_text(path, job_script(config, [str(folder.submitted)], nodes, seconds))
    job = _sbatch(path)
    print(f"job {job} submitted; its script is {path}, what it trains {folder.submitted}")
    print(f"  tail -F {shlex.quote(str(logs / f'{job}.log'))}")
    print(f"  scancel --signal=USR1 {job}     saves, goes back into the queue and continues")
    print(f"  scancel {job}                   saves and ends; the same command continues")
    return 0


def _sbatch(script: Path) -> str:
    """Hand a script to SLURM; the job's id."""
    ended = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if ended.returncode != 0:
        why = " ".join(ended.stderr.split()).replace("sbatch: error: ", "")
        if any(words in why for words in _NO_CLUSTER):
            raise UserError(f"no SLURM cluster answers here ({why}); submit from a login node")
        raise UserError(f"SLURM refuses the job: {why}; mend section slurm of the run file (the script is {script})")
    return ended.stdout.strip().partition(";")[0]


def waiting_job(path: Path) -> str | None:
    """What SLURM says of the job of a run folder; None where there is none, or it does not say."""
    folder = RunFolder(path)
    if not folder.submitted.exists():
        return None
    jobs = _squeue("%i %T (%r)", f"--name={_job_name(folder)}").splitlines()
    return f"job {jobs[0].strip()}" if jobs else None


def _jobs_called(name: str) -> str:
    """Ids of this user's jobs of a name; none where SLURM does not say."""
    return " ".join(_squeue("%i", f"--name={name}", f"--user={os.getuid()}").split())


def _squeue(form: str, *options: str) -> str:
    command = ["squeue", "--noheader", f"--format={form}", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def plan(config: RunConfig, run_file: Path, nodes: int) -> float | None:
    """Seconds that a save is foreseen to take; None, and a line that says why, where the model is not described here.

    Raises:
        UserError: What is foreseen to go wrong, all of it.
    """
    from farnear.environment import quiet_libraries
    from farnear.launching.forecast import forecast
    from farnear.launching.foresee import foreseen
    from farnear.launching.planned_machine import planned_machine

    quiet_libraries()
    ranks = _ranks_per_node(config) or (None if config.num_processes else 1)
    machine = planned_machine(config, kind=config.slurm.gpu_type or "cpu", ranks_of_node=ranks, nodes=nodes)
    try:
        planned = forecast(config, run_file, machine)
    except UserError as error:
        print(f"not planned: {error}", file=sys.stderr)
        return None
    errors, _ = foreseen(planned)
    if errors:
        raise UserError(f"foreseen: {'; and: '.join(errors)} (--no-plan submits all the same)")
    return planned.save_seconds


def job_script(config: RunConfig, words: Sequence[str], nodes: int, save_seconds: float | None = None) -> str:
    """The job's script.

    Args:
        words: The run file and overrides, from the working folder.
        save_seconds: As a plan foresees it.
    """
    text = (resource_root() / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    options = "".join(f"#SBATCH {_quoted(option)}\n" for option in _options(config, nodes, save_seconds))
    text = _replaced(r"(^#SBATCH .*\n)+", options, text)
    settings = "\n".join(["# What this run and this cluster need.", *_settings(config, words)])
    text = _replaced(r"^# What this run and this cluster need\..*\n(.+\n)+", f"{settings}\n", text)
    made_by = f"#\n#   made by farnear submit, for {counted(nodes, 'node')}\n#\n"
    return _replaced(r"^#\n(#   .*\n)+#\n", made_by, text)


def lead_seconds(folder: RunFolder, save_seconds: float | None = None) -> int:
    """How long before its end a job has to be told, for the step in hand to end and a save to be published.

    Args:
        save_seconds: As a plan foresees it, for a run that has not saved yet; None where it is not known.
    """
    saves = [seconds for record in readable_lines(folder.saves, _LAST) if (seconds := _number(record.get("seconds")))]
    steps = [_seconds_of_step(record) for record in readable_lines(folder.metrics, _LAST)]
    save = max(saves, default=save_seconds)
    if save is None:
        return UNKNOWN_LEAD_SECONDS
    return min(MOST_LEAD_SECONDS, max(LEAST_LEAD_SECONDS, round(2 * (save + max(steps, default=0.0)) + _SPARE_SECONDS)))


def seconds_of(time: str) -> int:
    """A time limit as SLURM reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _notes(config: RunConfig) -> Iterator[str]:
    """What a cluster would take in another way than is probably meant."""
    slurm = config.slurm
    asked = " ".join(slurm.options)
    if not slurm.gpus_per_node and not slurm.gres and "--gpus" not in asked and "--gres" not in asked:
        yield "no GPU is asked for; slurm.gpus_per_node does"
    if not slurm.cpus_per_task and "--cpus-per" not in asked and "--exclusive" not in asked:
        yield "most clusters give all ranks and data workers of a node one core unless slurm.cpus_per_task says more"
    try:
        refuse_missing_trackers(config.training.report_to)
    except UserError as error:
        yield f"on this node {error}"


def _refuse_what_cannot_be(config: RunConfig, nodes: int) -> None:
    if config.strategy == "single" and nodes > 1:
        raise UserError(f"strategy single is one process and has no use for {nodes} nodes; set strategy=ddp")
    for what, text in (("output_dir", config.output_dir), ("the working folder", os.getcwd())):
        if not text.isprintable():
            raise UserError(f"{what} holds characters that no line of a script can: {text!r}; use another")
    limit, signal = seconds_of(config.slurm.time), config.slurm.signal_seconds
    if signal is not None and signal >= limit:
        raise UserError(
            f"slurm.signal_seconds is {signal}, and the whole job has {limit} s (slurm.time: {config.slurm.time}), so "
            "it would be told to save at its start; set it to less, or give the job more time"
        )
    ranks = _ranks_per_node(config)
    if ranks is not None and config.num_processes not in (None, ranks * nodes):
        raise UserError(
            f"the run file asks for num_processes={config.num_processes}, but {nodes} nodes with {ranks} ranks each "
            f"are {ranks * nodes}; take num_processes out, or set slurm.ranks_per_node"
        )
    if ranks is not None and ranks * nodes > config.training.global_batch_size:
        raise UserError(
            f"{ranks * nodes} ranks would share {config.training.global_batch_size} pairs, so that some have none; "
            "raise training.global_batch_size, or take fewer --nodes"
        )


def _ranks_per_node(config: RunConfig) -> int | None:
    """None where the job will see how many GPUs it finds."""
    return 1 if config.strategy == "single" else config.slurm.ranks_per_node or config.slurm.gpus_per_node


def _options(config: RunConfig, nodes: int, save_seconds: float | None) -> Iterator[str]:
    """Options of sbatch."""
    slurm, folder = config.slurm, RunFolder(Path(config.output_dir))
    yield f"--job-name={_job_name(folder)}"
    yield f"--nodes={nodes}"
    yield "--ntasks-per-node=1"
    named = ("account", "partition", "qos", "constraint", "gres", "gpus_per_node", "cpus_per_task", "mem", "time")
    for name in named:
        if (value := getattr(slurm, name)) is not None:
            yield f"--{name.replace('_', '-')}={value}"
    # Half of a short job's time is left to it.
    lead = slurm.signal_seconds or min(lead_seconds(folder, save_seconds), seconds_of(slurm.time) // 2)
    yield f"--signal=USR1@{lead}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--chdir={os.getcwd()}"
    # A % begins a pattern, as in %j.
    yield f"--output={str(_logs(folder)).replace('%', '%%')}/%j.log"
    yield from slurm.options


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a script: it knows quotes and backslashes, and no variables."""
    name, equals, value = option.partition("=")
    if not re.search(r"[\s'\"\\#]", value):
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'


def _settings(config: RunConfig, words: Sequence[str]) -> Iterator[str]:
    """Shell lines."""
    slurm, folder = config.slurm, RunFolder(Path(config.output_dir))
    yield from (slurm.setup.rstrip("\n") or _this_python()).split("\n")
    if slurm.offline:
        yield "export HF_HUB_OFFLINE=1"
    yield f"set -- {shlex.join(words)}"
    yield f"run_dir={shlex.quote(str(folder.path))}"
    yield f"log_dir={shlex.quote(str(_logs(folder)))}/$SLURM_JOB_ID"
    yield f"ranks_per_node={_ranks_per_node(config) or '${SLURM_GPUS_ON_NODE:-1}'}"
    yield f"container=({' '.join(map(shlex.quote, _container(slurm)))})"


def _container(slurm: SlurmConfig) -> list[str]:
    """Options that pyxis adds to srun."""
    if slurm.container is None:
        return []
    here = os.getcwd()
    mounts = ",".join(filter(None, [f"{here}:{here}", slurm.container_mounts]))
    return [f"--container-image={slurm.container}", f"--container-mounts={mounts}", f"--container-workdir={here}"]


def _this_python() -> str:
    """A line with which a node finds the Python that runs here."""
    activate = Path(sys.prefix, "bin", "activate")
    if sys.prefix != sys.base_prefix and activate.exists():  # which has a `python`
        return f"source {shlex.quote(str(activate))}"
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"


def _logs(folder: RunFolder) -> Path:
    return Path(os.path.abspath(folder.path / "logs"))


def _job_name(folder: RunFolder) -> str:
    """That squeue shows: without characters that mean something to SLURM."""
    return "farnear-" + re.sub(r"[^A-Za-z0-9._-]+", "-", folder.path.absolute().name)


def _replaced(pattern: str, text: str, script: str) -> str:
    script, found = re.subn(pattern, lambda _: text, script, count=1, flags=re.MULTILINE)
    if not found:
        raise RuntimeError(f"slurm/train.sbatch has no part like {pattern!r} any more")
    return script


def _seconds_of_step(record: dict[str, Any]) -> float:
    phases = record.get("seconds")
    return sum(map(_number, phases.values())) if isinstance(phases, dict) else 0.0


def _number(value: Any) -> float:
    """What a record says, if it is a number."""
    return value if is_number(value) else 0.0
