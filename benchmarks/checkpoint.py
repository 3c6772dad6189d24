"""What a checkpoint costs a training: the stall, the bytes, and the way back.

    python benchmarks/checkpoint.py [--parameters 200] [--rounds 5]

One process trains a stack of linear layers (200 M parameters by default) with AdamW. In each round it saves once
waiting for the disk and once in the background, turn about, with steps in between; the medians are compared.

    stall_ratio          seconds that the training stands still for a save in the background, over those of a save that
                         it waits for
    bytes_over_minimum   on the disk, over 12 bytes a trained parameter: its weight and two moments, in fp32
    light_over_minimum   the same where a head of 1 % is all that trains: the frozen rest is not saved
    step_slowdown        a step beside a save in the background, over one without; they share the cores
    load_seconds         hashing and reading a checkpoint back

A copy of the state stays in host memory, which is what the background costs: `host_copy_over_minimum`.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from farnear.parallel.replicated import Replicated
from farnear.parallel.world import World
from farnear.training.checkpoint import Progress, folder_name, whole_checkpoint
from farnear.training.restoring import load_state
from farnear.training.retention import Retention
from farnear.training.saving import Saver
from farnear.training.scale import TrainedState
from farnear.training.watch import Watch

BYTES_OF_PARAMETER = 12
WIDTH = 2048
ABOUT: dict[str, Any] = {"strategy": "single", "config_hash": "", "versions": {}}
ALONE = World(0, 1, torch.device("cpu"))


class Run:
    """A model, its strategy, and a saver of each kind."""

    def __init__(self, folder: Path, layers: int, trained_layers: int) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        for layer in list(self.module)[: layers - trained_layers]:
            layer.requires_grad_(False)
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(named.values(), lr=1e-4)
        self.strategy = Replicated(self.module, optimizer, 1.0, ALONE)
        self.state = TrainedState(self.strategy, {name: p.shape for name, p in named.items()}, None, is_main=True)
        self.parameters = sum(p.numel() for p in named.values())
        self.checkpoints = folder / "checkpoints"
        self._steps = 0
        self.savers = {
            name: Saver(self.checkpoints, ALONE, Retention(), ABOUT, Watch(), in_background=name == "background")
            for name in ("waiting", "background")
        }

    def step(self) -> float:
        """Seconds of one."""
        started = perf_counter()
        with self.strategy.accumulate():
            self.strategy.backward(self.strategy.forward(torch.randn(64, WIDTH)).square().mean())  # type: ignore[arg-type]
        self.strategy.step(1e-4)
        return perf_counter() - started

    def save(self, kind: str) -> tuple[float, Path]:
        """Seconds until the training may go on, and where the checkpoint will be."""
        self._steps += 1
        started = perf_counter()
        self.savers[kind].save(self.state, Progress(self._steps, 0, 2, "f"), periodic=True)
        return perf_counter() - started, self.checkpoints / folder_name(self._steps)


def bytes_of(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(folder: Path, parameters: int, rounds: int) -> dict[str, Any]:
    """The figures of one model."""
    run = Run(folder, layers=round(parameters / WIDTH**2), trained_layers=round(parameters / WIDTH**2))
    for _ in range(2):
        run.step()
    stalls: dict[str, list[float]] = {"waiting": [], "background": []}
    alone, beside, to_publish, loads = [], [], [], []
    for number in range(rounds + 1):
        for kind in ("waiting", "background") if number % 2 else ("background", "waiting"):
            alone.append(run.step())
            started = perf_counter()
            seconds, path = run.save(kind)
            while kind == "background" and not path.exists():
                beside.append(run.step())
            run.savers[kind].finish()
            to_publish.append(perf_counter() - started)
            if number == 0:  # the buffers of the background are made in the first save
                beside.clear()
            else:
                stalls[kind].append(seconds)
            size = bytes_of(path)
            if kind == "waiting":
                started = perf_counter()
                load_state(whole_checkpoint(path, ALONE, verify=True), run.state, ALONE)
                loads.append(perf_counter() - started)
            shutil.rmtree(path)
    minimum = BYTES_OF_PARAMETER * run.parameters
    print(f"{run.parameters / 1e6:.0f} M trained parameters, {rounds} rounds, medians")
    print(f"  save, the training waits       {median(stalls['waiting']):7.2f} s")
    print(f"  save in the background: stall  {median(stalls['background']):7.2f} s")
    print(f"  step without and beside a save {median(alone):7.2f} s {median(beside):7.2f} s")
    print(f"  hash and load                  {median(loads):7.2f} s")
    print(f"  on the disk                    {size / 1e9:7.2f} GB", flush=True)
    return {
        "parameters": run.parameters,
        "stall_seconds": round(median(stalls["background"]), 3),
        "save_seconds": round(median(stalls["waiting"]), 3),
        "stall_ratio": round(median(stalls["background"]) / median(stalls["waiting"]), 3),
        "step_slowdown": round(median(beside) / median(alone), 2),
        "load_seconds": round(median(loads), 3),
        "bytes_over_minimum": round(size / minimum, 5),
        "host_copy_over_minimum": 1.0,
    }


def light_over_minimum(folder: Path) -> float:
    """Bytes of a checkpoint where only the last of a hundred layers trains."""
    run = Run(folder, layers=100, trained_layers=1)
    run.step()
    _, path = run.save("waiting")
    return bytes_of(path) / (BYTES_OF_PARAMETER * run.parameters)


def main() -> None:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs a training.")
    parser.add_argument("--parameters", type=int, default=200, help="millions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="farnear-checkpoint-") as folder:
        figures = measure(Path(folder, "all"), arguments.parameters * 1_000_000, arguments.rounds)
        figures["light_over_minimum"] = round(light_over_minimum(Path(folder, "light")), 5)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
