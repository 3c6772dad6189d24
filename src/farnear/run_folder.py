"""The run folder: what lies in it, and the rule that keeps a run from being started over by accident.

A folder that holds checkpoints stands for hours of work. It is continued when the user says so and never mixed with a
new run. `farnear launch` asks before it starts processes, and the training asks again, as it may be started otherwise.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from farnear.errors import UserError

Resume = Literal["newest", "auto"]

_CHECKPOINT_NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved run file."""
        return self.path / "run.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object an evaluation."""
        return self.path / "eval.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Published checkpoints."""
        return self.path / "checkpoints"

    @property
    def index(self) -> Path:
        """What the scans of the shards found."""
        return self.path / "index"

    @property
    def export(self) -> Path:
        """The trained model, as others load it."""
        return self.path / "export"

    @property
    def summary(self) -> Path:
        """The run in a few figures; it exists when the run is done."""
        return self.path / "summary.json"


def check_start(output_dir: Path, resume: Resume | None) -> None:
    """Refuse to start over a run that has checkpoints, and to resume one that has none.

    Raises:
        UserError: Naming the ways out.
    """
    checkpoints = output_dir / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("step-*") if _CHECKPOINT_NAME.fullmatch(path.name))
    if names and resume is None:
        raise UserError(
            f"run folder {output_dir} holds checkpoints up to {names[-1]}, and a new run would mix with them; "
            "continue it with --resume, or set another output_dir"
        )
    if not names and resume == "newest":
        raise UserError(
            f"there is no checkpoint in {checkpoints} to resume from; "
            "drop --resume to start, or say --resume auto to continue only if there is one"
        )
