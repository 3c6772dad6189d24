"""What is common to the work on ranks that trains nothing, `farnear mine` and `farnear encode`: a folder of their own.

The folder is claimed as a run's is, a signal ends the work between two batches, and the same command goes on.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from farnear.config import RunConfig
from farnear.errors import RunInterruptedError
from farnear.files import replace_text
from farnear.parallel.world import World, on_main_rank, start_world, stop_world
from farnear.run_folder import DONE, RunFolder, claimed
from farnear.signals import Signals
from farnear.training.guard import Guard, StopAskedError
from farnear.training.terminal import Terminal
from farnear.training.watch import Watch


@dataclass(frozen=True)
class Work:
    """Where the work is done.

    Attributes:
        between: Called before every batch, equally often on every rank; ends the work after a signal.
    """

    world: World
    between: Callable[[], None]
    watch: Watch
    terminal: Terminal


@contextmanager
def work_in(config: RunConfig, folder: Path, signals: Signals | None) -> Iterator[Work]:
    """The ranks that the launcher started, at work in a folder that is theirs.

    Raises:
        UserError: Another run writes into the folder.
        RunInterruptedError: On every rank, after a signal.
    """
    world = start_world(config)
    claim = ExitStack()
    try:
        on_main_rank(world, lambda: claim.enter_context(claimed(RunFolder(folder))))
        guard, watch = Guard(world, signals), Watch()
        with Terminal(watch, is_main=world.is_main) as terminal:
            yield Work(world, guard.stop_if_asked, watch, terminal)
    except StopAskedError as asked:
        raise RunInterruptedError(
            f"stopped by {asked}; what is embedded is kept, and the same command goes on"
        ) from None
    finally:
        claim.close()
        stop_world()


def note_done(folder: Path, files: dict[str, int], **made_of: str) -> None:
    """Say that all is there, of what it was made and how large its files are."""
    replace_text(folder / DONE, json.dumps({**made_of, "files": files}, indent=1) + "\n")


def no_longer_done(folder: Path) -> None:
    """Take back what was said of the files that are there, before the first of them changes."""
    (folder / DONE).unlink(missing_ok=True)
