"""What a hollow model tells of a forward is what the real one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from farnear.config import RunConfig, parse_config
from farnear.model.blueprint import EmbedderBlueprint
from farnear.model.embedder import Embedder, Preprocessing, to_device
from farnear.model.hollow import CannotTraceError, hollow_out, trace
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.model.trainable import checkpoint_activations, choose_trainable
from farnear.training.choices import _saved_for_backward

INPUTS: dict[str, list[Any]] = {
    "document": [Image.new("RGB", (64, 96))] * 2,
    "query": ["which page is it?", "a longer one, so that there is padding"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hollow") / "tiny", hidden_size=64, num_layers=2)


def config_of(folder: Path, model: dict[str, Any], **training: Any) -> RunConfig:
    return parse_config(
        {
            "output_dir": "unused",
            "model": {"name_or_path": str(folder), "max_pixels": 64 * 96, **model},
            "data": {"train": "unused.tar"},
            "training": training,
        }
    )


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ({}, {}),
        ({}, {"bf16": True}),
        ({"attn_implementation": "eager"}, {}),
        ({}, {"bf16": True, "gradient_checkpointing": True}),
        ({"freeze": ["visual"]}, {"bf16": True}),
        ({"lora": {"r": 4}}, {"bf16": True}),
    ],
)
def test_a_graph_is_as_large_as_the_real_one(folder: Path, model: dict[str, Any], training: dict[str, Any]) -> None:
    config = config_of(folder, model, **training)
    real, hollow = load_model(config.model), load_model(config.model, with_weights=False)
    for one in (real, hollow):
        choose_trainable(one, config.model, seed=0)
        if config.training.gradient_checkpointing:
            checkpoint_activations(one)
        one.train()
    preprocess, embedder = Preprocessing(real), Embedder(real, bf16=config.training.bf16)
    hollow_out(hollow)
    for side, inputs in INPUTS.items():
        features = to_device(preprocess(inputs, side), torch.device("cpu"))
        with _saved_for_backward() as saved:
            embedder(features)
        traced = trace(
            hollow,
            lambda x: hollow(x)["sentence_embedding"],
            features,
            torch.bfloat16 if config.training.bf16 else None,
        )
        assert traced.graph_bytes + traced.cast_bytes == sum(saved.values()), side


def test_made_up_inputs_stand_for_real_ones(folder: Path) -> None:
    """A blueprint, from the config alone, gives the figures of the model with its processor's features."""
    config = config_of(folder, {})
    model = load_model(config.model)
    blueprint = EmbedderBlueprint(config, Path("run.yaml"))
    assert blueprint.parameters_in_all == sum(p.numel() for p in model.parameters())
    assert blueprint.width == 64
    assert blueprint.pages.most_tokens == 6
    preprocess, embedder = Preprocessing(model), Embedder(model.train(), bf16=False)
    features = to_device(preprocess(INPUTS["document"], "document"), torch.device("cpu"))
    text = features["input_ids"].shape[1] - 6
    traced = blueprint.trace(2, text_tokens=text, visual_tokens=6)
    with _saved_for_backward() as saved:
        embedder(features)
    assert traced.graph_bytes == pytest.approx(sum(saved.values()), rel=0.01)
    assert traced.used_elements == blueprint.parameters_in_all
    assert blueprint.trace(2, text_tokens=9).used_elements < blueprint.parameters_in_all


def test_adapters_and_frozen_parts_are_counted(folder: Path) -> None:
    for model in ({"lora": {"r": 4, "modules_to_save": ["merger"]}}, {"freeze": ["visual", "embed_tokens"]}):
        config = config_of(folder, model, bf16=True)
        real = load_model(config.model)
        choose_trainable(real, config.model, seed=0)
        blueprint = EmbedderBlueprint(config, Path("run.yaml"))
        assert blueprint.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
        assert blueprint.parameters_in_all == sum(p.numel() for p in real.parameters())
        # Frozen linear layers are stored in bf16 under ddp.
        assert blueprint.weight_bytes < 4 * blueprint.parameters_in_all


def test_flops_and_peaks_of_a_layer_by_hand() -> None:
    layer = torch.nn.Linear(8, 16, bias=False, device="meta")
    hollow_out(layer)
    x_nD = torch.zeros(4, 8)
    traced = trace(layer, lambda features: layer(features["x"]), {"x": x_nD}, None, merged={"x": torch.zeros(12, 8)})
    assert traced.forward_flops == 2 * 4 * 8 * 16
    assert traced.backward_flops == traced.forward_flops  # of the weight alone
    assert traced.graph_bytes == x_nD.nbytes
    assert traced.forward_bytes == 12 * (8 + 16) * 4
    # Inputs, outputs and the gradient that is about to be added to the weight's own.
    assert traced.backward_bytes >= (4 * (8 + 16) + 8 * 16) * 4


def test_code_that_asks_for_numbers_is_told() -> None:
    layer = torch.nn.Linear(8, 16, device="meta")
    hollow_out(layer)
    with pytest.raises(CannotTraceError, match="values of activations"):
        trace(layer, lambda features: layer(features["x"] * features["x"].sum().item()), {"x": torch.zeros(4, 8)}, None)
