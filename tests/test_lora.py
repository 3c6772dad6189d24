"""LoRA: the cached gradient of adapters is the plain one, a checkpoint holds nothing else, an export needs no peft."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import exactness
import pytest
import torch
from exactness import CPU, SEED, Case, make_batch, rank_batch, reference_gradient, relative_error
from peft import PeftModel
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_runs import make_inputs, run_config

import farnear
from farnear.errors import UserError
from farnear.model.embedder import Embedder, Preprocessing
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.model.trainable import checkpoint_activations, choose_trainable
from farnear.parallel.strategy import build_strategy
from farnear.parallel.world import World, start_world, stop_world
from farnear.sections import ModelConfig
from farnear.training.cache import CachedStep
from farnear.training.checkpoint import open_checkpoint
from farnear.training.run import train_in
from farnear.training.step import StepFigures

QUERIES = ["Which page shows revenue?", "costs 2019"]
PAGES = [Image.new("RGB", (64, 96), "red"), Image.new("RGB", (96, 64), "blue")]
LORA = {"r": 4, "lora_alpha": 8}
BOUND = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with dropout in its attention."""
    folder = tmp_path_factory.mktemp("dropping") / "base"
    return save_tiny_model(folder, hidden_size=64, num_layers=2, attention_dropout=0.1)


