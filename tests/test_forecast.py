"""What `farnear plan` says is what runs do, and it says what will go wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forecast as benchmark
import pytest
import torch
import yaml
from ranks import run_ranks
from scaling_table import H100
from tar_makers import write_pairs

import farnear
from farnear.cli import main
from farnear.config import load_config
from farnear.gpus import gpu_by_name
from farnear.launching import memory
from farnear.launching.forecast import PREFETCHED, forecast
from farnear.launching.foresee import foreseen
from farnear.launching.step_time import Machine
from farnear.loss.contrastive import TILE_BYTES
from farnear.model.blueprint import TOKENS_OF_TEMPLATE
from farnear.parallel.replicated import BUCKET_ELEMENTS

EXAMPLE = Path("examples/qwen3-vl-embedding-2b.yaml")
REPOSITORY = Path(__file__).parent.parent
Inputs = Callable[[str], Path]


def machine(gpu: str | None = None, ranks: int = 2, nodes: int = 1, *, is_this: bool = True) -> Machine:
    kind = gpu_by_name(gpu) if gpu else None
    return Machine(kind, ranks, nodes, node_bandwidth=50e9, cores_of_rank=1, is_this=is_this)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("forecast")
    made: set[str] = set()

    def make(model: str) -> Path:
        if model not in made:
            benchmark.make_inputs(folder, model)
            made.add(model)
        return folder

    return make


def train_here(rank: int, world_size: int, run_file: Path) -> None:
    farnear.train(load_config(run_file))


def last_record(run_file: Path, ranks: int) -> dict[str, Any]:
    """Of a run on ranks that are forked, to save their imports."""
    run_ranks(train_here, ranks, run_file)
    lines = (Path(load_config(run_file).output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def test_memory_of_100_million_parameters_under_zero2(inputs: Inputs) -> None:
    run_file = benchmark.write_run_file(inputs("100m"), "100m", "zero2", global_batch_size=4)
    planned = benchmark.planned(run_file, 2).chosen
    record = last_record(run_file, 2)
    assert planned.memory.total_bytes == pytest.approx(record["peak_memory_bytes"], rel=0.2)
    # Most of it is the model's, not Python's.
    assert planned.memory.by_name()["process"] < 0.35 * planned.memory.total_bytes
    assert_network(planned.network.sent, record["collectives"], exact=True)


@pytest.mark.soak
@pytest.mark.parametrize("model", ["tiny", "100m"])
@pytest.mark.parametrize("strategy", benchmark.STRATEGIES)
def test_memory_of_fresh_processes(inputs: Inputs, model: str, strategy: str) -> None:
    row = benchmark.compared(inputs(model), model, strategy, ranks=2)
    assert abs(row.error) < benchmark.BOUND, row
    if model == "100m":
        assert row.error_above_process is not None and abs(row.error_above_process) < benchmark.BOUND, row
    if (model, strategy) != ("tiny", "zero3"):  # whose parameters DeepSpeed does not gather one by one
        assert_network(row.planned.chosen.network.sent, row.collectives, exact=strategy != "zero3")


def assert_network(sent: dict[str, int], collectives: dict[str, dict[str, int]], *, exact: bool) -> None:
    """Ranks also agree on what has a gradient, and sum its norm; ZeRO-3 makes sure of more: less than a thousandth."""
    checks = collectives.pop("checks", {"bytes": 0})["bytes"]
    assert checks < 1e-3 * sum(sent.values())
    assert sent.keys() == collectives.keys()
    for about, counted in collectives.items():
        # What ZeRO-3 fetches ahead in vain is not known exactly.
        close = 1e-3 if exact or about != "parameter_gathers" else 0.1
        assert sent[about] == pytest.approx(counted["bytes"], rel=close), about


def test_what_is_written_twice_is_the_same() -> None:
    """Launching imports nothing that trains, so it has copies of some of its numbers."""
    from farnear.data import budget

    assert memory.TILE_BYTES == TILE_BYTES
    assert memory.BUCKET_ELEMENTS_OF_DDP == BUCKET_ELEMENTS
    assert TOKENS_OF_TEMPLATE == budget._TOKENS_OF_TEMPLATE
    zero3 = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))
    assert zero3["zero_optimization"]["stage3_prefetch_bucket_size"] == PREFETCHED


def test_the_example_on_eight_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["plan", str(EXAMPLE), "--gpu", "h100", "--pairs", "100000"]) == 0
    told = capsys.readouterr().out
    assert "8 x h100" in told
    assert "2,127,532,032 parameters, all trained; embeddings of 2,048" in told
    assert "64 pairs, 8 a rank; negatives a query: 63" in told
    assert "16 of 1 page (367 tokens)" in told
    assert "100,000 pairs, 1,562 steps" in told
    for strategy in ("ddp", "zero1", "zero2", "zero3", "zero3 offload", "fsdp2"):
        assert f"\n{strategy} " in told
    assert "<- chosen" in told and "cheapest that fits" in told
    assert "25.53 GB on the disk" in told
    assert "computed, nothing is measured" in told


def test_memory_of_each_strategy_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 2 B model on 8 GPUs: what each strategy spreads it saves."""
    monkeypatch.chdir(REPOSITORY)
    planned = forecast(load_config(EXAMPLE), EXAMPLE, machine("h100", 8, is_this=False))
    parameters = planned.model.parameters_in_all
    of = {one.name: one.memory for one in planned.strategies}
    assert of["ddp"].by_name()["optimizer"] == 8 * parameters
    assert of["zero2"].by_name()["optimizer"] == 3 * (4 * parameters // 8)
    assert of["zero3 offload"].by_name().keys() & {"weights", "optimizer"} == set()
    assert of["zero3 offload"].host_bytes > of["zero3"].host_bytes
    assert of["ddp"].total_bytes > of["zero2"].total_bytes > of["fsdp2"].total_bytes
    eight = forecast(load_config(EXAMPLE, ["training.mini_batch_size=8"]), EXAMPLE, machine("h100", 8))
    graph = eight.sides["document"].first.graph_bytes
    assert graph == pytest.approx(8 * planned.sides["document"].first.graph_bytes, rel=0.05)
    # The line through one and two pages leads to eight.
    assert planned.sides["document"].backward_bytes(8) == pytest.approx(
        eight.sides["document"].first.backward_bytes, rel=0.05
    )


FORESEEN = [
    ({"loss": {"matryoshka_dims": [128, 64]}}, None, "names 128, but the embeddings of"),
    ({"training": {"global_batch_size": 32}}, None, "the data has 22 pairs, but a global batch of 32 pairs"),
    (
        {"training": {"global_batch_size": 32}, "data": {"tail": "pad"}},
        None,
        "22 training pairs, fewer than training.global_batch_size (32)",
    ),
    ({"training": {"global_batch_size": 2}}, machine(ranks=4), "4 ranks are more than the 2 pairs"),
    ({"strategy": "single"}, machine(ranks=2), "strategy single is one process, and 2 are planned"),
    ({"model": {"max_pixels": 100, "min_pixels": 50}}, None, "less than the 32 x 32 pixels of one token"),
    ({"model": {"max_pixels": 10000}}, None, "pixels at least by the model's processor"),
    ({"model": {"attn_implementation": "flash_attention_3"}}, None, "flash_attention_3 is not installed on this"),
]


@pytest.mark.parametrize(("keys", "where", "error"), FORESEEN)
def test_errors_are_foreseen(inputs: Inputs, tmp_path: Path, keys: dict[str, Any], where: Any, error: str) -> None:
    assert any(error in one for one in errors_of(inputs("tiny"), tmp_path, keys, where or machine()))
    assert errors_of(inputs("tiny"), tmp_path, {}, machine()) == []


def errors_of(folder: Path, tmp_path: Path, keys: dict[str, Any], where: Machine) -> list[str]:
    tree = yaml.safe_load(benchmark.write_run_file(folder, "tiny", "ddp").read_text(encoding="utf-8"))
    for name, value in keys.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    if "min_pixels" not in tree["model"] and tree["model"].get("max_pixels") == 10000:
        settings = tmp_path / "model"
        settings.mkdir(exist_ok=True)
        (settings / "config.json").write_text((folder / "tiny" / "config.json").read_text(encoding="utf-8"))
        (settings / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 20000, "max_pixels": 30000}))
        tree["model"]["name_or_path"] = str(settings)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    errors, _ = foreseen(forecast(load_config(run_file), run_file, where))
    return errors


