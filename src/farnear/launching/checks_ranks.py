"""The doctor's checks that need ranks: one launch, started as a training is, and what its rank 0 left.

What is measured is in `farnear.training.doctor_ranks`, on the other side of the launch; here it is judged.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from farnear.errors import UserError
from farnear.launching.checks_run import is_indexed
from farnear.launching.findings import Finding, Subject, fail, failed_by, note, ok
from farnear.launching.local import accelerate_command, python_command, variables_of_ranks
from farnear.launching.supervision import supervise
from farnear.wording import counted

OF_RANKS = ("launch", "bandwidth", "gradient", "decode")
PROGRAM = "doctor.py"
# Starting, and importing on a slow disk, beside what is measured.
SECONDS_TO_START = 180
# Between GPUs of one machine even PCIe carries more; TCP over the loopback does not.
SLOW_BETWEEN_GPUS = 3e9
# Share of a step that is spent on decoding, where no worker does it.
WASTE, MOST_OF_IT = 0.1, 0.5


def ask_ranks(subject: Subject, wanted: Sequence[str], failed: Sequence[str]) -> dict[str, list[Finding]]:
    """Start the ranks once, for all of `OF_RANKS` that is wanted.

    Args:
        failed: Checks that have failed before, so that what needs the same is not tried.

    Raises:
        SystemExit: A signal has ended them, and should end the doctor.
    """
    wanted = [check for check in OF_RANKS if check in wanted]
    findings: dict[str, list[Finding]] = {}
    if subject.config is None and subject.ranks == 1:
        return {check: ok("one rank: nothing to measure") for check in wanted}
    of_data = [check for check in ("gradient", "decode") if check in wanted]
    if subject.config is not None and of_data and (hindrance := _hindrance(subject, failed)):
        findings = dict.fromkeys(of_data, hindrance)
        wanted = [check for check in wanted if check not in findings]
    if not wanted:
        return findings
    figures, begun, error = _launched(subject, wanted)
    for check in wanted:
        if check in figures:
            findings[check] = JUDGES[check](subject, figures)
        elif error is not None and check == begun:
            what, _, do = error.partition("; ")
            findings[check] = fail(what, do or "see what the ranks printed")
        elif check == "bandwidth" and subject.ranks == 1:
            findings[check] = ok("one rank: nothing to measure")
        else:
            findings[check] = note("not measured", f"the ranks ended in {begun}: mend that first")
    if error is not None and begun not in wanted:  # in what was not asked for, but is on the way
        findings[begun] = failed_by(error)
    return findings


def _hindrance(subject: Subject, failed: Sequence[str]) -> list[Finding]:
    """Why ranks could not open the model and the pairs, told once where it was found; empty where nothing is known."""
    if "model" in failed:
        return note("not measured: the model cannot be loaded here", "mend that first")
    for check in ("shards", "index"):
        if check in failed:
            return note(f"not measured: see {check}", "")
    if not _has_pairs(subject):
        return note("not measured: the shards cannot be read or are not indexed yet", "see shards, index")
    return []


def _has_pairs(subject: Subject) -> bool:
    assert subject.config is not None
    try:
        return is_indexed(subject.config)
    except (UserError, OSError):
        return False


def _launched(subject: Subject, wanted: Sequence[str]) -> tuple[dict[str, Any], str, str | None]:
    """(figures by check, the check that was begun last, the error that ended it)."""
    config = subject.config
    strategy = config.strategy if config is not None else "ddp"
    with tempfile.TemporaryDirectory(prefix="farnear-doctor-", ignore_cleanup_errors=True) as folder:
        words = [folder, ",".join(wanted), str(subject.seconds), *subject.run_words]
        # torchrun leaves a folder of logs where temporary files go.
        environment = {"TMPDIR": folder}
        if strategy == "single":
            _, command = python_command(words, PROGRAM)
        else:
            # As `farnear launch` does it, which leaves an open number to accelerate.
            asked = config.num_processes if config is not None else subject.ranks
            _, command = accelerate_command(strategy, words, subject.config_file, asked, program=PROGRAM)
            environment |= variables_of_ranks(asked or subject.ranks, has_gpus=bool(subject.gpus))
        error: str | None = None
        try:
            code = supervise(command, environment, seconds=SECONDS_TO_START + 12 * subject.seconds)
            if code > 128:
                raise SystemExit(code)
            if code:
                error = f"a rank ended with code {code}; what it printed says why"
        except UserError as mistake:
            error = str(mistake)
        records = list(_records(Path(folder) / "found.jsonl"))
    begun = next((record["begins"] for record in reversed(records) if "begins" in record), "launch")
    return {record["check"]: record for record in records if "check" in record}, begun, error


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _launch(subject: Subject, figures: dict[str, Any]) -> list[Finding]:
    found = figures["launch"]
    strategy = subject.config.strategy if subject.config is not None else "ddp"
    how = f"met over {found['backend']} in {found['seconds']:.1f} s" if found["ranks"] > 1 else "started"
    return ok(f"{counted(found['ranks'], 'rank')} under {strategy}: configs agree, {how}")


def _bandwidth(subject: Subject, figures: dict[str, Any]) -> list[Finding]:
    found = figures["bandwidth"]
    slowest = min(found["all_reduce"], found["all_gather"])
    what = (
        f"all-reduce {found['all_reduce'] / 1e9:.2f} GB/s, all-gather {found['all_gather'] / 1e9:.2f} GB/s "
        f"(bus bandwidth, {figures['launch']['ranks']} ranks, {found['tensor_bytes'] / 1e6:.0f} MB)"
    )
    if not found["is_right"]:
        return fail(
            f"{what}, and the numbers that came out are wrong",
            "test the GPUs and links; train on nothing that they touch",
        )
    if figures["launch"]["backend"] == "nccl" and slowest < SLOW_BETWEEN_GPUS:
        return note(
            f"{what}, little between GPUs of one machine",
            "NCCL_DEBUG=INFO says what NCCL took: look for SHM, P2P and NET/Socket",
        )
    if subject.parameters:
        seconds = 2 * 4 * subject.parameters * (1 - 1 / figures["launch"]["ranks"]) / found["all_reduce"]
        what += f"; one reduction of all gradients a step takes {seconds:.2g} s"
    return ok(what)


def _gradient(subject: Subject, figures: dict[str, Any]) -> list[Finding]:
    found = figures["gradient"]
    bound = f"bound {found['bound']:.1e}, {found['bound_from']}"
    if found["error"] is None:
        return note(
            "not compared: the plain gradient does not fit on one GPU", "compare with a smaller model.max_pixels"
        )
    assert subject.config is not None
    what = (
        f"cached against plain: {found['error']:.1e} ({bound}; {found['pairs']} pairs, {found['mini_batches']} "
        f"mini-batches a rank, {subject.config.strategy})"
    )
    if found["error"] <= found["bound"]:
        return ok(what)
    return fail(
        f"{what}: it would not train what the plain step trains",
        "look for what sees more than its own input or changes from call to call: BatchNorm, random numbers that "
        "torch.manual_seed does not set, a loss that remembers; model.freeze keeps a part out",
    )


def _decode(subject: Subject, figures: dict[str, Any]) -> list[Finding]:
    found = figures["decode"]
    rate, workers = found["pairs_per_s"], subject.workers
    pages = rate * found["documents_per_pair"]
    what = f"a core reads, decodes and prepares {pages:,.1f} pages/s ({rate:,.1f} pairs/s)"
    if "gradient" not in figures:
        return note(what, "with the check gradient it is held against the step's pace")
    needed = figures["gradient"]["pairs_in_step"] / figures["gradient"]["seconds"]
    step = f"the step takes {needed:,.1f} pairs/s a rank"
    enough = max(1, -(-int(needed * 1.2) // max(1, int(rate))))
    how = f"set data.dataloader_num_workers={enough}, or write smaller pages (--max-side), as JPEG"
    if workers == 0:
        waiting = needed / (needed + rate)
        what += f", {step}, and no worker does it beside the step: {waiting:.0%} of the time goes to decoding"
        return ok(what) if waiting < WASTE else (fail if waiting > MOST_OF_IT else note)(what, how)
    busy = min(workers, max(1.0, subject.cores / subject.ranks))
    cores = "1 core" if busy == 1 else f"{busy:g} cores"
    what += f", and with {cores} a rank {rate * busy:,.1f} pairs/s; {step}"
    if rate * busy >= needed:
        return ok(what)
    if workers > busy:
        how = f"{workers} workers share {busy:g} cores a rank: ask for more cores, or write smaller pages (--max-side)"
    return fail(f"{what}: the step would wait for pages", how)


JUDGES = {"launch": _launch, "bandwidth": _bandwidth, "gradient": _gradient, "decode": _decode}
