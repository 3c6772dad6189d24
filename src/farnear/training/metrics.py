"""What a run writes about itself while it goes: JSON lines in its folder.

`metrics.jsonl` holds one object a step and `eval.jsonl` one an evaluation; everything that draws or compares runs reads
those. A resumed run continues the files from its checkpoint's step: lines of steps that are trained again are cut off
first, so that a step never stands there twice. Only rank 0 writes.
"""

import json
import math
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from farnear.errors import UserError
from farnear.files import published
from farnear.gpus import gpu_of_device


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON object as a line; nan and inf become null, which JSON lacks."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")


def cut_after(path: Path, step: int) -> None:
    """Drop what will be written again: lines of steps beyond ``step``, the evaluation at the end, half a last line.

    Raises ``UserError`` for any other line that is no record.
    """
    if not path.exists():
        return
    kept = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            is_kept = record["step"] <= step and record.get("kind") != "after"
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):  # a kill came in the middle of it
                break
            raise UserError(
                f"{path} line {number} is no record of a step, so the run's figures would be wrong; remove the line or "
                "restore the file from a copy"
            ) from error
        if is_kept:
            kept.append(line)
    if len(kept) < len(lines):
        with published(path) as file:
            file.write(b"".join(line + b"\n" for line in kept))


def mean_loss(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Of the pairs in some steps. An epoch's last batch may hold one pair only, whose loss is 0."""
    known = [record for record in records if record["loss"] is not None and record["pairs"]]
    pairs = sum(record["pairs"] for record in known)
    return sum(record["loss"] * record["pairs"] for record in known) / pairs if pairs else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_flops_utilisation(flops: float, seconds: Mapping[str, float], device: torch.device) -> float | None:
    """Share of a GPU's dense bf16 peak that a step's two passes reach (MFU); None where the peak is not known."""
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else flops / max(seconds["pass_one"] + seconds["pass_two"], 1e-9) / gpu.bf16_flops
