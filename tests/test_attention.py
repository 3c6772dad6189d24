"""Attention by name: what a choice needs, that nothing is downloaded in its place, and `varlen` against the others."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import WriteRunFile
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny_runs import make_inputs, run_config
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn as installed_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen3_vl import modeling_qwen3_vl

import farnear
from farnear.config import load_config
from farnear.errors import UserError
from farnear.model import attention, attention_choice
from farnear.model.attention import by_kernel, one_by_one, packing_of, varlen_attention
from farnear.model.attention_choice import check_attention
from farnear.model.embedder import Preprocessing
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PAGES = [
    Image.new("RGB", size, colour) for size, colour in (((64, 96), "red"), ((160, 32), "blue"), ((96, 96), "grey"))
]
QUERIES = ["revenue", "Which page shows the red bar chart of revenue and costs in 2019?", "costs of 2021"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads of queries for each of keys and values, as large models have."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "base", hidden_size=64, num_layers=2)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["text_config"]["num_key_value_heads"] = 1
    path.write_text(json.dumps(settings))
    # The stored keys and values are of two heads: take the first.
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "language_model" in name and ("k_proj" in name or "v_proj" in name):
            weights[name] = weights[name][:32].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(base: Path, name: str | None) -> SentenceTransformer:
    return load_model(ModelConfig(name_or_path=str(base), attn_implementation=name))


def embed(model: SentenceTransformer, inputs: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings of one mini-batch and the gradients that they give."""
    model.train()
    model.zero_grad()
    side = "query" if isinstance(inputs[0], str) else "document"
    features = model.preprocess([{"text": one} if isinstance(one, str) else one for one in inputs], task=side)
    e_nD = model(features)["sentence_embedding"]
    generator = torch.Generator().manual_seed(1)
    (e_nD * torch.randn(e_nD.shape, generator=generator)).sum().backward()
    return e_nD.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    difference = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return (difference / sum(float(gradient.square().sum()) for gradient in first.values())) ** 0.5


@pytest.mark.parametrize("inputs", [PAGES, QUERIES, PAGES[:1], QUERIES[:1]], ids=["pages", "queries", "page", "query"])
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_varlen_computes_what_the_others_do(base: Path, inputs: list[Any], other: str) -> None:
    wanted, wanted_gradient = embed(load(base, other), inputs)
    packed, gradient = embed(load(base, "varlen"), inputs)
    assert torch.allclose(wanted, packed, atol=1e-5)
    assert differ(wanted_gradient, gradient) < 1e-5


def calls_of(model: SentenceTransformer, inputs: list[Any]) -> list[tuple[int, list[int], bool]]:
    """What `attend` is asked for: tokens, lengths of the sequences, and whether it is causal."""
    calls = []

    def attend(q_THD: Tensor, *rest: Any, causal: bool, scale: float) -> Tensor:
        calls.append((len(q_THD), rest[2].diff().tolist(), causal))
        assert rest[3] == max(calls[-1][1])
        return one_by_one(q_THD, *rest[:3], causal=causal, scale=scale)

    with patch.object(attention, "attend", attend):
        model(model.preprocess(inputs))
    return calls


def test_a_tower_attends_to_all_images_in_one_call_and_the_language_model_to_no_padding(base: Path) -> None:
    model = load(base, "varlen")
    features = model.preprocess(PAGES)
    tokens = features["attention_mask"].sum(1).tolist()
    assert features["attention_mask"].numel() > sum(tokens)
    patches = features["image_grid_thw"].prod(1).tolist()
    in_tower, in_language_model = (sum(patches), patches, False), (sum(tokens), tokens, True)
    assert calls_of(model, PAGES) == 2 * [in_tower] + 2 * [in_language_model]
    # Rows of one length are not packed, and need not be.
    assert calls_of(model, 2 * [PAGES[0]])[-1] == (2 * tokens[0], 2 * [tokens[0]], True)


def test_the_tower_is_not_told_of_images_by_another_name(base: Path) -> None:
    """What the second name is for: should transformers pass them by any name one day, it can go."""
    model = load(base, "varlen")
    model[0].model.visual.config._attn_implementation = "varlen"
    assert len(calls_of(model, PAGES)) == 2 * len(PAGES) + 2
    assert not modeling_qwen3_vl.is_flash_attention_requested(model[0].model.language_model.config)


def test_texts_are_still_padded_by_sentence_transformers(base: Path) -> None:
    """It packs texts itself under flash attention, from `unpad_inputs`; that is left to it, and off here."""
    model = load(base, "varlen")
    assert model[0].can_flatten_inputs is False
    assert model[0].unpad_inputs is None
    features = Preprocessing(model)(QUERIES, "query")
    assert features["attention_mask"].shape == features["input_ids"].shape


