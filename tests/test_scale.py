"""A trained scale: it moves as AdamW says, stays in its bounds, is saved, and goes on after a resume."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_inputs, run_config

import farnear
from farnear.errors import UserError
from farnear.sections import LossConfig, TrainingConfig
from farnear.training.checkpoint import SavedParameter, open_checkpoint
from farnear.training.scale import NAME, LearnedScale


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("scale"))


def test_its_logarithm_moves_as_adamw_says() -> None:
    training = TrainingConfig(learning_rate=1e-2, weight_decay=0.5, max_grad_norm=0.1)
    scale = LearnedScale(LossConfig(learn_scale=True, scale=20.0), training)
    plain = torch.nn.Parameter(torch.tensor([math.log(20.0)]))
    optimizer = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.0)
    for step, gradient in enumerate((3.0, -1.0, 0.5)):
        share = 1.0 / (step + 1)
        scale.step(gradient, share)
        plain.grad = torch.tensor([gradient])  # neither clipped nor decayed
        optimizer.param_groups[0]["lr"] = 1e-2 * share
        optimizer.step()
    assert scale.value == pytest.approx(math.exp(plain.item()), rel=1e-6)


def test_it_stays_below_its_bound() -> None:
    scale = LearnedScale(LossConfig(learn_scale=True, scale=99.0, scale_learning_rate=0.5), TrainingConfig())
    for _ in range(5):
        scale.step(-1.0, 1.0)
    assert scale.value == pytest.approx(100.0, rel=1e-6)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_it_saves_it_and_continues_with_it(folder: Path) -> None:
    keys: dict[str, Any] = {"loss": {"learn_scale": True, "scale_learning_rate": 0.05}}
    farnear.train(run_config(folder, "whole", **keys))
    whole = metrics(folder / "whole")
    scales = [step["scale"] for step in whole]
    assert scales[0] == pytest.approx(20.0) and len(set(scales)) == len(scales)
    checkpoint = open_checkpoint(folder / "whole" / "checkpoints" / "step-00000002")
    assert checkpoint.manifest.parameters[NAME] == SavedParameter(shape=(1,), step=2)
    # The model that is exported has no scale of its own.
    assert not any("scale" in name for name in json.loads((folder / "whole" / "export" / "config.json").read_text()))

    short = run_config(folder, "resumed", **keys)
    farnear.train(short.model_copy(update={"training": short.training.model_copy(update={"max_steps": 6})}))
    for name in ("step-00000004", "step-00000005", "step-00000006"):
        for file in (folder / "resumed" / "checkpoints" / name).iterdir():
            file.unlink()
        (folder / "resumed" / "checkpoints" / name).rmdir()
    farnear.train(short, "newest")
    assert [(s["loss"], s["scale"]) for s in metrics(folder / "resumed")] == [(s["loss"], s["scale"]) for s in whole]


def test_a_checkpoint_without_it_does_not_fit(folder: Path) -> None:
    farnear.train(run_config(folder, "without", training={"max_steps": 2, "num_train_epochs": 1}))
    with pytest.raises(UserError, match=r"parameter loss\.log_scale differs"):
        farnear.train(run_config(folder, "without", loss={"learn_scale": True}), "newest")


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ({"learn_scale": True, "scale": 200.0}, "above max_scale"),
        ({"scale_learning_rate": 0.1}, "learn_scale is not"),
        ({"max_scale": 50.0}, "learn_scale is not"),
        ({"margin_strategy": "relative"}, "margin is not"),
        ({"directions": ["doc_to_query"]}, "needs query_to_doc"),
        ({"directions": ["query_to_doc", "query_to_doc"]}, "names one twice"),
        ({"directions": ["query_to_doc", "doc_to_doc"], "partition_mode": "per_direction"}, "doc_to_doc has no"),
        ({"hardness_mode": "all_negatives"}, "belong together"),
        ({"hardness_strength": 5.0}, "belong together"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(folder: Path, loss: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run_config(folder, "unused", loss=loss)