def test_another_machine_may_have_the_attention(inputs: Inputs, tmp_path: Path) -> None:
    keys = {"model": {"attn_implementation": "flash_attention_3"}}
    assert errors_of(inputs("tiny"), tmp_path, keys, machine("h100", is_this=False)) == []


def test_what_the_shards_cannot_do_is_foreseen(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve pairs in three shards ask for three pages; and a source of four pairs is to fill batches of eight."""
    (tmp_path / "few").mkdir()
    write_pairs(tmp_path / "few", 12, 3, copies_of_page=4)
    errors = errors_of(inputs("tiny"), tmp_path, {"data": {"train": str(tmp_path / "few" / "*.tar")}}, machine())
    assert errors == [
        error for error in errors if "3 distinct pages, fewer than training.global_batch_size (8)" in error
    ]
    assert len(errors) == 1
    assert main(["plan", str(tmp_path / "run.yaml"), "--gpu", "cpu", "--gpus-per-node", "2"]) == 2
    told = capsys.readouterr()
    assert "12 pairs, 2 steps" in told.out
    assert "a batch touches 3.0 of 3 shards" in told.out
    assert told.err.startswith("farnear: error: the training pairs have 3 distinct pages")
    (tmp_path / "small").mkdir()
    write_pairs(tmp_path / "small", 4, 1)
    sources = {
        "drawn": {"train": str(inputs("tiny") / "data" / "train-*.tar")},
        "small": {"train": str(tmp_path / "small" / "*.tar")},
    }
    data = {"train": [], "sources": sources, "mixing": "per_batch"}
    assert any(
        "'small'" in one or "source 2" in one for one in errors_of(inputs("tiny"), tmp_path, {"data": data}, machine())
    )


def test_out_of_memory_is_foreseen_and_a_strategy_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    where = machine("l4", 8, is_this=False)
    errors, notes = foreseen(forecast(load_config(EXAMPLE, ["strategy=ddp"]), EXAMPLE, where))
    assert len(errors) == 1 and "would run out of memory; set strategy=" in errors[0]
    assert any("the shards are not on this machine" in note for note in notes)


def test_without_a_config_it_says_where_to_put_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("output_dir: x\nmodel: {name_or_path: some/Model-2B}\ndata: {train: a.tar}\n", encoding="utf-8")
    assert main(["plan", str(run_file), "--gpu", "h100"]) == 2
    assert f"put it into {tmp_path / 'model-2b'}/config.json" in capsys.readouterr().err


def test_a_model_that_cannot_be_traced_is_estimated(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    from farnear.model.blueprint import EmbedderBlueprint
    from farnear.model.hollow import CannotTraceError

    run_file = benchmark.write_run_file(inputs("100m"), "100m", "ddp")
    traced = benchmark.planned(run_file, 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise CannotTraceError("its code depends on the values of activations")

    monkeypatch.setattr(EmbedderBlueprint, "trace", refuse)
    estimated = benchmark.planned(run_file, 2)
    assert any("could not be followed" in note for note in foreseen(estimated)[1])
    ours, theirs = (one.sides["document"].first for one in (traced, estimated))
    assert 0.3 < theirs.graph_bytes / ours.graph_bytes < 3
    assert 0.5 < theirs.forward_flops / ours.forward_flops < 4


def test_unknown_gpus_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("output_dir: x\nmodel: {name_or_path: m}\ndata: {train: a.tar}\n", encoding="utf-8")
    assert main(["plan", str(run_file), "--gpu", "h1000"]) == 2
    assert "GPU h1000 is not known; the kinds are cpu, h200" in capsys.readouterr().err
    assert torch.cuda.device_count() == 0


def test_a_copy_a_node_keeps_gathers_off_the_slow_network(inputs: Inputs) -> None:
    run_file = benchmark.write_run_file(inputs("tiny"), "tiny", "fsdp2", global_batch_size=16)
    where = machine("h100", 2, nodes=8, is_this=False)
    everywhere, in_node = (
        forecast(load_config(run_file, [f"shard_within={within}"]), run_file, where).chosen
        for within in ("world", "node")
    )
    assert in_node.network.travelling < everywhere.network.travelling / 3
    assert in_node.time.network < everywhere.time.network
    # It is paid for in memory: half of the moments in place of a sixteenth.
    moments = [one.memory.by_moment()["optimizer"]["update"] for one in (everywhere, in_node)]
    assert moments[1] == pytest.approx(8 * moments[0], rel=1e-4)


def test_links_between_nodes_are_those_of_the_scaling_table() -> None:
    one, two = (machine("h100", ranks=8, nodes=nodes) for nodes in (1, 2))
    assert (one.ring_bandwidth, two.ring_bandwidth) == (H100.inside, H100.between)
    assert two.bandwidth_over_nodes == H100.between / 8


def test_the_chosen_strategy_is_the_cheapest_of_equals() -> None:
    """On one GPU ddp is what single is."""
    run_file = Path("examples/router.yaml")
    planned = forecast(load_config(run_file), run_file, machine("l4", 1, is_this=False))
    assert [one.name for one in planned.strategies] == ["single", "zero3 offload", "ddp"]
    assert planned.cheapest is planned.chosen and planned.chosen.name == "ddp"


def test_limits_of_pages_that_nobody_reads_are_told() -> None:
    notes = [
        foreseen(forecast(load_config(run_file, ["model.max_pixels=65536"]), run_file, machine("l4", 1)))[1]
        for run_file in (Path("examples/router.yaml"), EXAMPLE)
    ]
    told = "the model makes all pages one size, whatever model.max_pixels says"
    assert [told in of_run for of_run in notes] == [True, False]


@pytest.mark.parametrize(
    ("example", "words", "gpu"),
    [
        ("qwen3-vl-embedding-2b", ["training.mini_batch_num_tokens=null", "training.mini_batch_size=64"], "a100-40"),
        ("qwen3-vl-reranker-2b", ["strategy=zero3"], "a100-40"),
        ("qwen3-vl-reranker-2b", ["strategy=ddp"], "a100-40"),
        # Fewer pairs alone would not do: its pages have to be fewer too.
        ("qwen3-vl-reranker-2b", ["strategy=zero2"], "a100-40"),
    ],
)
def test_what_would_fit_is_said_and_does(example: str, words: list[str], gpu: str) -> None:
    """And twice as much of the main side does not."""
    run_file = Path(f"examples/{example}.yaml")

    def errors(*more: str) -> list[str]:
        config = load_config(run_file, [*words, *more])
        return foreseen(forecast(config, run_file, machine(gpu, 8, is_this=False)))[0]

    [told] = errors()
    strategy = re.search(r"strategy=(\w+)", told)
    found = re.search(r"training\.mini_batch_size=\{(\w+): (\d+), (\w+): (\d+)\}", told)
    assert found is not None, told
    assert (strategy is not None) == ("strategy=ddp" in words) == ("whatever the mini-batch" in told)
    more = [found[0], *([strategy[0]] if strategy else [])]
    assert not errors(*more)
    main, size = (3, 4) if found[3] == "pair" else (1, 2)
    assert errors(*more, f"training.mini_batch_size={{{found[main]}: {2 * int(found[size])}}}")
