"""What a plan knows of Routers, dual encoders and rerankers is what their runs have: parameters, graphs, network."""

from pathlib import Path
from typing import Any

import forecast as benchmark
import pytest
import torch
import transformers
import yaml
from pair_makers import YES_NO, make_bases, page
from sentence_transformers import CrossEncoder
from test_forecast import assert_network, last_record, machine
from tiny_runs import make_inputs, run_tree
from tiny_towers import save_tiny_clap, save_tiny_clip, save_tiny_siglip, save_tiny_text_encoder
from torch import nn

from farnear.cli import main
from farnear.config import RunConfig, load_config, parse_config
from farnear.data.index_cache import cache_folder, cached_index
from farnear.data.list_dealing import ListDealing, ListShare
from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.run_order import plan_settings
from farnear.data.run_shards import shard_sets, shard_store
from farnear.errors import UserError
from farnear.launching.forecast import Forecast, forecast
from farnear.launching.foresee import foreseen
from farnear.model.blueprint import EmbedderBlueprint
from farnear.model.blueprint_reranker import RerankerBlueprint
from farnear.model.embedder import Embedder, Preprocessing, to_device
from farnear.model.hollow import CannotTraceError
from farnear.model.image_features import images_apart
from farnear.model.load import load_model
from farnear.model.load_reranker import load_plain_reranker, load_reranker
from farnear.model.pairs import PairPicker, PairPreprocessing, pick_images
from farnear.model.pixels import page_tokens
from farnear.model.reranker import Reranker
from farnear.model.tiny import save_tiny_model
from farnear.model.towers import leave_out_unreached
from farnear.model.trainable import checkpoint_activations, choose_trainable
from farnear.training.choices import _saved_for_backward

