"""Resume: bit for bit at the same world size and strategy, and the same state at any other.

Each test starts one group of processes and trains several times in it: the whole run, then from copies of its run
folder cut back to an earlier checkpoint. The run has three steps an epoch, so step 2 is inside an epoch and step 3 at
its edge.
"""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoints import change_manifest
from exactness import parameters_split
from faults import state_of as state
from ranks import run_ranks
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import cut_back, losses, make_inputs, run_config

from farnear.export_folder import whole_export
from farnear.parallel.strategy import LossScale
from farnear.parallel.world import World, start_world, stop_world
from farnear.training.checkpoint import open_checkpoint
from farnear.training.exporting import export_checkpoint
from farnear.training.opening import open_run
from farnear.training.restoring import load_state
from farnear.training.run import train_in

ALONE = World(0, 1, torch.device("cpu"))
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# Inside of an epoch and at its edge, in the next one, and once more in the epoch in which the last resume was: the name
# of the run, the step from which it goes on, and which run's checkpoint that is.
RESUMES = (("inside", 2, "whole"), ("edge", 3, "whole"), ("later", 4, "whole"), ("twice", 5, "later"))
ELASTIC_BOUND = 1e-5
"""Relative difference of a loss from the uninterrupted run's, five steps and more on other ranks; 1.3e-6 measured."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("resume"))


def train_and_resume(rank: int, world_size: int, folder: Path) -> None:
    world = start_world(run_config(folder, "unused", strategy="zero2"))
    for strategy in STRATEGIES:
        with parameters_split(strategy):
            whole = run_config(folder, f"{strategy}-whole", strategy=strategy, data={"dataloader_num_workers": 1})
            train_in(world, whole)
            for name, step, source in RESUMES:
                if rank == 0:
                    cut_back(folder / f"{strategy}-{source}", step, f"{strategy}-{name}")
                dist.barrier()
                resume = "auto" if step % 2 else "newest"
                train_in(world, run_config(folder, f"{strategy}-{name}", strategy=strategy), resume)
    stop_world()


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    run_ranks(train_and_resume, 2, folder)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_is_bit_for_bit_the_uninterrupted_run(trained: Path, strategy: str) -> None:
    whole = losses(trained / f"{strategy}-whole")
    assert [step for step, _, _ in whole] == [1, 2, 3, 4, 5, 6]
    for name, _, _ in RESUMES:
        assert losses(trained / f"{strategy}-{name}") == whole
        resumed = state(trained / f"{strategy}-{name}" / "checkpoints" / "step-00000006")
        uninterrupted = state(trained / f"{strategy}-whole" / "checkpoints" / "step-00000006")
        assert resumed.keys() == uninterrupted.keys()
        assert all(np.array_equal(resumed[key], uninterrupted[key]) for key in resumed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_any_strategy_is_exported_in_one_process(trained: Path, tmp_path: Path, strategy: str) -> None:
    run = trained / f"{strategy}-whole"
    export_checkpoint(run, tmp_path / "export")
    wanted = whole_export(run / "export")
    assert whole_export(tmp_path / "export") == wanted
    assert all((tmp_path / "export" / name).read_bytes() == (run / "export" / name).read_bytes() for name in wanted)


def load_and_save_again(rank: int, world_size: int, folder: Path, name: str, strategy: str) -> None:
    """Continue from the newest checkpoint of a run, train nothing, and save what was loaded beside it."""
    config = run_config(folder, name, strategy=strategy)
    world = start_world(config)
    with parameters_split(strategy):
        run, progress = open_run(config, "newest", world)
    if rank == 0:
        shutil.rmtree(folder / name / "checkpoints")
    dist.barrier()
    run.saver.save(run.state, progress, periodic=True)
    run.saver.finish()
    stop_world()


def test_another_world_size_or_strategy_loads_the_same_bits(trained: Path) -> None:
    name = "elastic"
    checkpoints = cut_back(trained / "zero2-whole", 2, name) / "checkpoints"
    saved = state(checkpoints / "step-00000002")
    assert {key.split("/")[0] for key in saved} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(np.abs(moment).sum() > 0 for key, moment in saved.items() if key.startswith("exp_avg/"))
    for world_size, strategy in ((1, "ddp"), (3, "fsdp2"), (3, "zero3"), (2, "fsdp2"), (2, "zero2")):
        run_ranks(load_and_save_again, world_size, trained, name, strategy)
        loaded = state(checkpoints / "step-00000002")
        assert loaded.keys() == saved.keys()
        assert all(np.array_equal(loaded[key], saved[key]) for key in saved), (world_size, strategy)
        found = open_checkpoint(checkpoints / "step-00000002")
        assert found.progress.step == 2
        assert found.manifest.world_size == world_size
        assert {facts.step for facts in found.manifest.parameters.values()} == {2}


def go_on(rank: int, world_size: int, folder: Path, name: str, strategy: str, resume: Any) -> None:
    training = {"max_steps": 9, "lr_scheduler_type": "constant_with_warmup"}
    config = run_config(folder, name, strategy=strategy, training=training)
    world = start_world(config)
    with parameters_split(strategy):
        train_in(world, config, resume)
    stop_world()


def test_on_other_ranks_and_strategies_the_losses_stay_near(trained: Path) -> None:
    """2 -> 1 -> 3 -> 2 ranks, each under another strategy, against the run that stayed on 2."""
    run_ranks(go_on, 2, trained, "stays", "zero1", None)
    whole, before = losses(trained / "stays"), "stays"
    chain = ((2, 1, "ddp"), (3, 3, "fsdp2"), (4, 2, "zero3"), (6, 3, "zero2"))
    for step, world_size, strategy in chain:
        name = f"from-{step}"
        cut_back(trained / before, step, name)
        run_ranks(go_on, world_size, trained, name, strategy, "newest")
        found = losses(trained / name)
        assert [one[0] for one in found] == list(range(1, 10))
        difference = max(abs(ours[1] / wanted[1] - 1) for ours, wanted in zip(found, whole, strict=True))
        assert 0 < difference < ELASTIC_BOUND, (name, difference)
        before = name


def return_to_the_best(rank: int, world_size: int, folder: Path) -> None:
    """The sample is one query and its page, so the first evaluation, at step 2, is never beaten."""
    world = start_world(run_config(folder, "unused", strategy="zero2"))
    for strategy in STRATEGIES:
        config = run_config(
            folder,
            f"{strategy}-best",
            strategy=strategy,
            data={"eval": str(folder / "data" / "eval-*.tar")},
            training={"load_best_model_at_end": True, "max_steps": 4, "save_steps": 0},
            evaluation={"eval_steps": 2, "sample_queries": 1, "sample_pages": 1},
        )
        with parameters_split(strategy):
            train_in(world, config)
            run, _ = open_run(config, "newest", world)
            if rank == 0:
                cut_back(folder / f"{strategy}-best", 2, f"{strategy}-fresh")
            dist.barrier()
            fresh, progress = open_run(run_config(folder, f"{strategy}-fresh", strategy=strategy), "newest", world)
        assert progress.step == 2
        features = run.built.preprocess(["Which page shows the red bar chart?"], "query")
        # Twice: from its second forward on ZeRO-3 keeps small parameters gathered.
        last = [run.strategy.forward(features) for _ in range(2)][1]
        load_state(open_checkpoint(run.folder.checkpoints / "step-00000002"), run.state, world)
        best = run.strategy.forward(features)
        assert torch.equal(best, fresh.strategy.forward(features)), strategy
        assert not torch.equal(best, last), strategy
    stop_world()


@pytest.fixture(scope="module")
def best(trained: Path) -> Path:
    run_ranks(return_to_the_best, 2, trained)
    return trained


def test_the_best_weights_are_computed_with_and_exported(best: Path) -> None:
    for strategy in STRATEGIES:
        run = best / f"{strategy}-best"
        assert (run / "best").read_text() == "step-00000002\n"
        exported = dict(SentenceTransformer(str(run / "export"), device="cpu").named_parameters())
        saved = state(run / "checkpoints" / "step-00000002")
        weights = {
            key.removeprefix("weight/model."): value for key, value in saved.items() if key.startswith("weight/")
        }
        assert weights.keys() == exported.keys()
        assert all(np.array_equal(exported[name].detach().numpy().ravel(), weights[name]) for name in weights)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tracker_is_told_what_the_run_folder_holds(best: Path, strategy: str) -> None:
    run = best / f"{strategy}-best"
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == [
        (step, loss) for step, loss, _ in losses(run)
    ]
    assert [(event.step, event.value) for event in events.Scalars("eval/64/ndcg@10")] == [(2, 1.0), (4, 1.0)]
    assert [event.step for event in events.Scalars("eval_all/64/ndcg@10")] == [0, 4]


def test_fp16_goes_on_at_its_loss_scale(folder: Path) -> None:
    def run_to(steps: int, name: str) -> list[dict[str, Any]]:
        training = {"fp16": True, "max_steps": steps, "save_steps": 1}
        train_in(ALONE, run_config(folder, name, training=training), "auto")
        return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]

    run_to(2, "fp16")
    checkpoint = folder / "fp16" / "checkpoints" / "step-00000002"
    saved = open_checkpoint(checkpoint).progress.loss_scale
    assert saved is not None
    assert saved["good_steps"] + saved["skipped"] == 2
    assert saved["scale"] == 2.0 ** (16 - saved["skipped"])
    # A scale that no run would come to by itself, one good step before it grows.
    one_step_before = {"scale": 3.0, "good_steps": 1999, "skipped": 7}
    change_manifest(checkpoint, lambda manifest: manifest["progress"].update(loss_scale=one_step_before))
    lines = run_to(3, "fp16")
    assert [line["skipped"] for line in lines][2:] == [7]
    assert lines[2]["loss_scale"] == 6.0
    assert lines[2]["grad_norm"] > 0


def test_a_step_that_fp16_leaves_out_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = {"fp16": True, "max_steps": 1, "logging_steps": 1}
    huge = LossScale(2.0**120)
    with patch("farnear.parallel.loss_scale.LossScale", lambda *fields: LossScale(*fields) if fields else huge):
        summary = train_in(ALONE, run_config(folder, "overflows", training=training))
    assert "grad norm too large for fp16, step skipped  " in capsys.readouterr().out
    assert summary["skipped"] == 1
    summary = train_in(ALONE, run_config(folder, "fp32", training={"max_steps": 1}))
    assert "skipped" not in summary


@pytest.mark.parametrize("eval_on_start", [True, False])
def test_what_is_told_of_the_evaluations_is_what_is_evaluated(
    folder: Path, capsys: pytest.CaptureFixture[str], eval_on_start: bool
) -> None:
    name = f"evaluates-{eval_on_start}"
    data, evaluation = {"eval": str(folder / "data" / "eval-*.tar")}, {"eval_on_start": eval_on_start}
    train_in(ALONE, run_config(folder, name, data=data, evaluation=evaluation, training={"max_steps": 1}))
    kinds = [json.loads(line)["kind"] for line in (folder / name / "eval.jsonl").read_text().splitlines()]
    told = "at start and end" if eval_on_start else "pages at the end"
    assert f"{told}; not in between" in capsys.readouterr().out
    assert kinds == (["before", "after"] if eval_on_start else ["after"])
