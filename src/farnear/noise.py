"""What libraries say is kept from the terminal, unless something is wrong or the user has asked for it.

transformers, torch, DeepSpeed and others each bring loggers that print on every rank, Python prints warnings, and a
training's own lines are lost among them. Here all of it comes to one place:

- errors are shown, on every rank;
- weights that a checkpoint lacks, of which transformers warns in a table, are told in a line, by rank 0;
- other warnings go into the rank's log where there is one (`farnear.rank_logs`), and nowhere else.

A library's own variable wins: where ``TRANSFORMERS_VERBOSITY``, ``HF_HUB_VERBOSITY``, ``DATASETS_VERBOSITY``,
``ACCELERATE_LOG_LEVEL``, ``TORCH_LOGS`` or ``PYTHONWARNINGS`` is set, its messages appear as if farnear were not there;
``TORCH_CPP_LOG_LEVEL`` is torch's for what it writes from C++, and ``HF_HUB_DISABLE_PROGRESS_BARS=0`` shows all bars.

Only commands do this. A program that calls `farnear.train` has its own idea of logging.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from farnear.rank_logs import LOG_DIR, rank_log
from farnear.wording import some_of

VARIABLES = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "datasets": "DATASETS_VERBOSITY",
    "accelerate": "ACCELERATE_LOG_LEVEL",
    "torch": "TORCH_LOGS",
    "py": "PYTHONWARNINGS",  # Python's warnings are logged as py.warnings
}
"""Of each library the variable by which its user says what to hear of it."""

OWN_WARNINGS = "ignore:resource_tracker:UserWarning"
"""What a launch puts into PYTHONWARNINGS, whose user has said nothing by that."""

_LACKING = re.compile(r"^(\S+) +\| (MISSING|MISMATCH)", re.MULTILINE)


QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""For launchers and ranks, where the user has not set it: what C++ writes nobody can filter afterwards."""


def quiet(environment: Mapping[str, str] = os.environ) -> None:
    """Keep libraries quiet in this process from now on. They may have been imported, or may be later (`sweep`)."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    rank = int(environment.get("RANK", 0))
    log = environment.get(LOG_DIR)
    if _is_quiet():
        return
    terminal = _Terminal()
    terminal.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    terminal.addFilter(_Shown(environment, is_main=rank == 0))
    logging.getLogger().addHandler(terminal)
    if log:
        kept = logging.FileHandler(rank_log(Path(log), rank), delay=True, encoding="utf-8")
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        kept.addFilter(_not_shown)
        logging.getLogger().addHandler(kept)
    if not _is_asked_for("py", environment):
        logging.captureWarnings(True)
    if rank and not log:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    import torch  # noqa: F401
    from transformers.utils import logging as of_transformers

    # Bars of loading and writing weights; those of downloads stay.
    hidden = environment.get("HF_HUB_DISABLE_PROGRESS_BARS")
    if hidden is None or hidden.upper() in ("1", "ON", "YES", "TRUE"):
        of_transformers.disable_progress_bar()
    if hidden is None:
        from huggingface_hub.utils.tqdm import enable_progress_bars

        enable_progress_bars()
    sweep(environment)


def sweep(environment: Mapping[str, str] = os.environ) -> None:
    """Take libraries' own handlers away, so that their messages come to the root's; nothing where `quiet` was not."""
    if not _is_quiet():
        return
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger) or _is_asked_for(logger.name, environment):
            continue
        printing = [handler for handler in logger.handlers if getattr(handler, "stream", None) in streams]
        for handler in printing:
            logger.removeHandler(handler)
        if printing:
            logger.propagate = True


def quiet_worker(environment: Mapping[str, str] = os.environ) -> None:
    """The same in a process that only reads and prepares: what is wrong with an input it reports otherwise."""
    logging.getLogger().addHandler(logging.NullHandler())
    for library in ("transformers", "huggingface_hub"):
        if not _is_asked_for(library, environment):
            logging.getLogger(library).setLevel(logging.ERROR)
    if not _is_asked_for("py", environment):
        warnings.simplefilter("ignore")


class _Shown(logging.Filter):
    """What the terminal shows."""

    def __init__(self, environment: Mapping[str, str], *, is_main: bool) -> None:
        super().__init__()
        self._environment, self._is_main = environment, is_main

    def filter(self, record: logging.LogRecord) -> bool:
        """Errors, what is asked for, and weights that are lacking, in a line."""
        shown = record.levelno >= logging.ERROR or _is_asked_for(record.name, self._environment)
        if not shown and self._is_main and "LOAD REPORT" in str(record.msg):
            names = [name for name, _ in _LACKING.findall(record.getMessage())]
            if names:
                told = f"{len(names)} weights are not in the model's files and start at random: {some_of(names, 3)}"
                record.msg, record.args, shown = told, (), True
        record.is_shown = shown
        return shown


class _Terminal(logging.Handler):
    """Standard error as it is now, which may have a live line below it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _is_quiet() -> bool:
    return any(isinstance(handler, _Terminal) for handler in logging.getLogger().handlers)


def _not_shown(record: logging.LogRecord) -> bool:
    """What the log takes: the terminal's is there already."""
    return not getattr(record, "is_shown", False)


def _is_asked_for(name: str, environment: Mapping[str, str]) -> bool:
    """Whether the user has said what to hear of a logger's library."""
    value = environment.get(VARIABLES.get(name.partition(".")[0], ""), "")
    return bool(value.replace(OWN_WARNINGS, "").strip(","))
