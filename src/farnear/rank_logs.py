"""A log for each rank: what a rank prints goes into a file of its own, and only rank 0 speaks on the terminal too.

    LOG_DIR/rank-00003.log

Hundreds of ranks in one stream can be read by nobody, and torchrun's own files are named by their place on a node. What
libraries and the kernels below them write goes along, since it is the process's descriptors that are turned. A job that
starts again adds to the files. A rank's last words, when it fails, are heard on the terminal all the same.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from farnear.processes import deaf_children

LOG_DIR = "FARNEAR_LOG_DIR"


def log_to_own_file(environment: Mapping[str, str] = os.environ) -> TextIO | None:
    """Turn standard output and error of this rank, where the launch asks for it.

    Returns:
        What is heard on the terminal still; None where it is not another one.
    """
    if not environment.get(LOG_DIR):
        return None
    rank = int(environment.get("RANK", 0))
    folder = Path(environment[LOG_DIR])
    folder.mkdir(parents=True, exist_ok=True)
    path = rank_log(folder, rank)
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == 0:
        # It reads until the last writer is gone.
        with deaf_children():
            tee = subprocess.Popen(["tee", "--append", path], stdin=subprocess.PIPE)
        assert tee.stdin is not None
        _turn(tee.stdin.fileno())
        tee.stdin.close()
        return None
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, encoding="utf-8")
    with open(path, "ab") as file:
        _turn(file.fileno())
    return terminal


def rank_log(folder: Path, rank: int) -> Path:
    """A rank's file."""
    return folder / f"rank-{rank:05d}.log"


def _turn(target: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(target, stream.fileno())