def adapted(base: Path, *, checkpointing: bool = False, **lora: Any) -> SentenceTransformer:
    """A model whose adapters already do something: with B at zero, as they begin, A has no gradient."""
    config = ModelConfig(name_or_path=str(base), lora={**LORA, **lora})
    model = load_model(config)
    choose_trainable(model, config, seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    if checkpointing:
        checkpoint_activations(model)
    return model


def cached_error(
    base: Path, strategy_name: str, case: Case, world: World, lora: dict[str, Any], *, checkpointing: bool = False
) -> float:
    """Relative error of farnear's SGD update against the plain gradient, over all trained parameters (rank 0)."""
    batch = make_batch(case, world.world_size)
    gradient = reference_gradient(adapted(base, **lora), case, batch)
    model = adapted(base, **lora, checkpointing=checkpointing)
    module = Embedder(model, bf16=False)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    assert gradient.keys() == before.keys()
    mine = rank_batch(case, batch, model, world)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    with exactness.parameters_split(strategy_name):
        strategy = build_strategy(exactness.run_config(strategy_name, "unused", 0.0), module, optimizer, world)
    strategy.train(True)
    CachedStep(strategy, world, case.loss, SEED).gradient(mine, StepFigures(), scale=case.loss.scale)
    # As large as the weights, so that their rounding does not drown it.
    lr = float(sum(p.norm() for p in before.values()) / sum(g.norm() for g in gradient.values()))
    strategy.step(lr)
    after = strategy.full_weights()
    wanted = {name: lr * g for name, g in gradient.items()}
    return relative_error({name: before[name] - after[name] for name in before}, wanted) if after else 0.0


ALONE = World(0, 1, CPU)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", [Case("plain", uneven_pages=True), Case("dropout", dropout=0.1)])
def test_the_cached_gradient_of_adapters_is_the_plain_one(
    dropping: Path, folder: Path, case: Case, checkpointing: bool
) -> None:
    lora = {"lora_dropout": case.dropout, "modules_to_save": ["merger"]}
    base = dropping if case.dropout else folder / "base"
    assert cached_error(base, "single", case, ALONE, lora, checkpointing=checkpointing) < BOUND


def test_dropout_that_is_not_replayed_would_be_seen(dropping: Path) -> None:
    with patch("farnear.training.cache.turn_seed", lambda *scope: hash(scope[:-1]) + 7 & 2**31):
        assert cached_error(dropping, "single", Case("dropout", dropout=0.1), ALONE, {"lora_dropout": 0.1}) > 1e-2


def gradients_on_ranks(rank: int, world_size: int, base: Path) -> None:
    world = start_world(run_config(base.parent, "unused", strategy="zero1"))
    case = Case("uneven", pairs=5, uneven_pages=True, hard_negatives=True)
    for name in ("ddp", "zero1", "zero2", "zero3"):
        error = cached_error(base, name, case, world, {"modules_to_save": ["merger"]})
        assert error < BOUND, (name, error)
    stop_world()


def test_it_is_the_plain_one_on_two_ranks_under_every_strategy(folder: Path) -> None:
    run_ranks(gradients_on_ranks, 2, folder / "base")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    keys: dict[str, Any] = {"model": {"lora": {**LORA, "modules_to_save": ["merger"]}}, "training": {"max_steps": 3}}
    farnear.train(run_config(folder, "run", **keys))
    return folder / "run"


def test_a_checkpoint_holds_adapters_alone(folder: Path, finished: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-00000003"
    names = list(open_checkpoint(checkpoint).manifest.parameters)
    assert all("lora_A.default" in n or "lora_B.default" in n or "merger.modules_to_save.default" in n for n in names)
    # Seven linear layers a layer, two matrices each; the merger has a norm and two linear layers.
    assert len(names) == 2 * 7 * 2 + 6
    assert not any(".visual." in name and "lora_" in name for name in names)
    tensors = load_file(checkpoint / "rank-00000.0.safetensors")
    shapes = open_checkpoint(checkpoint).manifest.parameters.values()
    elements = sum(torch.Size(facts.shape).numel() for facts in shapes)
    assert sum(tensor.numel() for tensor in tensors.values()) == 3 * elements
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    base_bytes = (folder / "base" / "model.safetensors").stat().st_size
    assert (checkpoint / "rank-00000.0.safetensors").stat().st_size < base_bytes


def embeddings(model: SentenceTransformer) -> torch.Tensor:
    parts = [model.encode_query(QUERIES, convert_to_tensor=True), model.encode_document(PAGES, convert_to_tensor=True)]
    return torch.cat(parts)


def test_export_adapter_and_trained_model_give_the_same_embeddings(folder: Path, finished: Path) -> None:
    config = ModelConfig(name_or_path=str(folder / "base"), lora={**LORA, "modules_to_save": ["merger"]})
    trained = load_model(config)
    base = embeddings(trained)
    choose_trainable(trained, config, seed=0)
    pieces = load_file(finished / "checkpoints" / "step-00000003" / "rank-00000.0.safetensors")
    named = dict(Embedder(trained, bf16=False).named_parameters())
    for key, piece in pieces.items():
        kind, _, name = key.split("/", 2)
        if kind == "weight":
            named[name].data.copy_(piece.view_as(named[name]))
    wanted = embeddings(trained.eval())
    assert (wanted - base).abs().max() > 1e-3

    merged = SentenceTransformer(str(finished / "export"), device="cpu")
    assert not [module for module in merged.modules() if type(module).__module__.startswith("peft")]
    assert torch.allclose(embeddings(merged), wanted, atol=1e-5)
    exported, stored = (load_file(path / "model.safetensors") for path in (finished / "export", folder / "base"))
    assert exported.keys() == stored.keys()
    assert {name: weight.dtype for name, weight in exported.items()} == {n: w.dtype for n, w in stored.items()}
    untouched = [name for name in stored if ".visual." in name and ".visual.merger." not in name]
    assert all(torch.equal(exported[name], stored[name]) for name in untouched)

    with_adapter = load_model(ModelConfig(name_or_path=str(folder / "base")))
    PeftModel.from_pretrained(with_adapter[0].model, str(finished / "export" / "adapter"))
    assert torch.allclose(embeddings(with_adapter.eval()), wanted, atol=1e-5)
    through_sentence_transformers = load_model(ModelConfig(name_or_path=str(folder / "base")))
    through_sentence_transformers.load_adapter(str(finished / "export" / "adapter"))
    assert torch.allclose(embeddings(through_sentence_transformers), wanted, atol=1e-5)
    settings = json.loads((finished / "export" / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "FEATURE_EXTRACTION"
    assert settings["base_model_name_or_path"] == "base"
    umask = os.umask(0)
    os.umask(umask)
    for path in (finished / "export").rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_bf16_base_is_exported_in_bf16_with_an_fp32_adapter(folder: Path) -> None:
    save_tiny_model(folder / "bf16", hidden_size=64, num_layers=2, dtype=torch.bfloat16)
    model = {"name_or_path": str(folder / "bf16"), "lora": LORA}
    for name, precision in (("pure", {"pure_bf16": True}), ("mixed", {"bf16": True})):
        farnear.train(run_config(folder, f"bf16-{name}", model=model, training={"max_steps": 1, **precision}))
        export = folder / f"bf16-{name}" / "export"
        assert {w.dtype for w in load_file(export / "model.safetensors").values()} == {torch.bfloat16}
        adapter = load_file(export / "adapter" / "adapter_model.safetensors")
        assert {w.dtype for w in adapter.values()} == {torch.float32}
        saved = load_file(folder / f"bf16-{name}" / "checkpoints" / "step-00000001" / "rank-00000.0.safetensors")
        # Steps of 1e-3 that bf16 would round away from weights near 0.1.
        assert any((w != w.bfloat16().float()).any() for key, w in saved.items() if key.startswith("weight"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, r"model\.lora\.rank is not a key of peft\.LoraConfig; did you mean 'r'\?"),
        ({"lora_alfa": 4}, r"model\.lora\.lora_alfa is not .* did you mean 'lora_alpha'\?"),
        ({"qqqqqq": 4}, r"is not a key of peft\.LoraConfig; the keys are r, target_modules"),
        ({"task_type": "CAUSAL_LM"}, r"model\.lora\.task_type follows from what is trained; take it out"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: pissa changes the base model itself"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication changes the base model itself"),
        ({"target_modules": ["qqq"]}, r"cannot be put into .*\(\w+Error: .*qqq.*target_modules \(\['qqq'\]\)"),
        ({"r": 0}, r"cannot be put into .* check its keys"),
        ({"modules_to_save": ["merge"]}, r"modules_to_save: no module is called 'merge'; names near it are .*merger"),
    ],
)
def test_what_peft_cannot_do_is_said_in_one_line(folder: Path, lora: dict[str, Any], message: str) -> None:
    config = ModelConfig(name_or_path=str(folder / "base"), lora=lora)
    model = load_model(config)
    with pytest.raises(UserError, match=message) as caught:
        choose_trainable(model, config, seed=0)
    assert "\n" not in str(caught.value)


def test_every_rank_begins_with_the_same_adapters_and_freezing_goes_before_lora(folder: Path) -> None:
    config = ModelConfig(name_or_path=str(folder / "base"), lora=LORA, freeze=("mlp",))
    first, second = (load_model(config) for _ in range(2))
    choose_trainable(first, config, seed=0)
    torch.manual_seed(99)
    choose_trainable(second, config, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    names = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 4 * 2
    assert not any(".mlp." in name for name in names)
    assert len(Preprocessing(first)._snapshot) > 0


@pytest.mark.parametrize(
    ("began", "goes_on"),
    [
        ({"lora": {**LORA, "lora_alpha": 8}}, {"lora": {**LORA, "lora_alpha": 64}}),
        ({"lora": LORA}, {"lora": LORA, "name_or_path": "other"}),
        ({"freeze": ["visual"]}, {"freeze": ["visual"], "name_or_path": "other"}),
    ],
)
def test_a_run_does_not_go_on_beside_other_frozen_weights(
    folder: Path, tmp_path: Path, began: dict[str, Any], goes_on: dict[str, Any]
) -> None:
    texts = ["Which page shows the red bar chart of revenue in 2019?"]  # as the base's, so that all shapes are alike
    save_tiny_model(tmp_path / "other", texts=texts, hidden_size=64, num_layers=2, seed=9)
    base = {"name_or_path": str(folder / "base")}
    output_dir, steps = str(tmp_path / "run"), {"max_steps": 1}
    farnear.train(run_config(folder, output_dir, model={**base, **began}, training=steps))
    # What the frozen weights are stored in is no difference.
    bf16 = {"max_steps": 2, "bf16": True}
    farnear.train(run_config(folder, output_dir, model={**base, **began}, training=bf16), "newest")
    model = {**base, **goes_on}
    if model["name_or_path"] == "other":
        model["name_or_path"] = str(tmp_path / "other")
    with pytest.raises(UserError, match="beside other frozen weights or with another scale of its adapters"):
        farnear.train(run_config(folder, output_dir, model=model, training={"max_steps": 3}), "newest")


def test_a_module_cannot_be_frozen_and_saved_beside_the_adapter(folder: Path) -> None:
    model = load_model(ModelConfig(name_or_path=str(folder / "base")))
    config = ModelConfig(name_or_path="unused", lora={**LORA, "modules_to_save": ["merger"]}, freeze=("visual",))
    with pytest.raises(UserError, match=r"modules_to_save names .*visual\.merger, but model\.freeze freezes it"):
        choose_trainable(model, config, seed=0)


STRATEGIES = ("ddp", "zero2", "zero3")


def runs_on_ranks(rank: int, world_size: int, folder: Path) -> None:
    """Under each strategy three steps in one go, and one step, a new start, and two more."""
    world = start_world(run_config(folder, "unused", strategy="zero1"))
    for name in STRATEGIES:
        model = {"lora": {**LORA, "lora_dropout": 0.1}, "attn_implementation": "varlen"}
        with exactness.parameters_split(name):
            for run, steps, resume in (("whole", 3, None), ("halves", 1, None), ("halves", 3, "newest")):
                training = {"max_steps": steps, "lr_scheduler_type": "constant_with_warmup"}
                train_in(
                    world, run_config(folder, f"{run}-{name}", strategy=name, model=model, training=training), resume
                )
    stop_world()


def test_resume_is_bit_for_bit_and_exports_agree_under_every_strategy(folder: Path) -> None:
    run_ranks(runs_on_ranks, 2, folder)
    for name in STRATEGIES:
        figures = {}
        for run in ("whole", "halves"):
            lines = [json.loads(line) for line in (folder / f"{run}-{name}" / "metrics.jsonl").read_text().splitlines()]
            figures[run] = [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
        assert figures["whole"] == figures["halves"], name
        assert len(figures["whole"]) == 3
        whole, halves = (
            load_file(folder / f"{run}-{name}" / "export" / "model.safetensors") for run in ("whole", "halves")
        )
        assert all(torch.equal(whole[key], halves[key]) for key in whole), name
        # AdamW magnifies rounding; that each strategy's gradient is the plain one is tested above.
        ddp = load_file(folder / "whole-ddp" / "export" / "model.safetensors")
        assert max(float((ddp[key] - whole[key]).abs().max()) for key in ddp) < 2e-3, name
