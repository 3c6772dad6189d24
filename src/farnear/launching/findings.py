"""What a check of the doctor says, and what it is told about the run."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from farnear.config import RunConfig
from farnear.launching.hardware import Hardware, read_hardware

Level = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        level: ok; note: worth knowing; FAIL: a run would stop, or waste most of its time.
        what: The figure.
        do: What to do about it; empty for ok.
    """

    level: Level
    what: str
    do: str = ""

    def line(self, check: str) -> str:
        """As it is printed."""
        return f"{self.level:<5} {check:<13} {self.what}" + (f"; {self.do}" if self.do else "")


def ok(what: str) -> list[Finding]:
    """All is well."""
    return [Finding("ok", what)]


def note(what: str, do: str) -> list[Finding]:
    """Worth knowing."""
    return [Finding("note", what, do)]


def fail(what: str, do: str) -> list[Finding]:
    """A run would stop, or waste most of its time."""
    return [Finding("FAIL", what, do)]


def failed_by(error: str | Exception) -> list[Finding]:
    """A user's mistake says itself what to do, behind its first semicolon."""
    what, _, do = str(error).partition("; ")
    return fail(what, do)


@dataclass(frozen=True)
class Subject:
    """What is looked at: this machine, and a run on it where there is a run file.

    Attributes:
        run_words: The run file and overrides, as a command line names them.
        num_processes: Asked for on the command line.
        seconds: That a check may take.
    """

    config: RunConfig | None
    run_words: Sequence[str]
    config_file: Path | None
    num_processes: int | None
    seconds: float

    @cached_property
    def hardware(self) -> Hardware:
        """What a launch here would find."""
        return read_hardware()

    @property
    def gpus(self) -> int:
        """GPUs that a rank could use."""
        return len(self.hardware.gpus)

    @property
    def cores(self) -> int:
        """Cores that this process may use."""
        return self.hardware.cores

    @cached_property
    def ranks(self) -> int:
        """Processes that a launch would start on this machine."""
        if self.config is not None and self.config.strategy == "single":
            return 1
        asked = self.config.num_processes if self.config is not None else None
        # On a large machine without GPUs nobody trains with a rank a core; what is looked for shows with fewer.
        return self.num_processes or asked or self.gpus or (self.cores if self.config else min(self.cores, 8))

    @property
    def workers(self) -> int:
        """Data workers a rank."""
        return self.config.data.dataloader_num_workers if self.config is not None else 2

    @cached_property
    def parameters(self) -> int | None:
        """Of the model, from the headers of its files; None where it is not in a folder here."""
        if self.config is None:
            return None
        found = [elements_in(Path(one.name_or_path).expanduser()) for one in self.config.model.by_key.values()]
        return sum(found) if all(found) else None


def gigabytes(number: float) -> str:
    """Bytes in 10^9, or 10^6 where there are few."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def elements_in(model: Path) -> int:
    """Numbers in the safetensors of a model's folder; 0 where there are none."""
    # The modules of a Router, and linear layers, have folders of their own.
    return sum(map(_elements, [*model.glob("*.safetensors"), *model.glob("*_*/*.safetensors")]))


def _elements(path: Path) -> int:
    """Numbers in a safetensors file, by its header."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            elements = 1
            for size in tensor["shape"]:
                elements *= size
            total += elements
    return total