def random_heads(*lengths: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_that_the_caller_has_packed_do_not_see_each_other(causal: bool) -> None:
    q, k, v, start = random_heads(3, 1, 5)
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    kwargs: dict[str, Any] = {"cu_seq_lens_q": start, "max_length_q": torch.tensor(5), "is_causal": causal}
    together, _ = varlen_attention(nn.Module(), *batch, None, scaling=0.3, **kwargs)
    for begin, end in ((0, 3), (3, 4), (4, 9)):
        alone = scaled_dot_product_attention(
            *(x[:, :, begin:end] for x in batch), is_causal=causal, scale=0.3, enable_gqa=True
        )
        assert torch.allclose(together[:, begin:end], alone.transpose(1, 2), atol=1e-6)


def test_a_batch_is_packed_from_its_mask_whichever_side_is_padded() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    packing = packing_of(kv_length=4, attention_mask=mask)
    assert packing is not None
    assert packing.place_T.tolist() == [1, 2, 3, 4]
    assert packing.start_S1.tolist() == [0, 3, 4]
    assert packing.start_S1.dtype == torch.int32
    assert packing.longest == 3
    assert packing_of(kv_length=4, attention_mask=mask[1:2, :1]) is packing_of(kv_length=4) is None


def new_signature(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa
        assert window_size in ((-1, -1), (-1, 0))
        return kernel(query, key, value, cu_seq_q, cu_seq_k, causal=window_size == (-1, 0), scale=scale)

    return varlen_attn


def old_signature(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        is_causal: bool = False, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        assert query.shape == key.shape == value.shape
        return kernel(query, key, value, cu_seq_q, cu_seq_k, causal=is_causal, scale=scale)

    return varlen_attn


@pytest.mark.parametrize("signature", [old_signature, new_signature])
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_is_called_as_its_version_of_torch_has_it(
    signature: Callable[..., Callable[..., Tensor]], causal: bool
) -> None:
    q, k, v, start = random_heads(3, 1, 5)

    def kernel(query: Tensor, key: Tensor, value: Tensor, start_q: Tensor, start_k: Tensor, **options: Any) -> Tensor:
        assert start_q is start_k
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        return one_by_one(query, key, value, start_q, **options)

    called = by_kernel(signature(kernel), q, k, v, start, 5, causal=causal, scale=0.3)
    assert torch.allclose(called, one_by_one(q, k, v, start, causal=causal, scale=0.3), atol=1e-6)


def test_the_installed_kernel_knows_what_is_passed_to_it() -> None:
    """It runs on a GPU only; here its arguments are bound."""
    bound = []

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        bound.append(inspect.signature(installed_kernel).bind(*args, **kwargs))
        return args[0]

    kernel.__signature__ = inspect.signature(installed_kernel)  # type: ignore[attr-defined]
    q, k, v, start = random_heads(2, 2)
    by_kernel(kernel, q, k, v, start, 2, causal=True, scale=None)
    assert bound[0].arguments["window_size"] == (-1, 0)
    assert bound[0].arguments["max_q"] == 2


def test_under_autocast_the_kernel_gets_one_type(base: Path) -> None:
    seen = set()

    def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *rest: Any, causal: bool, scale: float) -> Tensor:
        seen.update(x.dtype for x in (q_THD, k_TKD, v_TKD))
        return one_by_one(q_THD, k_TKD, v_TKD, rest[0], causal=causal, scale=scale)

    model = load(base, "varlen")
    with patch.object(attention, "attend", attend), torch.autocast("cpu", torch.bfloat16):
        model(model.preprocess(PAGES))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    "kwargs", [{"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"dropout": 0.1}]
)
def test_what_varlen_cannot_do_is_said(kwargs: dict[str, Any]) -> None:
    q, k, v, _ = random_heads(4)
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    with pytest.raises(UserError, match=rf"varlen cannot do {next(iter(kwargs))}, which this model asks for; set sdpa"):
        varlen_attention(nn.Module(), *batch, None, **kwargs)
    with pytest.raises(UserError, match="cannot do a mask of the model's own"):
        varlen_attention(nn.Module(), *batch, torch.ones(1, 1, 4, 4))
    with pytest.raises(UserError, match="cannot do a mask of the model's own"):
        packing_of(kv_length=4, mask_function=lambda *_: True)
    with pytest.raises(UserError, match="cannot do a cache"):
        varlen_attention(nn.Module(), batch[0][:, :, :1], *batch[1:], None)


def test_dropout_in_the_attention_is_refused_at_loading(tmp_path: Path) -> None:
    dropping = save_tiny_model(tmp_path / "dropping", hidden_size=64, num_layers=1, attention_dropout=0.1)
    with pytest.raises(UserError, match="varlen has no dropout, and the model has some"):
        load(dropping, "varlen")


def test_a_run_with_varlen_trains_as_one_with_sdpa(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path)
    losses = {}
    for name in ("sdpa", "varlen"):
        keys: dict[str, Any] = {"gradient_checkpointing": name == "varlen", "max_steps": 3}
        farnear.train(run_config(folder, name, model={"attn_implementation": name}, training=keys))
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["varlen"] == pytest.approx(losses["sdpa"], rel=1e-4)
    exported = json.loads((folder / "varlen" / "export" / "config.json").read_text())
    assert "varlen" not in json.dumps(exported)


def test_another_name_is_an_error_that_names_the_choices(write_run_file: WriteRunFile) -> None:
    with pytest.raises(UserError, match=r"attn_implementation: .*'eager', 'sdpa'.*'varlen', not 'flash_attn'"):
        load_config(write_run_file(), ["model.attn_implementation=flash_attn"])


def refusal(
    device: torch.device, name: Any, *, half_precision: bool = True, capability: tuple[int, int] = (9, 0)
) -> str:
    config = ModelConfig(name_or_path="x", attn_implementation=name)
    with patch.object(torch.cuda, "get_device_capability", lambda device: capability):
        try:
            check_attention(config, device, half_precision=half_precision)
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)
    return ""


def test_each_choice_says_what_it_needs() -> None:
    for name in (None, "eager", "sdpa", "varlen"):
        assert refusal(CPU, name, half_precision=False) == ""
    for name in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        assert refusal(CPU, name) == (
            f"model.attn_implementation: {name} runs on an NVIDIA GPU only, and this run is on cpu; set sdpa"
        )
    for name in ("flash_attention_2", "varlen"):
        assert refusal(GPU, name) == ""
        assert "needs a GPU of compute capability 8.0, and this one has 7.5" in refusal(GPU, name, capability=(7, 5))
        assert "in half precision only; set training.bf16" in refusal(GPU, name, half_precision=False)
    with patch.object(attention_choice.importlib.util, "find_spec", lambda name: None):
        assert f"needs torch 2.11, and this is {torch.__version__}; install a newer" in refusal(GPU, "varlen")


def test_no_kernel_is_downloaded_in_place_of_a_package(base: Path, tmp_path: Path) -> None:
    def load_flash(allow: bool, kernels: bool, version: int = 2) -> None:
        config = ModelConfig(
            name_or_path=str(base), attn_implementation=f"flash_attention_{version}", allow_kernel_download=allow
        )
        with patch.object(attention_choice, "is_kernels_available", lambda: kernels):
            load_model(config)

    for kernels in (False, True):
        with pytest.raises(
            UserError, match=r"with torch installed: pip install flash-attn --no-build-isolation.*set va"
        ):
            load_flash(allow=False, kernels=kernels)
    with pytest.raises(
        UserError, match=r"flash_attention_3 is not installed here \(it is built from the folder hopper"
    ):
        load_flash(allow=False, kernels=True, version=3)
    with pytest.raises(UserError, match=r"allow_kernel_download needs the package kernels: pip install kernels"):
        load_flash(allow=True, kernels=False)
    # Allowed, it is transformers that is asked, and says what it misses.
    with pytest.raises(UserError, match=r"cannot be loaded \(ImportError: FlashAttention2 has been toggled on"):
        load_flash(allow=True, kernels=True)


def test_no_kernel_comes_in_by_another_way(base: Path, tmp_path: Path) -> None:
    def load_with(**keys: Any) -> None:
        load_model(ModelConfig(**{"name_or_path": str(base), **keys}))

    with pytest.raises(UserError, match=r"write model\.attn_implementation"):
        load_with(model_kwargs={"attn_implementation": "kernels-community/flash-attn2"})
    with pytest.raises(UserError, match=r"model_kwargs\.use_kernels lets transformers download compiled kernels"):
        load_with(model_kwargs={"use_kernels": True})
    shutil.copytree(base, tmp_path / "asking")
    settings = json.loads((base / "config.json").read_text())
    settings["text_config"]["attn_implementation"] = "kernels-community/flash-attn2"
    (tmp_path / "asking" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"asks for the attention kernels-community/flash-attn2, which may come from"):
        load_with(name_or_path=str(tmp_path / "asking"))
    load_with(name_or_path=str(tmp_path / "asking"), attn_implementation="sdpa")
