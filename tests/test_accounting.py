"""What a step tells about itself: its collectives by what they are about, tokens, padding, FLOPs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_runs import make_inputs, run_config

from farnear.parallel.traffic import Traffic, count_in
from farnear.parallel.world import start_world, stop_world
from farnear.training.metrics import model_flops_utilisation
from farnear.training.run import train_in

STRATEGIES = ("ddp", "zero2", "fsdp2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("accounting"))


def train_under_each(rank: int, world_size: int, folder: Path) -> None:
    # Joined once: a rank that is early for a second time would meet the first one's store, still at the same port.
    world = start_world(run_config(folder, "unused", strategy="zero2"))
    for strategy in STRATEGIES:
        # Short of a batch at the end of the epoch; more dimensions than a loss would do a collective for.
        loss = {"matryoshka_dims": [64, 48, 32, 16]}
        config = run_config(folder, strategy, strategy=strategy, loss=loss, training={"num_train_epochs": 1})
        train_in(world, config)
    stop_world()


@pytest.fixture(scope="module")
def steps(folder: Path) -> dict[str, list[dict[str, Any]]]:
    run_ranks(train_under_each, 2, folder)
    return {
        strategy: [json.loads(line) for line in (folder / strategy / "metrics.jsonl").read_text().splitlines()]
        for strategy in STRATEGIES
    }


def test_a_step_exchanges_three_times_and_reduces_once(steps: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    gradient_bytes = 4 * sum(
        torch.Size(facts["shape"]).numel()
        for facts in json.loads((folder / "ddp" / "checkpoints" / "step-00000003" / "manifest.json").read_text())[
            "parameters"
        ].values()
    )
    for strategy in STRATEGIES:
        for step in steps[strategy]:
            told = step["collectives"]
            assert told["exchange"]["calls"] == 3
            assert told["reductions"]["bytes"] == pytest.approx(gradient_bytes, rel=0.01)
    assert all(step["collectives"]["reductions"]["calls"] == 1 for step in steps["ddp"])
    assert all("parameter_gathers" not in step["collectives"] for step in steps["ddp"])
    # ZeRO-2 gathers its weights after the update; FSDP2 in every forward and backward.
    assert all(step["collectives"]["parameter_gathers"]["bytes"] > gradient_bytes / 3 for step in steps["zero2"])
    assert all(step["collectives"]["parameter_gathers"]["bytes"] > 2 * gradient_bytes / 2 for step in steps["fsdp2"])


def test_tokens_padding_and_flops_are_those_of_all_ranks(steps: dict[str, list[dict[str, Any]]]) -> None:
    first, *_, last = steps["ddp"]
    # 8 pairs, then 6; 4 visual tokens a page, and the same under every strategy.
    assert first["tokens"] > last["tokens"] > 6 * 4
    for strategy in STRATEGIES:
        assert [step["tokens"] for step in steps[strategy]] == [step["tokens"] for step in steps["ddp"]]
    assert 0 <= first["padding_share"] < 0.5
    assert first["model_flops"] > last["model_flops"] > 1e6
    assert first["mfu"] is None
    assert first["seconds"].keys() == {"data", "pass_one", "loss", "pass_two", "optimizer"}


def test_a_device_whose_peak_is_known_has_a_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, seconds = torch.device("cuda"), {"pass_one": 1.0, "pass_two": 3.0, "loss": 9.0}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert model_flops_utilisation(4 * 0.5 * 989e12, seconds, gpu) == pytest.approx(0.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some other card")
    assert model_flops_utilisation(1e15, seconds, gpu) is None


def count_each_kind(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    older, traffic = Traffic(), Traffic()
    count_in(older)
    count_in(traffic)
    x = torch.ones(3)
    dist.all_reduce(x)
    with traffic.exchange():
        dist.all_gather_into_tensor(torch.empty(6), x)
    dist.all_gather([torch.empty(3), torch.empty(3)], tensor=x)
    dist.reduce_scatter_tensor(torch.empty(3), input=torch.ones(6))
    assert traffic.as_plain() == {
        "exchange": {"calls": 1, "bytes": 12},
        "parameter_gathers": {"calls": 1, "bytes": 12},
        "reductions": {"calls": 2, "bytes": 12 + 24},
    }
    dist.broadcast(x, src=0)
    # A rank that is alone in its group talks to nobody.
    alone, _ = (dist.new_group([member]) for member in range(2))
    if rank == 0:
        dist.all_gather([torch.empty(3)], x, group=alone)
    assert traffic.as_plain()["checks"] == {"calls": 1, "bytes": 12}
    # Of two in a ring each sends what it gathers, twice half of what it reduces, half of what it scatters.
    assert traffic.wire_bytes == {"exchange": 12, "parameter_gathers": 12, "reductions": 12 + 12, "checks": 6}
    assert older.as_plain() == {}
    traffic.start()
    assert traffic.as_plain() == {}
    dist.destroy_process_group()


def test_a_collective_is_counted_once_and_by_what_it_is_about() -> None:
    run_ranks(count_each_kind, 2)
