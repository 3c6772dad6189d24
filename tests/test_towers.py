"""What joining, loading and exporting towers promise, one by one; whole runs are in `test_shapes`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_makers import page
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from shape_runs import shape_config, text_and_page, write_shards
from tiny_towers import save_tiny_clap, save_tiny_clip, save_tiny_siglip, save_tiny_text_encoder, tiny_tokenizer

import farnear
from farnear.errors import UserError
from farnear.launching import checks_run
from farnear.launching.findings import Subject
from farnear.model.embedder import Preprocessing, to_device
from farnear.model.export import export_model
from farnear.model.features import FeatureMerger
from farnear.model.frozen import FrozenOutputs
from farnear.model.load import load_model
from farnear.model.pixels import page_tokens
from farnear.model.tiny import save_tiny_model
from farnear.model.towers import leave_out_unreached, readers, readers_of_pages, takes, unreached
from farnear.model.trainable import choose_trainable
from farnear.sections import ModelConfig

TEXTS = ["a page", "which page shows the number of pages?"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    made = {
        "text": save_tiny_text_encoder(folder / "text"),
        "clip": save_tiny_clip(folder / "clip"),
        "siglip": save_tiny_siglip(folder / "siglip"),
        "clap": save_tiny_clap(folder / "clap"),
        "vlm": save_tiny_model(folder / "vlm", hidden_size=32, num_layers=1),
        "static": folder / "static",
    }
    static = StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=24)
    SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(made["static"]))
    return {name: str(path) for name, path in made.items()}


def joined(towers: dict[str, str], *, seed: int = 0, **names: str) -> SentenceTransformer:
    return load_model(ModelConfig(router={route: towers[name] for route, name in names.items()}), seed=seed)


def trained(config: ModelConfig, folder: Path) -> SentenceTransformer:
    """An export of weights that have moved."""
    model = load_model(config)
    choose_trainable(model, config, seed=0)
    weights = {name: p.detach() + 0.1 for name, p in model.named_parameters() if p.requires_grad}
    export_model(config, weights, folder)
    return SentenceTransformer(str(folder), device="cpu")


def test_the_pages_width_is_kept_and_the_layer_to_it_is_the_same_everywhere(towers: dict[str, str]) -> None:
    first, again, other = (joined(towers, text="text", image="siglip", seed=seed) for seed in (3, 3, 4))
    assert first.get_embedding_dimension() == 48
    weight, same, another = (model[0].sub_modules["text"][3].linear.weight for model in (first, again, other))
    assert weight.shape == (48, 32)
    assert torch.equal(weight, same) and not torch.equal(weight, another)
    assert len(joined(towers, text="text", image="vlm")[0].sub_modules["text"]) == 3, "of one width already"
    hollow = load_model(
        ModelConfig(router={"text": towers["text"], "image": towers["siglip"]}), with_weights=False
    ).state_dict()
    assert hollow.keys() == first.state_dict().keys()
    assert hollow["0.sub_modules.text.3.linear.weight"].is_meta


def test_every_kind_goes_where_it_is_read(towers: dict[str, str]) -> None:
    by_kind = joined(towers, text="text", image="vlm", audio="clap")
    by_side = joined(towers, query="text", document="vlm")
    clip = load_model(ModelConfig(name_or_path=towers["clip"]))
    wanted = {
        "text": (True, True, True, True, True),
        "image": (True, True, False, True, True),
        "audio": (True, True, False, False, False),
        "image+text": (True, True, False, True, False),
        "message": (True, True, False, True, False),
        "image+message": (True, True, False, True, False),
        "audio+text": (False, False, False, False, False),
        "audio+message": (False, False, False, False, False),
    }
    for kind, takes_it in wanted.items():
        asked = [(by_kind, "query"), (by_kind, "document"), (by_side, "query"), (by_side, "document"), (clip, "query")]
        assert tuple(takes(model, side, kind) for model, side in asked) == takes_it, kind
    assert len(readers(by_kind)) == 3 and len(readers_of_pages(by_kind)) == 1


@pytest.mark.parametrize(
    ("router", "prompts", "says"),
    [
        ({"text": "text", "image": "text"}, None, "model.router.image: model .*text reads no image .modalities: text"),
        ({"text": "siglip", "image": "nowhere"}, None, "model.router.image: there is no model folder"),
        ({"text": "asks", "image": "asks_otherwise"}, None, "different prompts of the name 'query', 'A: ' and 'B: '"),
        ({"text": "asks", "image": "asks_otherwise"}, {"query": "C: "}, None),
    ],
)
def test_what_cannot_be_joined_is_named(
    towers: dict[str, str], tmp_path: Path, router: dict[str, str], prompts: Any, says: str | None
) -> None:
    for name, base, prompt in (("asks", "text", "A: "), ("asks_otherwise", "vlm", "B: ")):
        if name in router.values():
            model = SentenceTransformer(towers[base], device="cpu", prompts={"query": prompt})
            model.save_pretrained(str(tmp_path / name))
    paths = {route: towers.get(name, str(tmp_path / name)) for route, name in router.items()}
    config = ModelConfig(router=paths, prompts=prompts)
    if says is None:
        assert load_model(config).prompts["query"] == "C: "
    else:
        with pytest.raises(UserError, match=says):
            load_model(config)


def test_what_no_input_goes_through_is_neither_trained_nor_held_nor_lost(
    towers: dict[str, str], tmp_path: Path
) -> None:
    inner = "0.sub_modules.image.0.model."
    config = ModelConfig(router={"text": towers["text"], "image": towers["clip"]})
    model = load_model(config)
    assert unreached(model) == [f"{inner}{part}" for part in ("text_model", "text_projection", "logit_scale")]
    choose_trainable(model, config, seed=0)
    leave_out_unreached(model)
    assert not any("image.0.model.text" in name or "logit" in name for name, _ in model.named_parameters())
    assert model.encode([page(64, 64, 0)]).shape == (1, 48)
    alone = load_model(ModelConfig(name_or_path=towers["clip"]))
    assert unreached(alone) == ["0.model.logit_scale"]
    assert unreached(load_model(ModelConfig(name_or_path=towers["vlm"]))) == []
    trained(config, tmp_path / "export")
    before = load_file(Path(towers["clip"]) / "model.safetensors")
    after = load_file(tmp_path / "export" / "image_0_Transformer" / "model.safetensors")
    assert before.keys() == after.keys()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if not name.startswith("vision") and not name.startswith("visual")} == kept


@pytest.mark.parametrize(
    ("text", "image", "width", "wanted"),
    [
        (torch.bfloat16, torch.bfloat16, 32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, 64, torch.float32),  # a linear layer knows fp32 alone
        (torch.float32, torch.bfloat16, 32, torch.float32),
    ],
)
def test_an_export_has_one_type_in_which_it_computes(
    towers: dict[str, str], tmp_path: Path, text: torch.dtype, image: torch.dtype, width: int, wanted: torch.dtype
) -> None:
    stored = SentenceTransformer(towers["text"], device="cpu", model_kwargs={"dtype": text})
    stored.save_pretrained(str(tmp_path / "text"))
    vlm = save_tiny_model(tmp_path / "vlm", hidden_size=width, num_layers=1, dtype=image)
    export = trained(ModelConfig(router={"text": str(tmp_path / "text"), "image": str(vlm)}), tmp_path / "export")
    assert {p.dtype for p in export.parameters()} == {wanted}
    similarity = export.similarity(
        export.encode_query(TEXTS, convert_to_tensor=True),
        export.encode_document([page(64, 64, 0)], convert_to_tensor=True),
    )
    assert similarity.shape == (2, 1) and similarity.isfinite().all()
    settings = json.loads((tmp_path / "export" / "image_0_Transformer" / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3VLForConditionalGeneration"]
    # An export is a base as any other.
    again = trained(ModelConfig(name_or_path=str(tmp_path / "export")), tmp_path / "again")
    assert {p.dtype for p in again.parameters()} == {wanted}
    first, second = (
        set(load_file(tmp_path / one / "image_0_Transformer" / "model.safetensors")) for one in ("export", "again")
    )
    assert first == second


def test_a_text_of_siglip_has_one_embedding_whatever_stands_beside_it(towers: dict[str, str], tmp_path: Path) -> None:
    def difference(model: SentenceTransformer) -> float:
        alone, beside = model.encode(TEXTS[:1]), model.encode(TEXTS)[:1]
        return float(np.abs(alone - beside).max())

    assert difference(SentenceTransformer(towers["siglip"], device="cpu")) > 1e-2, "which is why it is padded"
    config = ModelConfig(name_or_path=towers["siglip"])
    assert difference(load_model(config)) < 1e-5
    assert difference(trained(config, tmp_path / "export")) < 1e-5
    # What the checkpoint says itself stands.
    settings = tmp_path / "export" / "sentence_bert_config.json"
    own = json.loads(settings.read_text())
    assert own["processing_kwargs"]["text"] == {"padding": "max_length", "max_length": 64}
    own["processing_kwargs"]["text"] = {"padding": "max_length", "max_length": 32}
    settings.write_text(json.dumps(own))
    assert load_model(ModelConfig(name_or_path=str(tmp_path / "export"))).preprocess(TEXTS)["input_ids"].shape[1] == 32


def test_mini_batches_of_each_tower_are_padded_as_its_own_tokenizer_does(towers: dict[str, str]) -> None:
    model = joined(towers, text="text", image="vlm")
    model[0].sub_modules["image"][0].tokenizer.padding_side = "left"
    preprocess, merge = Preprocessing(model), FeatureMerger(model)
    groups: dict[str, list[list[Any]]] = {
        "query": [TEXTS[:1], TEXTS],
        "document": [[page(64, 64, 1)], [page(128, 64, 2), page(64, 64, 3)]],
    }
    for side, inputs in groups.items():
        apart = [preprocess(one, side) for one in inputs]
        with torch.no_grad():
            wanted, found = (
                torch.cat([model(to_device(one, CPU))["sentence_embedding"] for one in features])
                for features in (apart, [merge(apart)])
            )
        assert torch.allclose(wanted, found, atol=1e-5), side
        shorter = merge(apart)["attention_mask"][0]
        assert (int(shorter[0]), int(shorter[-1])) == ((1, 0) if side == "query" else (0, 1))


def test_pages_of_a_router_travel_and_cost_as_those_of_their_tower(towers: dict[str, str]) -> None:
    wide = np.array([640]), np.array([320])
    vlm = load_model(ModelConfig(name_or_path=towers["vlm"], max_pixels=64 * 64))
    router = load_model(ModelConfig(router={"text": towers["text"], "image": towers["vlm"]}, max_pixels=64 * 64))
    assert Preprocessing(router).pages_as_uint8
    assert page_tokens(router)(*wide) == page_tokens(vlm)(*wide) == 2
    assert "max_pixels" not in router[0].sub_modules["text"][0].tokenizer.init_kwargs
    assert page_tokens(joined(towers, text="text", image="siglip"))(*wide) == 16
    two = joined(towers, query="clip", document="vlm")
    assert Preprocessing(two).why_floats == "2 parts of the model read images"


def test_limits_of_pages_that_nobody_reads_are_told(
    towers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "data", text_and_page)
    for name, told in (("siglip", "; all become one size, whatever model.max_pixels says"), ("vlm", "")):
        model = {"name_or_path": towers[name], "max_pixels": 64 * 64}
        farnear.train(shape_config(tmp_path / name, shards, model))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("     pages"))
        assert line.endswith(told) if told else "one size" not in line


@pytest.mark.parametrize("text", ["text", "static"])
def test_a_text_that_names_a_picture_is_not_opened(towers: dict[str, str], tmp_path: Path, text: str) -> None:
    preprocess = Preprocessing(joined(towers, text=text, image="clip"))
    page(64, 64, 0).save(tmp_path / "secret.png")
    for side in ("query", "document"):
        features = preprocess([str(tmp_path / "secret.png"), "plain"], side)
        assert "pixel_values" not in features and features["modality"] == "text"


def test_one_tower_is_frozen_and_its_outputs_are_kept(towers: dict[str, str], tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", text_and_page)
    router = {"router": {"text": towers["text"], "image": towers["siglip"]}, "freeze": ["sub_modules.text.0"]}
    config = shape_config(tmp_path, data, router)
    farnear.train(config)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["frozen_bytes"] > 0
    before = load_model(config.model, seed=config.seed)
    after = SentenceTransformer(str(tmp_path / "run" / "export"), device="cpu").state_dict()
    moved = {name for name, weight in before.state_dict().items() if not torch.equal(weight, after[name])}
    assert not any(name.startswith("0.sub_modules.text.0") for name in moved)
    assert "0.sub_modules.text.3.linear.weight" in moved
    module = torch.nn.ModuleDict({"model": before})
    before.requires_grad_(False)
    assert all("sub_modules.text.0.model" in name or "image" in name for name in FrozenOutputs(module).names)


def test_a_router_goes_on_where_it_stopped(towers: dict[str, str], tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", text_and_page)
    router = {"router": {"text": towers["text"], "image": towers["clip"]}}

    def steps(name: str) -> list[tuple[float, float]]:
        lines = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines]

    every = {"save_steps": 1}
    farnear.train(shape_config(tmp_path / "whole", data, router, training=every))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "run" / "checkpoints" / "step-00000002")
    farnear.train(shape_config(tmp_path / "cut", data, router, training=every), resume="auto")
    assert steps("cut") == steps("whole")
    first, second = (
        load_file(next((tmp_path / name).rglob("export/text_*/*.safetensors"))) for name in ("whole", "cut")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_doctor_looks_at_each_of_joined_models(towers: dict[str, str], tmp_path: Path) -> None:
    def subject(router: dict[str, str]) -> Subject:
        return Subject(shape_config(tmp_path, tmp_path, {"router": router}), [], None, None, 1.0)

    router = {"text": towers["text"], "image": towers["siglip"]}
    found = checks_run.model(subject(router))
    assert [(one.level, towers[name] in one.what) for one, name in zip(found, ("text", "siglip"), strict=True)] == [
        ("ok", True),
        ("ok", True),
    ]
    missing = checks_run.model(subject({**router, "text": "/no/where"}))
    assert (missing[0].level, missing[0].do) == ("FAIL", "correct model.router.text")


def test_adapters_are_for_one_model(towers: dict[str, str], tmp_path: Path) -> None:
    joined(towers, text="text", image="clip").save_pretrained(str(tmp_path / "router"))
    config = ModelConfig(name_or_path=str(tmp_path / "router"), lora={"r": 2})
    with pytest.raises(UserError, match=r"model\.lora adapts one model, and .* is a Router of several"):
        choose_trainable(load_model(config), config, seed=0)
