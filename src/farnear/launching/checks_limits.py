"""The doctor's checks of what can run out: cores, open files, shared memory, memory, disk."""

import math
import os
import resource
import shutil
from pathlib import Path

import psutil

from farnear.data.index_cache import cache_folder
from farnear.launching.findings import Finding, Subject, existing, fail, gigabytes, note, ok
from farnear.wording import counted

SHM = Path("/dev/shm")
# Where the run file does not bound them: about an A4 page at 100 dots an inch, and what Qwen's models make a token of.
PIXELS_OF_A_PAGE, PIXELS_OF_A_TOKEN = 1_000_000, 32 * 32
TOKENS_OF_AUTO = 16_384
SHARDS_OPEN = 256  # at most, in each process that reads
# A rank's own: libraries, sockets to other ranks, pipes.
FILES_OF_A_RANK, FILES_OF_A_WORKER, FILES_OF_A_MINI_BATCH = 128, 8, 8
BYTES_OF_AN_INDEX = 1 << 30
# fp32 weights and AdamW's two moments; then the export, in the base's type.
BYTES_OF_A_CHECKPOINT, BYTES_OF_AN_EXPORT = 12, 4


def ranks(subject: Subject) -> list[Finding]:
    """Processes against what they compute on."""
    wanted, cores, workers = subject.ranks, subject.cores, subject.workers
    if subject.gpus and wanted > subject.gpus:
        return fail(
            f"{wanted} ranks and {counted(subject.gpus, 'GPU')} that can be used: the last ranks would have none",
            f"set num_processes={subject.gpus}, or look at CUDA_VISIBLE_DEVICES",
        )
    if not subject.gpus and wanted > cores:
        return fail(
            f"{wanted} ranks on {cores} cores: they take turns, and each waits for the slowest",
            f"set num_processes={cores}",
        )
    processes = wanted * (1 + workers)
    who = f"{counted(wanted, 'rank')} with {counted(workers, 'data worker')} each"
    what = f"{who} on {cores} cores ({cores / wanted:.1f} a rank)"
    quota = _cores_of_cgroup()
    if quota is not None and quota < min(cores, processes):
        fewer = _fewer_workers(int(quota), subject)
        return note(f"{what}, of which the container may use {quota:g}", f"give it more{fewer and f', or set {fewer}'}")
    if processes > 2 * cores:
        fewer = _fewer_workers(2 * cores, subject)
        return note(what, f"more than two processes a core: {f'set {fewer}' if fewer else 'ask for more cores'}")
    return ok(what + (f" and {counted(subject.gpus, 'GPU')}" if subject.gpus else ""))


