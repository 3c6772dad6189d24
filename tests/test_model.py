"""Loading and export: fp32 whatever is stored, and a folder that gives the same embeddings elsewhere."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from farnear.errors import UserError
from farnear.model.embedder import Embedder, Preprocessing, to_device
from farnear.model.export import export_model
from farnear.model.load import cast_weights, load_model
from farnear.model.stored import describe_base
from farnear.model.tiny import save_tiny_model
from farnear.model.trainable import choose_trainable
from farnear.sections import ModelConfig

QUERIES = ["Which page shows revenue?", "costs 2019"]
PAGES = [Image.new("RGB", (64, 96), "red"), Image.new("RGB", (96, 64), "blue")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base", hidden_size=64, num_layers=2)


def nudged_weights(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    """Trained weights, as far as an export can tell."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def weight_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_a_raw_model_gets_pooling_and_normalisation(base: Path) -> None:
    for pooling in ("lasttoken", "mean"):
        model = load_model(ModelConfig(name_or_path=str(base), pooling=pooling))
        assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
        assert model[1].pooling_mode == pooling
    assert len(load_model(ModelConfig(name_or_path=str(base), normalize=False))) == 2


def test_an_export_gives_the_same_embeddings(base: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        name_or_path=str(base),
        prompts={"query": "Find the page: "},
        min_pixels=32 * 32,
        max_pixels=64 * 64,
        pooling="mean",
    )
    model = load_model(config)
    export_model(config, nudged_weights(model), tmp_path / "export")
    loaded = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert torch.allclose(
        model.encode_query(QUERIES, convert_to_tensor=True),
        loaded.encode_query(QUERIES, convert_to_tensor=True),
        atol=1e-5,
    )
    assert torch.allclose(
        model.encode_document(PAGES, convert_to_tensor=True),
        loaded.encode_document(PAGES, convert_to_tensor=True),
        atol=1e-5,
    )
    assert loaded.prompts["query"] == "Find the page: "
    assert loaded[1].pooling_mode == "mean"
    # Larger than max_pixels: both must have reduced it alike, to this many patches.
    features = loaded.preprocess([Image.new("RGB", (640, 640))])
    assert features["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert weight_names(tmp_path / "export") == weight_names(base)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["architectures"] == [
        "Qwen3VLForConditionalGeneration"
    ]


def test_training_sees_what_encode_sees(base: Path) -> None:
    model = load_model(ModelConfig(name_or_path=str(base), prompts={"query": "Find: ", "document": "Page: "}))
    preprocess = Preprocessing(model)
    embedder = Embedder(model, bf16=False).eval()

    def embed(inputs: list[Any], side: str) -> torch.Tensor:
        embedding: torch.Tensor = embedder(to_device(preprocess(inputs, side), model.device))
        return embedding

    with torch.no_grad():
        assert torch.allclose(embed(QUERIES, "query"), model.encode_query(QUERIES, convert_to_tensor=True), atol=1e-6)
        assert torch.allclose(embed(PAGES, "document"), model.encode_document(PAGES, convert_to_tensor=True), atol=1e-6)


def test_a_bf16_checkpoint_trains_in_fp32_and_is_exported_in_bf16(tmp_path: Path) -> None:
    stored = save_tiny_model(tmp_path / "bf16", hidden_size=64, num_layers=1, dtype=torch.bfloat16)
    config = ModelConfig(name_or_path=str(stored))
    assert describe_base(config).dtype == torch.bfloat16
    model = load_model(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    export_model(config, nudged_weights(model), tmp_path / "export")
    loaded = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    cast_weights(model, torch.bfloat16)
    same = model.encode_query(QUERIES, convert_to_tensor=True)
    assert torch.allclose(same, loaded.encode_query(QUERIES, convert_to_tensor=True), atol=1e-5)
    assert weight_names(tmp_path / "export") == weight_names(stored)


def test_an_export_can_be_trained_on_and_exported_again(base: Path, tmp_path: Path) -> None:
    config = ModelConfig(name_or_path=str(base), pooling="mean")
    export_model(config, nudged_weights(load_model(config)), tmp_path / "first")
    again = ModelConfig(name_or_path=str(tmp_path / "first"))
    model = load_model(again)
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    export_model(again, nudged_weights(model), tmp_path / "second")
    export_model(again, nudged_weights(model), tmp_path / "second")
    assert weight_names(tmp_path / "second") == weight_names(base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    with pytest.raises(UserError, match=r"has its own pooling \(mean\), but model.pooling says lasttoken"):
        load_model(ModelConfig(name_or_path=str(tmp_path / "first"), pooling="lasttoken"))


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(base: Path) -> None:
    model = load_model(ModelConfig(name_or_path=str(base)))
    features = Preprocessing(model)(QUERIES, "query")
    exact, rounded = (Embedder(model, bf16=bf16)(features) for bf16 in (False, True))
    error = (exact - rounded.float()).norm() / exact.norm()
    assert 1e-5 < error < 5e-2
    rounded.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_a_model_without_image_support_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path)
    small = BertConfig(vocab_size=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(small).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no image support \(modalities: text\)"):
        load_model(ModelConfig(name_or_path=str(tmp_path)))


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model folder .*nowhere.*set model\.name_or_path"):
        load_model(ModelConfig(name_or_path=str(tmp_path / "nowhere")))


def test_a_name_is_looked_for_on_the_hub_only_where_it_can_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("./tiny", "a/b/c", "/tiny"):
        with pytest.raises(UserError, match="there is no model folder"):
            load_model(ModelConfig(name_or_path=name))
    # Offline, a hub name is looked for in the cache and not found.
    with pytest.raises(
        UserError, match=r"runs/tiny cannot be loaded: no folder of that name is here, and it is not in "
    ):
        load_model(ModelConfig(name_or_path="runs/tiny"))


def test_a_model_that_was_half_written_is_named(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="half cannot be loaded"):
        load_model(ModelConfig(name_or_path=str(tmp_path / "half")))
    with pytest.raises(UserError, match=r"cannot be loaded \(TypeError.*model\.model_kwargs"):
        load_model(ModelConfig(name_or_path=str(base), model_kwargs={"foo": 1}))


def test_a_query_is_text_whatever_it_looks_like(base: Path, tmp_path: Path) -> None:
    preprocess = Preprocessing(load_model(ModelConfig(name_or_path=str(base), prompts={"query": "Find: "})))
    PAGES[0].save(tmp_path / "page.png")
    queries = [str(tmp_path / "page.png"), "http://localhost:1/a.png", "data:image/png;base64,AAAA", "plain"]
    features = preprocess(queries, "query")
    assert "pixel_values" not in features
    assert features["input_ids"].shape[0] == 4


def test_preprocessing_is_sent_to_workers_without_the_weights(base: Path) -> None:
    model = load_model(ModelConfig(name_or_path=str(base), prompts={"query": "Find: "}, max_pixels=64 * 64))
    here = Preprocessing(model)
    sent = pickle.dumps(here)
    assert len(sent) < sum(parameter.numel() for parameter in model.parameters())
    there = pickle.loads(sent)
    for inputs, side in ((QUERIES, "query"), (PAGES, "document")):
        expected, actual = (to_device(way(inputs, side), torch.device("cpu")) for way in (here, there))
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert torch.equal(value, actual[name]) if isinstance(value, torch.Tensor) else value == actual[name]


@pytest.mark.parametrize("side", ["query", "document"])
def test_a_text_that_names_a_picture_is_not_opened(base: Path, tmp_path: Path, side: str) -> None:
    """On either side: shards come from anywhere, and what they name on this machine is none of their business."""
    picture = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(picture)
    preprocess = Preprocessing(load_model(ModelConfig(name_or_path=str(base))))
    for text in (str(picture), f"file://{picture}", "http://127.0.0.1:1/a.png"):
        assert "pixel_values" not in preprocess([text], side)


def foreign_model(folder: Path, base: Path, marker: Path) -> Path:
    """A model whose last module is code of its own, which leaves a mark when it is run."""
    load_model(ModelConfig(name_or_path=str(base))).save_pretrained(str(folder))
    (folder / "own_module.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from sentence_transformers.models import Normalize\n"
        "class Own(Normalize): pass\n"
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules[-1]["type"] = "own_module.Own"
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_code_of_a_model_runs_only_where_the_run_file_says_so(base: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = foreign_model(tmp_path / "foreign", base, marker)
    with pytest.raises(UserError):
        load_model(ModelConfig(name_or_path=str(folder)))
    assert not marker.exists()
    load_model(ModelConfig(name_or_path=str(folder), trust_remote_code=True))
    assert marker.exists()


class Mark:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_a_pickle_in_a_model_is_not_run(base: Path, tmp_path: Path) -> None:
    """Weights that are no safetensors go through torch's weights_only, which refuses all but tensors."""
    folder, marker = tmp_path / "pickled", tmp_path / "ran"
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "evil": Mark(marker)}, folder / "pytorch_model.bin")
    with pytest.raises((UserError, pickle.UnpicklingError)):
        load_model(ModelConfig(name_or_path=str(folder)))
    assert not marker.exists()


def test_an_export_holds_no_pickle(base: Path, tmp_path: Path) -> None:
    config = ModelConfig(name_or_path=str(base), lora={"r": 2})
    model = load_model(config)
    choose_trainable(model, config, seed=0)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    export_model(config, weights, tmp_path / "export")
    files = [path for path in (tmp_path / "export").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md", ".txt"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
        else:
            path.read_bytes().decode("utf-8")  # a pickle is no text
