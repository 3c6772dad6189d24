"""A tiny model, a few drawn pairs and a run file over them, shared by the tests that train."""

import json
import shutil
from pathlib import Path
from typing import Any

from farnear.config import RunConfig, parse_config
from farnear.ingest.synthetic import synthesise
from farnear.model.tiny import save_tiny_model


def make_inputs(folder: Path) -> Path:
    """22 training pairs, 8 evaluation pairs and a base model."""
    synthesise(folder / "data", train_pairs=22, eval_pairs=8, seed=0, size=(64, 64))
    texts = ["Which page shows the red bar chart of revenue in 2019?"]
    save_tiny_model(folder / "base", texts=texts, hidden_size=64, num_layers=2)
    return folder


def run_tree(folder: Path, output_dir: str, **keys: Any) -> dict[str, Any]:
    """A run of 6 optimizer steps over two epochs of 3 (22 pairs in batches of 8); sections are merged key by key."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / output_dir),
        "strategy": "single",
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "data" / "train-*.tar"), "tail": "pad", "dataloader_num_workers": 0},
        "loss": {"matryoshka_dims": [64, 16]},
        "training": {
            "global_batch_size": 8,
            "mini_batch_size": 3,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "num_train_epochs": 2,
            "save_steps": 1,
        },
    }
    for key, value in keys.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return tree


def run_config(folder: Path, output_dir: str, **keys: Any) -> RunConfig:
    """`run_tree`, validated."""
    return parse_config(run_tree(folder, output_dir, **keys))


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step, to the last bit."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def cut_back(run: Path, step: int, name: str) -> Path:
    """A copy of a run folder in which the checkpoints after ``step`` were never written."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy
