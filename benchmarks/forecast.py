"""Memory as `farnear plan` predicts it against that of runs, on a CPU, by strategy.

    python benchmarks/forecast.py [--strategies ddp zero2] [--models tiny 100m] [--ranks 2]

Each run is a `farnear launch` of two steps with a checkpoint after each, on drawn pages of 64 x 64 pixels. Measured is
`peak_memory_bytes` of its last step: the most resident memory that rank 0's process has had, which is fresh and shares
nothing with other ranks but the libraries' files. Predicted is the plan's total for the same run file. As most of a
small model's process is Python and its libraries, the error is told above those too, where there is enough: what is
predicted beyond the process, over what is measured beyond it.

The 100 M model has the tiny one's architecture, 768 wide, with 9 + 9 layers. Exit code 1 where an error of the total is
above 20 %. The last line is JSON.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from farnear.config import load_config
from farnear.ingest.synthetic import synthesise
from farnear.launching.forecast import Forecast, forecast
from farnear.launching.step_time import Machine
from farnear.model.tiny import save_tiny_model

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_layers": 2},
    "100m": {"hidden_size": 768, "num_layers": 9},
}
BOUND = 0.2
TEXTS = ["Which page shows the red bar chart of revenue in 2019?"]


@dataclass(frozen=True)
class Row:
    """One run: bytes of rank 0, of the plan, and of the process without a model by the plan; and what ranks said."""

    model: str
    strategy: str
    measured: int
    predicted: int
    process: int
    collectives: dict[str, dict[str, int]]
    planned: Forecast

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def error_above_process(self) -> float | None:
        """None where nearly all is the process."""
        above = self.measured - self.process
        return (self.predicted - self.process) / above - 1 if above > 0.1 * self.measured else None


def make_inputs(folder: Path, model: str) -> None:
    """Pages, and a model of that name."""
    if not (folder / "data").exists():
        synthesise(folder / "data", train_pairs=22, eval_pairs=8, seed=0, size=(64, 64))
    save_tiny_model(folder / model, texts=TEXTS, **SHAPES[model])


def write_run_file(folder: Path, model: str, strategy: str, **training: Any) -> Path:
    """A run of two steps."""
    tree = {
        "output_dir": str(folder / f"run-{model}-{strategy}"),
        "strategy": strategy,
        "model": {"name_or_path": str(folder / model)},
        "data": {"train": str(folder / "data" / "train-*.tar"), "dataloader_num_workers": 0},
        "training": {
            "global_batch_size": 8,
            "mini_batch_size": 2,
            "max_steps": 2,
            "save_steps": 1,
            "save_total_limit": 1,
            **training,
        },
    }
    path = folder / f"{model}-{strategy}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def planned(run_file: Path, ranks: int) -> Forecast:
    """Of a run on this CPU."""
    machine = Machine(gpu=None, ranks_of_node=ranks, nodes=1, node_bandwidth=1e9, cores_of_rank=1, is_this=True)
    return forecast(load_config(run_file), run_file, machine)


def measured(run_file: Path, ranks: int) -> dict[str, Any]:
    """The last record of a run, which is removed again."""
    command = [sys.executable, "-m", "farnear", "launch", str(run_file), "--num_processes", str(ranks)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    output_dir = Path(load_config(run_file).output_dir)
    record: dict[str, Any] = json.loads((output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    shutil.rmtree(output_dir)
    return record


def compared(folder: Path, model: str, strategy: str, ranks: int, **training: Any) -> Row:
    """Predict, run, measure."""
    run_file = write_run_file(folder, model, strategy, **training)
    plan = planned(run_file, ranks)
    record = measured(run_file, ranks)
    return Row(
        model=model,
        strategy=strategy,
        measured=record["peak_memory_bytes"],
        predicted=plan.chosen.memory.total_bytes,
        process=plan.chosen.memory.by_name()["process"],
        collectives=record["collectives"],
        planned=plan,
    )


def main() -> int:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description="Predicted and measured memory of a rank.")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--models", nargs="+", default=tuple(SHAPES), choices=tuple(SHAPES))
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    arguments = parser.parse_args()
    rows = []
    print(f"{'model':<8}{'strategy':<10}{'predicted':>11}{'measured':>11}{'error':>8}{'above the process':>19}")
    with tempfile.TemporaryDirectory(prefix="farnear-forecast-") as name:
        for model in arguments.models:
            make_inputs(Path(name), model)
            for strategy in arguments.strategies:
                row = compared(Path(name), model, strategy, arguments.ranks)
                rows.append(row)
                above = "" if row.error_above_process is None else f"{row.error_above_process:.1%}"
                print(
                    f"{model:<8}{strategy:<10}{row.predicted / 1e6:>8.0f} MB{row.measured / 1e6:>8.0f} MB"
                    f"{row.error:>8.1%}{above:>19}",
                    flush=True,
                )
    worst = max(abs(row.error) for row in rows)
    figures = {
        "worst_error": round(worst, 3),
        "worst_error_above_process": round(max((abs(row.error_above_process or 0.0) for row in rows), default=0.0), 3),
        "ranks": arguments.ranks,
        "errors": {f"{row.model} {row.strategy}": round(row.error, 3) for row in rows},
    }
    print(json.dumps(figures))
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
