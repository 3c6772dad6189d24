"""Runs the doctor's checks, prints what they find, and says what failed.

A check is a function of a `Subject` that returns findings and knows nothing of the others. Each has a thread and a time
limit of its own: one that crashes or hangs, on a disk that does not answer for instance, is a finding and never the end
of the rest. The checks that need ranks share one launch, after all others.
"""

import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from farnear.config import load_config
from farnear.errors import UserError
from farnear.launching import checks_limits, checks_machine, checks_run
from farnear.launching.checks_ranks import OF_RANKS, ask_ranks
from farnear.launching.findings import Finding, Subject, fail, failed_by
from farnear.wording import counted, printable

Check = Callable[[Subject], list[Finding]]

OF_MACHINE: dict[str, Check] = {
    "versions": checks_machine.versions,
    "gpus": checks_machine.gpus,
    "interconnect": checks_machine.interconnect,
    "ranks": checks_limits.ranks,
    "files": checks_limits.files,
    "shm": checks_limits.shm,
    "memory": checks_limits.memory,
    "disk": checks_limits.disk,
    "compiler": checks_machine.compiler,
}
OF_RUN: dict[str, Check] = {
    "model": checks_run.model,
    "attention": checks_run.attention,
    "output_dir": checks_run.output_dir,
    "shards": checks_run.shards,
    "index": checks_run.index,
}


def examine(
    run_file: Path | None,
    overrides: Sequence[str],
    chosen: Sequence[str],
    *,
    config_file: Path | None,
    num_processes: int | None,
    seconds: float,
) -> int:
    """Run the chosen checks and print a line a finding.

    Args:
        run_file: None looks at the machine alone.
        chosen: Names of checks; those of a run are left out where there is none.
        seconds: That each may take; see `farnear.training.doctor_ranks` for those of ranks.

    Returns:
        0, when nothing fails.

    Raises:
        UserError: The run file is wrong, or a check fails: naming which.
    """
    if num_processes is not None and run_file is not None:
        overrides = [*overrides, f"num_processes={num_processes}"]
    config = load_config(run_file, overrides) if run_file is not None else None
    words = [str(run_file), *overrides] if run_file is not None else []
    subject = Subject(config, words, config_file, num_processes, seconds)
    counts = {"ok": 0, "note": 0, "FAIL": 0}
    failed: list[str] = []
    checks = 0
    for name, findings in _findings(subject, chosen):
        checks += 1
        for finding in findings:
            print(printable(finding.line(name)), flush=True)
            counts[finding.level] += 1
        if any(finding.level == "FAIL" for finding in findings):
            failed.append(name)
    print(
        f"{counted(checks, 'check')}, {counted(sum(counts.values()), 'finding')}: {counts['ok']} ok, "
        f"{counts['note']} to note, {counts['FAIL']} failed",
        flush=True,
    )
    if failed:
        raise UserError(
            f"{len(failed)} of {counted(checks, 'check')} failed: {', '.join(failed)}; the lines above with FAIL say "
            "what to do, docs/doctor.md says more"
        )
    return 0


def _findings(subject: Subject, chosen: Sequence[str]) -> Iterator[tuple[str, list[Finding]]]:
    """(check, what it found), in the order of the checks."""
    alone = {**OF_MACHINE, **(OF_RUN if subject.config is not None else {})}
    failed: list[str] = []
    for name, check in alone.items():
        if name in chosen:
            findings = _guarded(name, check, subject)
            if any(finding.level == "FAIL" for finding in findings):
                failed.append(name)
            yield name, findings
    of_ranks = [name for name in OF_RANKS if name in chosen]
    if subject.config is None:
        of_ranks = [name for name in of_ranks if name in ("launch", "bandwidth")]
    if of_ranks:
        try:
            yield from ask_ranks(subject, of_ranks, failed).items()
        except Exception as error:
            yield of_ranks[0], _crashed(error)


def _guarded(name: str, check: Check, subject: Subject) -> list[Finding]:
    """The check's findings, or that it crashed or did not end."""
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(check(subject))
        except UserError as error:
            found.extend(failed_by(error))
        except Exception as error:
            found.extend(_crashed(error))

    thread = threading.Thread(target=work, name=f"doctor: {name}", daemon=True)
    thread.start()
    thread.join(subject.seconds)
    if thread.is_alive():
        return fail(
            f"it did not end within {subject.seconds:g} s",
            "a disk or server that does not answer is the usual cause; --timeout gives it longer",
        )
    return found


def _crashed(error: Exception) -> list[Finding]:
    """Everything that is no `UserError` is told with its place: the machine may be odder than the check thought."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split())[:200]
    return fail(
        f"the check itself failed: {type(error).__name__}: {reason} ({Path(place.filename).name}:{place.lineno})",
        "report it; --skip leaves it out",
    )