def _fewer_workers(processes: int, subject: Subject) -> str:
    """The setting with which ranks and workers are no more processes; empty where there are no workers to leave out."""
    fewer = max(0, processes // subject.ranks - 1)
    return f"data.dataloader_num_workers={fewer}" if fewer < subject.workers else ""


def files(subject: Subject) -> list[Finding]:
    """Open files of a rank against the limit: tensors of prepared mini-batches are handed over as open files."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = subject.config
    prefetch = config.data.dataloader_prefetch_factor if config is not None else 4
    of_workers = subject.workers * (FILES_OF_A_WORKER + prefetch * FILES_OF_A_MINI_BATCH)
    # Whoever reads, worker or rank, keeps shards open.
    needed = FILES_OF_A_RANK + max(of_workers, SHARDS_OPEN)
    what = f"{limit:,} open files a process, and a rank or worker may need {needed:,}"
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return ok(what)
    what += ": reading would stop with 'too many open files'"
    if most != resource.RLIM_INFINITY and most < needed:
        return fail(what, f"the hard limit is {most:,}: a new shell or the administrator raises it")
    enough = max(65_536, needed)
    return fail(what, f"ulimit -n {enough if most == resource.RLIM_INFINITY else min(enough, most)} before the launch")


def shm(subject: Subject) -> list[Finding]:
    """Shared memory, in which data workers leave their mini-batches, against all that may be there at once."""
    if not SHM.is_dir():
        return fail(
            f"{SHM} is not there, where data workers leave their mini-batches",
            "mount it, or set data.dataloader_num_workers=0",
        )
    free = shutil.disk_usage(SHM).free
    if subject.workers == 0:
        return ok(f"{gigabytes(free)} free in {SHM}; without data workers little of it is needed")
    config = subject.config
    pixels = (config.model.max_pixels if config is not None else None) or PIXELS_OF_A_PAGE
    size: int | None = 8
    tokens: int | str | None = None
    prefetch = 4
    if config is not None:
        size = config.training.mini_batch_size_of["document"]
        tokens = config.training.mini_batch_num_tokens_of["document"]
        prefetch = config.data.dataloader_prefetch_factor
    # Pages travel as one byte a colour.
    sizes = [3 * pixels * size] if size else []
    if tokens:
        sizes.append(3 * PIXELS_OF_A_TOKEN * (TOKENS_OF_AUTO if isinstance(tokens, str) else tokens))
    needed = subject.ranks * subject.workers * prefetch * min(sizes)
    workers = f"{counted(subject.ranks, 'rank')} x {counted(subject.workers, 'worker')}"
    what = (
        f"{gigabytes(free)} free in {SHM}, and {workers} x {prefetch} mini-batches of "
        f"{gigabytes(min(sizes))} make {gigabytes(needed)}"
    )
    if free >= needed:
        return ok(what)
    enough = math.ceil(1.25 * needed / 2**30)
    return fail(
        f"{what}: workers would be killed by a bus error",
        f"start the container with --shm-size={enough}g, or lower data.dataloader_num_workers or "
        "data.dataloader_prefetch_factor",
    )


def memory(subject: Subject) -> list[Finding]:
    """Host memory against what ranks hold there while they load the model."""
    limit = _bytes_of_cgroup()
    total, available = psutil.virtual_memory().total, psutil.virtual_memory().available
    of_container = ""
    if limit is not None and limit < total:
        used = _number_in("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes") or 0
        available = min(available, max(0, limit - used))
        of_container = f", the container's limit is {gigabytes(limit)} of {gigabytes(total)}"
    what = f"{gigabytes(available)} of host memory available{of_container}"
    config = subject.config
    if config is None or subject.parameters is None:
        return ok(what)
    # Where parameters are spread rank 0 alone loads them; on the CPU gradients and moments stay beside them.
    spread = config.strategy in ("zero3", "fsdp2")
    per_parameter = 4 if subject.gpus else 16
    needed = subject.parameters * per_parameter * (1 if spread else subject.ranks)
    one = spread or subject.ranks == 1
    what += f", and {'rank 0 needs' if one else f'{subject.ranks} ranks need'} {gigabytes(needed)} for the model"
    if available >= needed:
        return ok(what)
    return fail(
        f"{what}: the system would kill one",
        "ask for more memory (--mem under SLURM), start fewer ranks, or set strategy=zero3 or fsdp2, under which rank "
        "0 alone loads the weights",
    )


def disk(subject: Subject) -> list[Finding]:
    """Space where the run keeps checkpoints, and where indexes and downloaded shards are cached."""
    config = subject.config
    findings = []
    cache = cache_folder(config.data.cache_dir if config is not None else None)
    free = shutil.disk_usage(existing(cache)).free
    budget = (config.data.remote_cache_gb or 0) * 1e9 if config is not None else 0
    what = f"{gigabytes(free)} free for the cache {cache}"
    if free < BYTES_OF_AN_INDEX + budget:
        needs = f"it may take {gigabytes(BYTES_OF_AN_INDEX + budget)}"
        findings += fail(f"{what}, and {needs}", "free some, or name another folder in data.cache_dir or FARNEAR_CACHE")
    else:
        findings += ok(what)
    if config is not None:
        findings += _room_for_checkpoints(subject)
    return findings


def _room_for_checkpoints(subject: Subject) -> list[Finding]:
    config = subject.config
    assert config is not None
    folder = Path(config.output_dir)
    free = shutil.disk_usage(existing(folder)).free
    what = f"{gigabytes(free)} free for output_dir {folder}"
    how = "free some, set training.save_total_limit, or name another output_dir"
    training, parameters = config.training, subject.parameters
    if parameters is None:
        return ok(what) if free > 50 * BYTES_OF_AN_INDEX else note(f"{what}; the model's size is not known here", how)
    of_one = parameters * BYTES_OF_A_CHECKPOINT
    # One is written before the oldest goes, and the best stays beside them.
    kept = 2 + (training.save_total_limit or 0)
    if training.save_total_limit is None and training.save_steps and training.max_steps > 0:
        saves = 1 / training.save_steps if training.save_steps < 1 else training.max_steps / training.save_steps
        kept = max(kept, round(saves) + 1)
    needed = kept * of_one + parameters * BYTES_OF_AN_EXPORT
    at_most = "at most " if config.model.lora is not None or config.model.freeze else ""
    all_kept = (
        "" if training.save_total_limit else "; all checkpoints are kept, as training.save_total_limit is not set"
    )
    what += (
        f", and {kept} checkpoints of {at_most}{gigabytes(of_one)} and the export take {gigabytes(needed)}{all_kept}"
    )
    if free >= needed:
        return ok(what)
    return note(what, how) if at_most else fail(what, how)


def _cores_of_cgroup() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _bytes_of_cgroup() -> int | None:
    return _number_in("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _number_in(*paths: str) -> int | None:
    """The number in the first of some files that is there; None for none, or for ``max``."""
    for path in filter(os.path.exists, paths):
        text = Path(path).read_text().strip()
        return int(text) if text.isdigit() else None
    return None
