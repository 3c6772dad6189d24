"""How the mistake that a rank meets becomes the one line that the user reads.

Several ranks often meet the same `UserError` at once, and torchrun then ends the others and prints a table of exit
codes instead of the reason. So a rank that stops on a `UserError` leaves it in a file that all ranks of the machine
share. Whoever creates the file was first. A rank that finds its own message there keeps silent, so that a mistake is
told once; one that met something else tells that too.

Under `farnear launch` the file is named by ``FARNEAR_OUTCOME_FILE``. The launcher watches for it, ends the processes
before torchrun can complain, and prints the message as its last line; the rank only waits for its end. Under a bare
``accelerate launch`` the file lies in the folder that torchrun makes for its ranks' errors, and the first rank prints.

The other way round, a rank that would save when a signal comes leaves its process id beside that file, for the launcher
to pass signals on to.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from farnear.errors import RunInterruptedError, UserError

OUTCOME_FILE = "FARNEAR_OUTCOME_FILE"
# The launcher looks ten times a second; a rank that is not ended by then has lost its launcher.
SECONDS_TO_BE_ENDED = 10.0


def tell(error: UserError, environment: Mapping[str, str] = os.environ) -> None:
    """Report the error that ends this process: on standard error, unless somebody else does."""
    path = _shared_path(environment)
    if path is None:
        print(error_line(error), file=sys.stderr, flush=True)
        return
    is_watched = OUTCOME_FILE in environment
    is_first = _claim(path, error)
    if (is_first and not is_watched) or str(read_outcome(path)) != str(error):
        print(error_line(error), file=sys.stderr, flush=True)
    if is_watched:
        time.sleep(SECONDS_TO_BE_ENDED)


def announce(environment: Mapping[str, str] = os.environ) -> None:
    """Let the launcher know that this process hears signals."""
    folder = Path(environment[OUTCOME_FILE]).parent if OUTCOME_FILE in environment else None
    if folder is not None and folder.is_dir():
        (folder / f"rank-{os.getpid()}").touch()


def announced(path: Path) -> list[int]:
    """Process ids of the ranks that hear signals, those that have ended among them.

    Args:
        path: Of the outcome file.
    """
    return [int(file.name.removeprefix("rank-")) for file in path.parent.glob("rank-*")]


def read_outcome(path: Path) -> UserError | None:
    """The first error that a rank has left in the file, if any."""
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    error = UserError(record["message"])
    error.exit_code = record["exit_code"]
    return error


def error_line(error: UserError) -> str:
    """What every command prints for a user's mistake; a run that was told to stop has met none."""
    return f"farnear: {'' if error.exit_code == RunInterruptedError.exit_code else 'error: '}{error}"


def _shared_path(environment: Mapping[str, str]) -> Path | None:
    if OUTCOME_FILE in environment:
        path = Path(environment[OUTCOME_FILE])
    elif environment.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun names a file for each rank, ATTEMPT/RANK/error.json; the attempt's folder is common to them.
        path = Path(environment["TORCHELASTIC_ERROR_FILE"]).parents[1] / "farnear-outcome.json"
    else:
        return None
    # The folder goes with whoever made it; then nobody is left to watch or to share with.
    return path if path.parent.is_dir() else None


def _claim(path: Path, error: UserError) -> bool:
    """Leave the error in the file; False when another rank has left one before."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8") as draft:
        json.dump({"exit_code": error.exit_code, "message": str(error)}, draft)
        draft.flush()
        try:
            # A link appears at once and whole, and fails if there is one: nobody reads half a record.
            os.link(draft.name, path)
        except FileExistsError:
            return False
    return True