RUN_FILE = Path("run.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("shapes"))
    for name, save in (
        ("text", save_tiny_text_encoder),
        ("clip", save_tiny_clip),
        ("siglip", save_tiny_siglip),
        ("clap", save_tiny_clap),
    ):
        save(folder / name)
    # So wide that what ranks agree on beside counts for nothing.
    save_tiny_text_encoder(folder / "wide-text", hidden_size=64)
    save_tiny_siglip(folder / "wide-siglip", hidden_size=96)
    save_tiny_text_encoder(folder / "raw", as_sentence_transformer=False)
    return make_bases(folder)


def config_of(folder: Path, model: dict[str, Any], **keys: Any) -> RunConfig:
    """Names in ``model`` are of the folder's models."""
    if "router" in model:
        model = {**model, "router": {name: str(folder / tower) for name, tower in model["router"].items()}}
    else:
        model = {**model, "name_or_path": str(folder / model["name_or_path"])}
    return parse_config({"output_dir": "unused", "model": model, "data": {"train": "unused.tar"}, **keys})


def elements(model: nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (p.numel(), p.requires_grad) for name, p in model.named_parameters()}


JOINED = {"text": "text", "image": "siglip"}
MODELS: list[dict[str, Any]] = [
    {"name_or_path": "clip"},
    {"name_or_path": "siglip"},
    {"name_or_path": "clap"},
    {"router": JOINED},
    {"router": JOINED, "freeze": ["sub_modules.image", "sub_modules.text.0"]},
    {"router": {"text": "raw", "image": "clip"}},
    {"router": {"text": "text", "image": "siglip", "audio": "clap"}},
    {"router": {"query": "text", "document": "clip"}},
    {"router": {"text": "siglip", "image": "tied"}},
]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_parameters_of_joined_models_are_those_of_the_run(folder: Path, model: dict[str, Any]) -> None:
    """By their names, so that patterns of model.freeze mean the same; what no input reaches is in neither."""
    config = config_of(folder, model)
    real = load_model(config.model)
    choose_trainable(real, config.model, seed=0)
    leave_out_unreached(real)
    blueprint = EmbedderBlueprint(config, RUN_FILE)
    assert elements(blueprint) == elements(real)
    assert blueprint.parameters_in_all == sum(p.numel() for p in real.parameters())
    assert blueprint.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert blueprint.width == real.get_embedding_dimension()


def test_a_stored_router_is_that_which_was_joined(folder: Path, tmp_path: Path) -> None:
    for router in (JOINED, {"query": "text", "document": "siglip"}):
        config = config_of(folder, {"router": router})
        load_model(config.model).save_pretrained(str(tmp_path / "stored"))
        stored = config_of(tmp_path, {"name_or_path": "stored"})
        real = load_model(stored.model)
        choose_trainable(real, stored.model, seed=0)
        leave_out_unreached(real)
        assert elements(EmbedderBlueprint(stored, RUN_FILE)) == elements(real)
    routes = tmp_path / "stored" / "router_config.json"
    routes.write_text(routes.read_text().replace("Transformer", "StaticEmbedding", 1))
    with pytest.raises(UserError, match="is no model that a config"):
        EmbedderBlueprint(stored, RUN_FILE)


def test_a_joined_model_that_is_not_described_is_named(folder: Path, tmp_path: Path) -> None:
    """A config.json beside the run file may be any model's."""
    (tmp_path / "config.json").write_bytes((folder / "siglip" / "config.json").read_bytes())
    config = parse_config(
        {
            "output_dir": "unused",
            "model": {"router": {"text": "some/Encoder", "image": str(folder / "siglip")}},
            "data": {"train": "unused.tar"},
        }
    )
    with pytest.raises(UserError, match=r"^model\.router\.text: .* correct model\.router\.text,") as caught:
        EmbedderBlueprint(config, tmp_path / "run.yaml")
    assert f"put it into {tmp_path / 'encoder'}/config.json" in str(caught.value)


INPUTS: dict[str, list[Any]] = {
    "document": [page(64, 96, seed=1), page(96, 64, seed=2)],
    "query": ["which page is it?", "what page is this"],
}


@pytest.mark.parametrize("model", [{"name_or_path": "clip"}, {"name_or_path": "siglip"}, {"router": JOINED}], ids=str)
@pytest.mark.parametrize("training", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_graphs_of_towers_are_as_large_as_the_real_ones(
    folder: Path, model: dict[str, Any], training: dict[str, Any]
) -> None:
    config = config_of(folder, model, training=training)
    real = load_model(config.model)
    choose_trainable(real, config.model, seed=0)
    if config.training.gradient_checkpointing:
        checkpoint_activations(real)
    preprocess = Preprocessing(real)
    embedder = Embedder(real.train(), bf16=config.training.bf16)
    blueprint = EmbedderBlueprint(config, RUN_FILE)
    tokens = int(page_tokens(real)(*(torch.tensor([64]).numpy(),) * 2)[0])
    assert tokens == blueprint.pages.most_tokens == 16
    for side, inputs in INPUTS.items():
        features = to_device(preprocess(inputs, side), torch.device("cpu"))
        with _saved_for_backward() as saved:
            embedder(features)
        length = features["input_ids"].shape[1] if side == "query" else 0
        traced = blueprint.trace(2, text_tokens=length, visual_tokens=tokens if side == "document" else 0)
        # Places of tokens are a buffer of the model, which is there anyway.
        for buffer in real.buffers():
            saved.pop(buffer.untyped_storage().data_ptr(), None)
        # A normalisation of the text encoder's own is in no config.json: two embeddings and their lengths.
        unknown = 2 * (32 + 2) * 4 if "router" in model and side == "query" else 0
        assert traced.graph_bytes + traced.cast_bytes + unknown == sum(saved.values()), side


@pytest.mark.parametrize("head", [None, "linear", "yes_no_linear"])
@pytest.mark.parametrize("base", ["tied", "untied"])
def test_a_planned_reranker_is_that_of_the_run(folder: Path, base: str, head: str | None) -> None:
    """Its parameters, and the graphs of its two halves."""
    config = config_of(folder, {"name_or_path": base}, reranker={"head": head})
    assert config.reranker is not None
    real = load_reranker(config.model, config.reranker)
    choose_trainable(real, config.model, seed=0)
    blueprint = RerankerBlueprint(config, config.reranker, RUN_FILE)
    assert elements(blueprint) == elements(real)
    assert blueprint.sees_apart
    assert_halves(real, blueprint)


@pytest.mark.parametrize(
    ("model", "reranker"),
    [({"lora": {"r": 4}}, {}), ({"lora": {"r": 4}}, {"head": "linear"}), ({"freeze": ["language_model"]}, {})],
    ids=str,
)
def test_what_a_reranker_trains_is_counted(folder: Path, model: dict[str, Any], reranker: dict[str, Any]) -> None:
    config = config_of(folder, {"name_or_path": "untied", **model}, reranker=reranker, training={"bf16": True})
    assert config.reranker is not None
    real = load_reranker(config.model, config.reranker)
    choose_trainable(real, config.model, seed=0)
    blueprint = RerankerBlueprint(config, config.reranker, RUN_FILE)
    assert elements(blueprint) == elements(real)
    # Frozen linear layers are stored in bf16 under ddp.
    assert blueprint.trained < blueprint.parameters_in_all and blueprint.weight_bytes < 4 * blueprint.parameters_in_all


def assert_halves(real: CrossEncoder, blueprint: RerankerBlueprint) -> None:
    preprocess, pick, module = PairPreprocessing(real, shares_images=True), PairPicker(real), Reranker(real, bf16=False)
    real.train()
    job = preprocess([("a query", page(64, 96, seed)) for seed in range(2)])
    pixels = to_device(pick_images([job], [(0, 0), (0, 1)]), torch.device("cpu"))
    with _saved_for_backward() as saved:
        seen = module(pixels)
    visual = len(seen) // 2
    assert blueprint.trace_pages(2, visual_tokens=visual).graph_bytes == sum(saved.values())
    assert blueprint.feature_width == seen.shape[1]
    features, _ = pick([job], [(0, 0), (0, 1)])
    leaves = tuple(one.detach().requires_grad_() for one in images_apart(seen, pixels["image_grid_thw"]))
    with _saved_for_backward() as saved:
        module({**features, "image_features": leaves})
    text = features["input_ids"].shape[1] - visual
    traced = blueprint.trace_pairs(2, text_tokens=text, visual_tokens=visual, of_features=True, tower_trains=True)
    assert traced.graph_bytes == pytest.approx(sum(saved.values()), rel=1e-3)
    # Where the tower cannot be run apart.
    with _saved_for_backward() as saved:
        module({**features, **pixels})
    whole = blueprint.trace_pairs(2, text_tokens=text, visual_tokens=visual, of_features=False, tower_trains=True)
    assert whole.graph_bytes == pytest.approx(sum(saved.values()), rel=1e-3)
    assert whole.graph_bytes > traced.graph_bytes


def test_a_reranker_of_its_own_keeps_its_head(folder: Path, tmp_path: Path) -> None:
    for head in ("yes_no", "linear"):
        config = config_of(folder, {"name_or_path": "tied"}, reranker={"head": head})
        assert config.reranker is not None
        load_plain_reranker(config.model, config.reranker).save_pretrained(str(tmp_path / head))
        own = config_of(tmp_path, {"name_or_path": head}, reranker={})
        assert own.reranker is not None
        blueprint = RerankerBlueprint(own, own.reranker, RUN_FILE)
        assert blueprint.head == head
        assert elements(blueprint) == elements(load_reranker(own.model, own.reranker))


def planned(run_file: Path, ranks: int = 2) -> Forecast:
    return forecast(load_config(run_file), run_file, machine(ranks=ranks))


def write(folder: Path, name: str, **keys: Any) -> Path:
    tree = run_tree(folder, f"run-{name}", **keys)
    tree["training"] |= {"max_steps": 2, "save_steps": 2}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def run_of(folder: Path, kind: str, strategy: str, **training: Any) -> Path:
    keys: dict[str, Any]
    if kind == "router":
        router = {route: str(folder / f"wide-{name}") for route, name in JOINED.items()}
        keys = {"model": {"name_or_path": "", "router": router}, "loss": {"matryoshka_dims": [16]}}
    else:
        keys = {"model": {"name_or_path": str(folder / "tied")}, "loss": {"matryoshka_dims": None}}
        keys |= {"reranker": {"num_negatives": 2}}
    return write(folder, f"{kind}-{strategy}", strategy=strategy, training=training, **keys)


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
@pytest.mark.parametrize("kind", ["router", "reranker"])
def test_ranks_send_what_was_planned(folder: Path, kind: str, strategy: str) -> None:
    run_file = run_of(folder, kind, strategy)
    record = last_record(run_file, 2)
    assert_network(planned(run_file).chosen.network.sent, record["collectives"], exact=True)


def shares_of(config: RunConfig, ranks: int) -> list[ListShare]:
    """What each rank does in the first step, as a run deals it."""
    cache = cache_folder(config.data.cache_dir)
    store = shard_store(config.data, cache)
    index = cached_index(shard_sets(config.data, store.expand)[0], cache, store)
    assert config.reranker is not None and index.path is not None
    tokens = {side: None if n == "auto" else n for side, n in config.training.mini_batch_num_tokens_of.items()}
    dealings = [
        ListDealing(
            rank=rank,
            world_size=ranks,
            page_tokens=page_tokens(load_reranker(config.model, config.reranker)),
            mini_batch_size=config.training.mini_batch_size_of,
            mini_batch_num_tokens=tokens,
            negatives=Negatives.of_index(index),
            num_hard=config.data.num_negatives,
            num_in_batch=config.reranker.num_negatives,
        )
        for rank in range(ranks)
    ]
    order = Order(index, plan_settings(config), index.path.parent)
    return [dealing.slice_of(order, 0) for dealing in dealings]


@pytest.mark.parametrize(
    ("ranks", "training"),
    [
        (1, {"mini_batch_size": {"pair": 7, "document": 3}}),
        (2, {"mini_batch_size": {"pair": 2, "document": 3}}),
        (2, {"mini_batch_size": None, "mini_batch_num_tokens": {"pair": 250, "document": 50}}),
        (3, {"mini_batch_size": None, "mini_batch_num_tokens": {"pair": 100, "document": 30}}),
    ],
)
def test_lists_are_cut_as_a_run_cuts_them(folder: Path, ranks: int, training: dict[str, Any]) -> None:
    run_file = run_of(folder, "reranker", "ddp", **training)
    shape, shares = planned(run_file, ranks).shape, shares_of(load_config(run_file), ranks)
    assert shape.lists is not None and shape.lists.are_whole == shares[0].whole_lists
    assert shape.lists.are_whole != shape.sides["pair"].in_pass_one
    assert shape.sides["pair"].inputs == max(len(share.list_e) for share in shares)
    assert shape.documents == max(len(set(share.document_e.tolist())) for share in shares)
    assert shape.sides["document"].mini_batches == max(len(share.jobs) for share in shares)
    assert shape.sides["pair"].mini_batch >= max(len(turn) for share in shares for turn in share.turns)
    assert shape.sides["pair"].mini_batches == max(len(share.turns) for share in shares)
    assert shape.feature_bytes > 0 and shape.embedding_bytes == shape.tile_bytes == 0


def test_a_frozen_tower_is_seen_once(folder: Path) -> None:
    run_file = run_of(folder, "reranker", "ddp")
    frozen = forecast(load_config(run_file, ["model.freeze=[visual]"]), run_file, machine())
    trained = planned(run_file)
    assert not frozen.sides["document"].in_pass_two and trained.sides["document"].in_pass_two
    assert frozen.shape.feature_bytes == trained.shape.feature_bytes // 2
    assert frozen.work.flops < trained.work.flops


def test_what_cannot_be_traced_is_estimated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sounds = forecast(config_of(folder, {"name_or_path": "clap"}), RUN_FILE, machine())
    assert any("nothing in it reads pages" in note for note in foreseen(sounds)[1])
    run_file = run_of(folder, "reranker", "ddp")
    traced = planned(run_file)

    def refuse(*_: Any, **__: Any) -> None:
        raise CannotTraceError("its code depends on the values of activations")

    monkeypatch.setattr(RerankerBlueprint, "trace_pages", refuse)
    estimated = planned(run_file)
    assert any("could not be followed" in note for note in foreseen(estimated)[1])
    assert traced.shape.estimated == "" and list(estimated.sides) == ["pair"]
    ours, theirs = (one.sides["pair"].first for one in (traced, estimated))
    assert 0.3 < theirs.graph_bytes / ours.graph_bytes < 3


def test_pages_of_any_size_are_so_many_patches(tmp_path: Path) -> None:
    """SigLIP 2 without a fixed size."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.Siglip2Config(
        text_config={**small, "vocab_size": 300, "projection_size": 32},
        vision_config={**small, "num_patches": 64, "patch_size": 8},
    ).save_pretrained(tmp_path / "naflex")
    blueprint = EmbedderBlueprint(config_of(tmp_path, {"name_or_path": "naflex"}), RUN_FILE)
    assert blueprint.pages.most_tokens == 64
    traced = blueprint.trace(2, text_tokens=16, visual_tokens=64, together=4)
    assert traced.trains and traced.graph_bytes > 2 * 64 * 32 * 4


def test_what_a_plan_of_a_reranker_says(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farnear.launching.hardware.os.sched_getaffinity", lambda _: {0, 1})
    run_file = run_of(folder, "reranker", "zero2", mini_batch_size={"pair": 6, "document": 2})
    assert main(["plan", str(run_file), "--gpu", "l4", "--gpus-per-node", "2"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "scores by the head yes_no" in told and "listwise over lists of 3" in told
    assert "8 lists, 4 a rank; a list: its positive, 0 hard negatives and 2 of the batch; 12 pairs of 6 pages" in told
    assert "3 of 2 pages (20 tokens) through the tower and 2 of 6 pairs" in told and "whole lists, one pass" in told
    assert "image features" in told and "loss tiles" not in told and "InfoNCE" not in told
    assert "12 (all)" in told and "lists/s" in told


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["router", "reranker"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_memory_of_fresh_processes(tmp_path: Path, kind: str, strategy: str) -> None:
    """About 100 million parameters, as in `test_forecast`."""
    make_inputs(tmp_path)
    if kind == "router":
        save_tiny_text_encoder(tmp_path / "wide-text", hidden_size=1280)
        save_tiny_siglip(tmp_path / "wide-siglip", hidden_size=1792)
    else:
        save_tiny_model(tmp_path / "tied", texts=YES_NO, **benchmark.SHAPES["100m"])
    run_file = run_of(tmp_path, kind, strategy)
    plan = planned(run_file)
    assert 8e7 < plan.model.parameters_in_all < 1.6e8
    record = benchmark.measured(run_file, 2)
    memory, process = plan.chosen.memory, plan.chosen.memory.by_name()["process"]
    error = memory.total_bytes / record["peak_memory_bytes"] - 1
    above = (memory.total_bytes - process) / (record["peak_memory_bytes"] - process) - 1
    print(f"{kind} {strategy}: {memory.total_bytes / 1e6:.0f} MB, {error:.1%}, above the process {above:.1%}")
    assert abs(error) < benchmark.BOUND and abs(above) < benchmark.BOUND
    assert_network(plan.chosen.network.sent, record["collectives"], exact=True)
