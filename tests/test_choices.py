"""What a run chooses by itself: within its memory, the same on resume, and never against the run file."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from tiny_runs import make_inputs, run_config

import farnear
from farnear.errors import UserError
from farnear.ingest.shards import Pair, write_shards
from farnear.model.features import FeatureMerger
from farnear.model.tiny import save_tiny_model
from farnear.parallel.world import World
from farnear.sections import TrainingConfig
from farnear.training.checkpoint import open_checkpoint
from farnear.training.choices import Choices, _saved_for_backward
from farnear.training.opening import open_run

ALONE = World(0, 1, torch.device("cpu"))
AUTO: dict[str, Any] = {"mini_batch_size": None, "mini_batch_num_tokens": "auto", "keep_graphs": "auto"}
GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("choices"))


def choices_with(folder: Path, free_bytes: int, **training: Any) -> Choices:
    """What a run would choose on a machine with so much memory, where larger mini-batches are always faster."""
    config = run_config(folder, "unused", training={**AUTO, **training})
    with (
        patch("farnear.training.choices.psutil.virtual_memory") as memory,
        patch("farnear.training.choices._WORTHWHILE_GAIN", -9.0),
    ):
        memory.return_value.available = free_bytes
        run, _ = open_run(config, None, ALONE)
    return run.choices


def test_a_graph_is_measured_by_what_the_backward_pass_needs() -> None:
    layer, x = torch.nn.Linear(100, 50), torch.randn(8, 100)
    with _saved_for_backward() as held:
        y = layer(x).relu().relu()
    # The layer's input and what either relu gave; not the weight.
    assert sum(held.values()) == 4 * (8 * 100 + 2 * 8 * 50)
    assert y.requires_grad


def test_more_memory_means_larger_mini_batches_and_more_graphs(folder: Path) -> None:
    small, large = choices_with(folder, 16_000_000), choices_with(folder, 64 * GIB)
    tokens = [choices.mini_batch_num_tokens["document"] for choices in (small, large)]
    assert tokens[0] is not None and tokens[1] is not None and tokens[0] < tokens[1]
    assert small.keep_graphs < large.keep_graphs == 1.0
    # A mini-batch never holds more than the rank has in a step.
    assert tokens[1] <= 8 * (4 + 16)


def test_without_memory_to_spare_everything_still_goes_one_by_one(folder: Path) -> None:
    choices = choices_with(folder, 0)
    assert choices.keep_graphs == 0.0
    assert choices.mini_batch_num_tokens["document"] == 4 + 16  # one page of 64 x 64 and the template


def test_the_run_file_goes_before_what_is_measured(folder: Path) -> None:
    training = {"mini_batch_num_tokens": {"document": 77, "query": "auto"}, "keep_graphs": 0.25}
    choices = choices_with(folder, 64 * GIB, **training)
    assert choices.mini_batch_num_tokens["document"] == 77 and choices.keep_graphs == 0.25
    assert choices.mini_batch_num_tokens["query"] not in (None, 77)


def test_with_dropout_nothing_goes_through_pass_one_together(folder: Path) -> None:
    assert choices_with(folder, 0, no_grad_mini_batch_factor=3).together == 3
    dropping = save_tiny_model(folder / "dropping", hidden_size=64, num_layers=2, attention_dropout=0.1)
    config = run_config(folder, "unused", model={"name_or_path": str(dropping)})
    run, _ = open_run(config, None, ALONE)
    assert run.choices.together == 1


def test_a_model_that_is_not_the_same_together_goes_one_by_one(folder: Path) -> None:
    right_way = FeatureMerger.__call__
    with patch.object(FeatureMerger, "__call__", lambda self, features_m: right_way(self, features_m[::-1])):
        assert choices_with(folder, 0).together == 1


def test_a_resumed_run_does_as_before_on_a_machine_with_other_memory(folder: Path) -> None:
    first = run_config(folder, "run", training={**AUTO, "max_steps": 2, "num_train_epochs": 1})
    with patch("farnear.training.choices._WORTHWHILE_GAIN", -9.0):
        farnear.train(first)
    saved = open_checkpoint(folder / "run" / "checkpoints" / "step-00000002").progress.choices
    assert saved["mini_batch_num_tokens"]["document"] > 20
    longer = run_config(folder, "run", training=AUTO)
    with patch("farnear.training.choices.psutil.virtual_memory") as memory:
        memory.return_value.available = 0
        farnear.train(longer, "newest")
    after = open_checkpoint(folder / "run" / "checkpoints" / "step-00000006").progress.choices
    assert after == saved == json.loads(json.dumps(saved))
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(step["kept_graphs"] > 0 for step in steps)


def test_what_the_run_file_asks_for_now_goes_before_what_was_saved_for_something_else(folder: Path) -> None:
    asked = {"mini_batch_size": 3, "no_grad_mini_batch_factor": 1, "keep_graphs": 0.0, "frozen_cache_gb": 0}
    model = {"freeze": ["visual"]}
    farnear.train(run_config(folder, "asked", model=model, training={**asked, "max_steps": 1}))
    again = {"mini_batch_size": 3, "no_grad_mini_batch_factor": 3, "keep_graphs": 0.25, "frozen_cache_gb": "auto"}
    run, _ = open_run(run_config(folder, "asked", model=model, training=again), "newest", ALONE)
    assert run.choices.together == 3 and run.choices.keep_graphs == 0.25 and run.choices.frozen_bytes > 0
    run, _ = open_run(
        run_config(folder, "asked", model=model, training={**asked, "keep_graphs": "auto"}), "newest", ALONE
    )
    assert run.choices.keep_graphs > 0


def test_a_page_that_the_processor_refuses_is_not_the_one_to_try(folder: Path, tmp_path: Path) -> None:
    def page(width: int, height: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(stream, "PNG")
        return stream.getvalue()

    sizes = [(64, 64)] * 6 + [(96, 64), (900, 2)]
    pairs = (Pair(f"k{n}", f"query {n}", page(*size), "png", document=str(n)) for n, size in enumerate(sizes))
    write_shards(pairs, tmp_path / "shards", prefix="train", pairs_per_shard=8)
    data = {"train": str(tmp_path / "shards" / "train-*.tar"), "max_bad_fraction": 1}
    for number, training in enumerate((AUTO, {"mini_batch_size": 3})):
        config = run_config(folder, f"thin-{number}", data=data, training={**training, "max_steps": 1})
        farnear.train(config)
        output_dir = Path(config.output_dir)
        assert [json.loads(line)["key"] for line in (output_dir / "quarantine.jsonl").read_text().splitlines()] == [
            "k7"
        ]
        choices = open_checkpoint(output_dir / "checkpoints" / "step-00000001").progress.choices
        # The largest that can be used has 6 tokens, the one that cannot counts as hundreds.
        assert (choices["mini_batch_num_tokens"]["document"] or 0) <= 8 * (6 + 16)


def test_outputs_of_frozen_parts_have_a_budget(folder: Path) -> None:
    model = {"freeze": ["visual"]}
    kept = open_run(run_config(folder, "unused", model=model, training={"frozen_cache_gb": 0.5}), None, ALONE)[0]
    assert kept.choices.frozen_bytes == 500_000_000
    assert kept.built.frozen.budget_bytes == 500_000_000
    off = open_run(run_config(folder, "unused", model=model, training={"frozen_cache_gb": 0}), None, ALONE)[0]
    assert off.built.frozen.budget_bytes == 0
    assert asdict(off.choices)["frozen_bytes"] == 0


@pytest.mark.parametrize(
    ("training", "sizes", "tokens"),
    [
        ({}, {"document": 8, "query": 8}, {"document": None, "query": None}),
        ({"mini_batch_size": 3}, {"document": 3, "query": 3}, {"document": None, "query": None}),
        ({"mini_batch_num_tokens": 99}, {"document": None, "query": None}, {"document": 99, "query": 99}),
        ({"mini_batch_num_tokens": {"document": 99}}, {"document": None, "query": 8}, {"document": 99, "query": None}),
        (
            {"mini_batch_num_tokens": 99, "mini_batch_size": {"query": 64}},
            {"document": None, "query": 64},
            {"document": 99, "query": 99},
        ),
    ],
)
def test_bounds_of_a_mini_batch(training: dict[str, Any], sizes: dict[str, Any], tokens: dict[str, Any]) -> None:
    config = TrainingConfig.model_validate(training)
    assert {side: config.mini_batch_size_of[side] for side in sizes} == sizes
    assert {side: config.mini_batch_num_tokens_of[side] for side in tokens} == tokens


@pytest.mark.parametrize(
    "training",
    [{"keep_graphs": 1.5}, {"keep_graphs": "some"}, {"mini_batch_size": {"pages": 3}}, {"mini_batch_size": 0}],
)
def test_what_bounds_nothing_is_refused(folder: Path, training: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(training))) as caught:
        run_config(folder, "unused", training=training)
    assert ";" not in str(caught.value)  # one complaint, not one a type
