"""`status.json` in a run folder: how the run stands or has ended, for a person and for what starts it again.

    {"state": "running", "step": null, "host": "n1", "pid": 7, "time": "2026-11-22T01:00:00Z"}
    {"state": "running", "step": 0, "total_steps": 600, "epochs": 3, "ranks": 8, ...}       farnear.course.Course
    {"state": "finished", ...}                                     exit code 0
    {"state": "stopped", "exit_code": 75, "checkpoint": "step-00000012", "reason": "SIGTERM at rank 1", ...}
    {"state": "failed", "exit_code": 1, "checkpoint": "step-00000008", "reason": "step 9: the loss is ...", ...}

`state` is all that a script needs: after "stopped" the same command with --resume goes on. A run that is "running" and
whose run.lock nobody holds was killed. The first reason stands: what other ranks meet after it follows from it.
"""

import json
import os
import platform
from typing import Any, Literal

from farnear.course import FACTS
from farnear.errors import RunInterruptedError, UserError
from farnear.files import locked, replace_text
from farnear.run_folder import RunFolder, published_checkpoints
from farnear.wording import utc_now

State = Literal["running", "finished", "stopped", "failed"]


def write_status(folder: RunFolder, state: State, **facts: Any) -> None:
    """Replace the status; whatever it was."""
    published = published_checkpoints(folder.checkpoints)
    status = {
        "state": state,
        **facts,
        "checkpoint": published[-1].name if published else None,
        "host": platform.node(),
        "pid": os.getpid(),
        "time": utc_now(),
    }
    replace_text(folder.status, json.dumps(status, indent=1) + "\n")


def write_failure(folder: RunFolder, error: BaseException, rank: int | None = None) -> None:
    """Note why a run has ended, if nobody has yet. Any rank may; a run folder that cannot be written keeps silent.

    Args:
        rank: That met it; None where all did.
    """
    is_stop = isinstance(error, RunInterruptedError)
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    facts = {
        "exit_code": error.exit_code if isinstance(error, UserError) else 1,
        "reason": reason if rank is None else f"rank {rank}: {reason}",
    }
    try:
        with locked(folder.path):
            status = read_status(folder) or {}
            if status.get("state") == "running":
                course = {name: status[name] for name in FACTS if name in status}
                write_status(folder, "stopped" if is_stop else "failed", **course, **facts)
    except OSError:
        return


def read_status(folder: RunFolder) -> dict[str, Any] | None:
    """The status, if there is a readable one."""
    try:
        status = json.loads(folder.status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None
