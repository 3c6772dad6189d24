"""What people look at, while a run goes on and afterwards: the gallery's files and `report.html`.

Neither is worth a run. What cannot be written is said, whatever the reason, and the training goes on.
"""

from collections.abc import Callable
from pathlib import Path

from farnear.report.page import write_report
from farnear.retrieve.evaluate import RetrievalTask
from farnear.retrieve.gallery import write_gallery
from farnear.retrieve.rankings import Rankings
from farnear.run_folder import RunFolder


def leave_gallery(
    folder: RunFolder, task: RetrievalTask, rankings: Rankings, kind: str, step: int, moved: Callable[[], None]
) -> None:
    """Write an evaluation's part of the gallery, on the rank that has its rankings; as `write_gallery` takes them."""
    try:
        write_gallery(folder.gallery, task, rankings, kind, step, moved)
    except Exception as error:
        print(f"what the report shows of the queries could not be written: {_why(error)}", flush=True)


def leave_report(folder: RunFolder) -> Path | None:
    """Write `report.html` by what the run folder holds now; its path, or None where it could not be written."""
    try:
        return write_report(folder.path)
    except Exception as error:
        again = f"`farnear report {folder.path}` writes it when that is mended"
        print(f"{folder.report} could not be written: {_why(error)}; {again}", flush=True)
        return None


def _why(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
