"""What every test needs: a machine without GPUs and without a network, whatever it runs on, and a small run file."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

# Read by libraries when they are imported, and inherited by the processes that tests start.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Indexes of the tests' shards are kept apart from the user's, and go when the tests end.
CACHE = tempfile.TemporaryDirectory(prefix="farnear-test-cache-")
os.environ["FARNEAR_CACHE"] = CACHE.name
os.environ["HF_MODULES_CACHE"] = f"{CACHE.name}/modules"

# Ranks and data workers are forked from one process that has imported these once.
multiprocessing.set_forkserver_preload(["torch", "sentence_transformers", "deepspeed", "farnear.training.run"])

# Tests run several at a time, and threads of a loaded machine wait for each other at every operation on small tensors.
torch.set_num_threads(1)

WriteRunFile = Callable[..., Path]


@pytest.fixture
def write_run_file(tmp_path: Path) -> WriteRunFile:
    """Writes a valid run file with some top-level keys replaced, and returns its path."""

    def write(**keys: Any) -> Path:
        tree = {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": "some/model"},
            "data": {"train": ["train-*.tar"]},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**tree, **keys}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of the test may be asked, by this process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The jobs on SLURM first: they wait for minutes, in which whoever runs several tests at a time does the others."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_slurm.py"))
