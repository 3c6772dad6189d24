"""benchmarks/gpu_step.py on a toy: everything in it runs where there is no GPU, so that it does where there is one."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_step
import pytest
import torch
from ranks import run_ranks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    return save_tiny_model(folder, texts=[" ".join(gpu_step.WORDS)], hidden_size=64, num_layers=2)


@pytest.fixture(scope="module")
def bench(base: Path) -> gpu_step.Bench:
    return gpu_step.Bench(base, gpu_step.TINY, "sdpa", CPU)


def test_every_contestant_runs_and_the_figures_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take = gpu_step.Bench.take

    def take_if_it_fits(bench: gpu_step.Bench, contestant: gpu_step.Contestant, *args: Any) -> None:
        # What is the fastest in the trial may still be too large for the whole batch.
        if "72 tokens" in contestant.name or contestant.name == "farnear, 36 tokens, 20 kept":
            raise torch.OutOfMemoryError
        take(bench, contestant, *args)

    monkeypatch.setattr(gpu_step.Bench, "take", take_if_it_fits)
    monkeypatch.setattr(gpu_step.Bench, "graphs_that_fit", lambda *_: 20)
    assert gpu_step.main(["--tiny", "--rounds", "1"]) == 0
    told = capsys.readouterr().out.splitlines()
    figures = json.loads(told[-1])
    of_gpu = {name for name, value in figures.items() if value is None}
    assert of_gpu == {"mfu", "mfu_pass_one", "mfu_pass_two", "mfu_st"}
    assert figures["sentence-transformers"] in {
        "sentence-transformers, 2 inputs",
        "sentence-transformers, 4 inputs",
        "sentence-transformers, 36 tokens",
    }
    assert figures["farnear"] in {"farnear, 36 tokens", "farnear, 36 tokens, 15 kept"}
    for name in ("speedup_vs_st", "loss_share", "pages_per_s", "peak_gb", "accounted_flops"):
        assert math.isfinite(figures[name]) and figures[name] > 0
    assert figures["loss_share"] < 1
    # A row for each contestant.
    assert [line.split(",")[0] for line in told[-4:-1]] == ["sentence-transformers", "farnear", "farnear"]


@pytest.mark.parametrize("options", [[], ["--zero"]])
def test_without_a_gpu_it_says_so(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_step.main(options) == 2
    assert capsys.readouterr().err == (
        "no CUDA GPU is visible here, and a step of 2 B parameters needs one; --tiny runs a toy\n"
    )


def test_without_deepspeed_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_step.importlib.util, "find_spec", lambda name: None)
    assert gpu_step.main(["--tiny", "--zero"]) == 2
    assert capsys.readouterr().err == "--zero needs DeepSpeed, which is not installed here; pip install deepspeed\n"


def test_an_attention_that_cannot_be_computed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_step.main(["--tiny", "--attention", "flash_attention_2"]) == 2
    assert "flash_attention_2 runs on an NVIDIA GPU only" in capsys.readouterr().err


def test_bf16_and_varlen_run_too(base: Path) -> None:
    bench = gpu_step.Bench(base, replace(gpu_step.TINY, bf16=True), "varlen", CPU)
    for contestant in (bench.ours(4, kept=1), bench.theirs(mini_batch_size=4)):
        taken = bench.tried(contestant, 8, 2)
        assert taken is not None
        assert taken.phases[0].keys() == {"pass_one", "loss", "pass_two", "optimizer"}
        assert 0 < sum(taken.phases[0].values()) <= taken.seconds[0]


def test_both_sides_see_the_same_loss(bench: gpu_step.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    gradient = gpu_step.CachedStep.gradient
    monkeypatch.setattr(
        gpu_step.CachedStep, "gradient", lambda *args, **kw: losses.append((got := gradient(*args, **kw)).loss) or got
    )
    forward = gpu_step.MatryoshkaLoss.forward
    monkeypatch.setattr(
        gpu_step.MatryoshkaLoss, "forward", lambda *args: losses.append(float((got := forward(*args)).detach())) or got
    )
    monkeypatch.setattr(bench.optimizer, "step", lambda: None)
    for contestant in (bench.ours(2), bench.theirs(mini_batch_size=2)):
        contestant.step(contestant.batch(8))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_formula_counts_what_torch_counts(bench: gpu_step.Bench) -> None:
    counted = 0.0
    batch = bench.inputs.cut_batch(8, 1)  # each by itself, so that nothing is padded
    for mini_batch in batch.mini_batches:
        assert mini_batch.inputs == 1
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            bench.strategy.forward(gpu_step.to_device(mini_batch.features, CPU))
        counted += counter.get_total_flops()
    assert bench.inputs.forward_flops(bench.model[0].model.config, 8) == pytest.approx(counted, rel=0.02)


def test_the_model_has_the_shape_of_the_real_one(base: Path) -> None:
    toy = load_model(ModelConfig(name_or_path=str(base)))
    with torch.device("meta"):
        towers = AutoModel.from_config(gpu_step.shaped_config(toy, gpu_step.FULL), dtype=torch.float32)
    # What the hub says of Qwen/Qwen3-VL-2B-Instruct, whose head is tied.
    assert sum(parameter.numel() for parameter in towers.parameters()) == 2_127_532_032


def test_graphs_are_kept_from_the_last_as_memory_has_room(
    bench: gpu_step.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini_batches = bench.inputs.cut_batch(16, 4 * bench.tokens_of_a_page).mini_batches
    queries = sum(mini_batch.side == "query" for mini_batch in mini_batches)
    monkeypatch.setattr(bench, "device", torch.device("cuda"))
    monkeypatch.setattr(bench, "_graph_bytes", lambda side, _: {"query": 10, "document": 100}[side])

    def that_fit(free: int) -> int:
        """With so many bytes beside a step that keeps none."""
        total = SimpleNamespace(total_memory=1000 / gpu_step.SHARE_OF_MEMORY)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
        return bench.graphs_that_fit(4, 1000 - free)

    # The place of the page's graph, 100 bytes, is theirs in any case.
    assert that_fit(-100) == 0
    assert that_fit(-100 + 25) == 2
    assert that_fit(-100 + 10 * queries + 99) == queries
    assert that_fit(-100 + 10 * queries + 101) == queries + 1
    assert that_fit(10**6) == len(mini_batches)


def zero_two(rank: int, world_size: int) -> None:
    figures = gpu_step.zero_figures(CPU, print, stages=(2,))
    assert figures["zero"].keys() == {"zero2", "zero2-overlap", "zero2-mini_batch", "zero2-overlap-mini_batch"}
    assert 0 < figures["worst_error"] == max(figures["zero"].values()) <= gpu_step.BOUND_FP32


def test_the_gradient_under_zero_is_compared() -> None:
    run_ranks(zero_two, 1)
