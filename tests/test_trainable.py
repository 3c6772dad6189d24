"""Freezing by module name: what a pattern means, and that what is frozen is neither updated, nor saved, nor changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_runs import make_inputs, run_config

import farnear
from farnear.errors import UserError
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.model.trainable import checkpoint_activations, choose_trainable
from farnear.sections import ModelConfig
from farnear.training.checkpoint import open_checkpoint

Freeze = Callable[..., SentenceTransformer]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base", hidden_size=64, num_layers=2)


@pytest.fixture
def frozen(base: Path) -> Freeze:
    def load(*patterns: str) -> SentenceTransformer:
        config = ModelConfig(name_or_path=str(base), freeze=patterns)
        model = load_model(config)
        choose_trainable(model, config, seed=0)
        return model

    return load


def trained(model: SentenceTransformer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "pattern", ["visual", "0.model.visual", "model.visual", "vis*", "*visual", "0.*.visual", "[uv]isual"]
)
def test_the_vision_tower_is_found_by_its_name_wherever_it_hangs(frozen: Freeze, pattern: str) -> None:
    model = frozen(pattern)
    assert trained(model) == {name for name, _ in model.named_parameters() if ".visual." not in name}
    assert any(".visual." in name for name, _ in model.named_parameters())


def test_layers_are_named_by_ranges_and_patterns_add_up(frozen: Freeze) -> None:
    model = frozen("language_model.layers.[0-0]", "embed_tokens", "visual.blocks.1.*")
    parts = ("language_model.layers.0.", "language_model.embed_tokens.", "visual.blocks.1.")
    assert trained(model) == {n for n, _ in model.named_parameters() if not any(part in n for part in parts)}


def test_a_whole_name_goes_before_its_likes(frozen: Freeze) -> None:
    """`0` alone is the transformer, not the first layer of each list of layers."""
    with pytest.raises(UserError, match=r"model\.freeze \(0\) leaves no parameter to train; take a pattern out"):
        frozen("0")


def test_a_pattern_without_a_module_is_answered_with_names_near_it(frozen: Freeze) -> None:
    with pytest.raises(UserError, match=r"no module of the model is called 'vision'; names near it are .*\.visual,"):
        frozen("visual", "vision")
    with pytest.raises(UserError, match=r"'embed_token'; names near it are 0\.model\.language_model\.embed_tokens"):
        frozen("embed_token")
    # A module without parameters is none.
    with pytest.raises(UserError, match="is called 'rotary_emb'"):
        frozen("rotary_emb")


@pytest.mark.parametrize("patterns", [(), ("visual",), ("visual", "embed_tokens", "language_model.layers.0")])
def test_checkpointed_activations_give_the_same_gradient_and_leave_frozen_layers_out(
    frozen: Freeze, patterns: tuple[str, ...]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = frozen(*patterns).train()
        if checkpointing:
            checkpoint_activations(model)
        inner = model[0].model
        passes: list[bool] = []
        has_graph = {}
        inner.language_model.layers[1].mlp.register_forward_pre_hook(lambda *_, seen=passes: seen.append(True))
        inner.visual.register_forward_hook(
            lambda module, _, output, seen=has_graph: seen.update(tower=output.pooler_output.requires_grad)
        )
        inner.language_model.layers[0].register_forward_hook(
            lambda module, _, output, seen=has_graph: seen.update(layer=output.requires_grad)
        )
        features = model.preprocess([Image.new("RGB", (64, 96), "red"), Image.new("RGB", (96, 64), "blue")])
        model(features)["sentence_embedding"][:, 0].sum().backward()
        assert len(passes) == (2 if checkpointing else 1)
        assert has_graph == {"tower": not patterns, "layer": len(patterns) < 3}
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() == trained(model)
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_a_frozen_tower_is_left_alone_by_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_inputs(tmp_path)
    keys: dict[str, Any] = {
        "model": {"freeze": "visual"},
        "training": {"max_steps": 2, "gradient_checkpointing": True, "save_steps": 0},
    }
    farnear.train(run_config(folder, "run", **keys))
    names = set(open_checkpoint(folder / "run" / "checkpoints" / "step-00000002").manifest.parameters)
    before, after = (load_file(folder / part / "model.safetensors") for part in ("base", "run/export"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".visual." in name}
    assert len(names) == len(before) - len(same)
    assert not any("visual" in name for name in names)
    total = sum(weight.numel() for weight in before.values())
    left = sum(weight.numel() for name, weight in before.items() if name not in same)
    assert f"{total:,} parameters, {left:,} of them trained, fp32 weights" in capsys.readouterr().out
    with pytest.raises(
        UserError,
        match=r"parameter model\.0\..* differs; set .*model\.freeze, model\.lora and loss\.learn_scale as they",
    ):
        farnear.train(run_config(folder, "run", training={"max_steps": 3}), "newest")
    assert json.loads((folder / "run" / "summary.json").read_text())["steps"] == 2
