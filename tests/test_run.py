"""Whole runs: hard negatives, distractors, evaluations, the best checkpoint, export, report, and what stops them."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tar_makers import STORE, index_of
from tiny_runs import make_inputs, run_config, run_tree

import farnear
from farnear.config import load_config
from farnear.data.loader import load_features
from farnear.data.read import InputReader
from farnear.errors import RunInterruptedError, RunStoppedError, UserError
from farnear.model.embedder import to_device
from farnear.model.pixels import page_tokens
from farnear.parallel.world import World, start_world, stop_world
from farnear.retrieve.encode import encode
from farnear.retrieve.evaluate import build_task, sample_task
from farnear.retrieve.inference import Inference
from farnear.signals import Signals
from farnear.training.bad_steps import Numbers
from farnear.training.loop import train_step
from farnear.training.metrics import cut_after, mean_loss
from farnear.training.opening import open_run
from farnear.training.optim import learning_rate_schedule, steps_of
from farnear.training.run import loop_parts, train_in
from farnear.training.watch import Watch


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (value, 255 - value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, Any]]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("run"))
    write_tar(
        folder / "negatives.tar",
        [
            {
                "__key__": f"n{i}",
                "query.txt": f"query {i}",
                "png": png(i),
                "neg0.png": png(100 + i),
                "neg1.png": png(i + 1),
            }
            for i in range(6)
        ],
    )
    write_tar(folder / "corpus.tar", [{"__key__": f"c{i}", "png": png(200 + i)} for i in range(5)])
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, dict[str, Any]]:
    config = run_config(
        folder,
        "run",
        data={
            "train": [str(folder / "data" / "train-*.tar"), str(folder / "negatives.tar")],
            "eval": str(folder / "data" / "eval-*.tar"),
            "eval_corpus": str(folder / "corpus.tar"),
            "dataloader_num_workers": 1,
        },
        evaluation={"eval_steps": 2, "sample_queries": 4, "sample_pages": 6, "per_device_eval_batch_size": 3},
        training={
            "save_steps": 0,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "lr_scheduler_type": "cosine",
        },
    )
    return folder / "run", farnear.train(config)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder_holds_the_run(finished: tuple[Path, dict[str, Any]]) -> None:
    run, summary = finished
    steps = lines(run / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert [step["epoch"] for step in steps] == [0] * 4 + [1] * 4
    assert {"loss", "lr", "grad_norm", "pairs_per_s", "masked", "tokens", "peak_memory_bytes"} <= steps[0].keys()
    assert steps[0]["seconds"].keys() == {"data", "pass_one", "loss", "pass_two", "optimizer"}
    # Pair i's second negative is pair i + 1's page: where both are in a batch, one column is masked.
    assert sum(step["masked"] for step in steps) > 0
    evaluations = lines(run / "eval.jsonl")
    assert [(e["kind"], e["step"]) for e in evaluations[:-1]] == [("before", 0)] + [("during", s) for s in (2, 4, 6, 8)]
    assert [(e["queries"], e["pages"]) for e in evaluations[:2]] == [(8, 13), (4, 6)]
    assert evaluations[0]["metrics"].keys() == {"64", "16"}
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["ndcg@10_after"] == round(evaluations[-1]["metrics"]["64"]["ndcg@10"], 4)
    assert summary["world_size"] == 1
    assert (run / "report.html").read_text().startswith("<!")
    assert load_config(run / "run.yaml").training.max_steps == -1


def test_the_best_checkpoint_is_kept_and_exported(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    during = {e["step"]: e["metrics"]["64"]["ndcg@10"] for e in lines(run / "eval.jsonl") if e["kind"] == "during"}
    best = max(during, key=lambda step: (during[step], -step))
    assert (run / "best").read_text() == f"step-{best:08d}\n"
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {f"step-{best:08d}", "step-00000008"}
    last = lines(run / "eval.jsonl")[-1]
    assert last["kind"] == "after"
    exported = SentenceTransformer(str(run / "export"), device="cpu")
    assert exported.get_embedding_dimension() == 64


def test_an_export_embeds_as_the_run_measured(folder: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    """The exported folder, through sentence-transformers alone, ranks the corpus as the run's last evaluation did."""
    run, summary = finished
    model = SentenceTransformer(str(run / "export"), device="cpu")
    index = index_of(sorted((folder / "data").glob("eval-*.tar")), corpus=[folder / "corpus.tar"])
    reader = InputReader(index, STORE)
    q_QD = model.encode_query([reader[row] for row in index.query_N], convert_to_tensor=True)
    pages = [reader[row] for row in (*index.positives, *index.corpus_C)]
    score_QP = model.similarity(q_QD, model.encode_document(pages, convert_to_tensor=True))
    rank_Q = (score_QP > score_QP.diagonal()[:, None]).sum(1)
    ndcg = torch.where(rank_Q < 10, 1 / torch.log2(rank_Q + 2.0), 0.0).mean()
    assert float(ndcg) == pytest.approx(summary["ndcg@10_after"], abs=2e-4)


def test_the_corpus_is_every_distinct_page_once(folder: Path) -> None:
    task = build_task(index_of([folder / "negatives.tar"], corpus=[folder / "corpus.tar"]), STORE)
    # Six positives, six first negatives; five second negatives are positives of other pairs.
    assert np.isin(task.page_row_P, task.index.corpus_C).sum() == 5
    assert len(task.page_row_P) == 6 + 6 + 1 + 5
    assert all(len(pages) == 1 for pages in task.relevant)
    sample = sample_task(task, 3, 15)
    assert len(sample.relevant) == 3
    assert sample.pages == 15
    for query, relevant in enumerate(sample.relevant):
        assert {sample.page_row_P[p] for p in relevant} == {task.page_row_P[p] for p in task.relevant[query]}
    assert sample_task(task, 100, 1).pages == 6
    assert sample_task(task, 2, 1).pages == 2


def loss_that_is_not_finite(rank: int, world_size: int, folder: Path) -> None:
    config = run_config(folder, "broken", strategy="ddp")
    world = start_world(config)
    run, _ = open_run(config, None, world)
    parts = loop_parts(run)
    if rank == 1:
        with torch.no_grad():
            next(iter(run.built.model.parameters())).fill_(math.nan)
    batch = next(parts.loader.batches(2, 3))
    with pytest.raises(
        RunStoppedError, match=r"step 3: the loss is not finite, so nothing.*train-000000\.tar/"
    ) as caught:
        parts.bad_steps.judge(train_step(parts, batch), Numbers())
    keys = parts.loader.keys_of_batch(2)
    assert all(key in str(caught.value) for key in keys[:8])
    if rank == 0:
        assert lines(run.folder.bad_steps)[0]["keys"] == keys
    stop_world()


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_the_keys(folder: Path) -> None:
    run_ranks(loss_that_is_not_finite, 2, folder)


def encode_on_ranks(rank: int, world_size: int, folder: Path) -> None:
    """More ranks than one can share evenly, and under ZeRO-3 a rank without a share."""
    config = run_config(folder, "encode", strategy="zero3")
    world = start_world(config)
    run, _ = open_run(config, None, world)
    index, preprocess, tokens = run.data.train, run.built.preprocess, page_tokens(run.built.model)
    run.strategy.train(False)
    told: list[tuple[str, int, int]] = []
    how_far = {"told": lambda *count: told.append(count)}
    by = Inference(run.strategy, world, preprocess, tokens, batch_size=2, num_workers=0, **how_far)
    for pairs in ([4, 0, 7, 2, 9, 1, 3], [5]):
        rows = index.query_N[pairs]
        e_ND = encode(by, index, STORE, "query", rows)
        parts: dict[int, torch.Tensor] = {}
        how = {"batch_size": 1, "page_tokens": tokens, "num_workers": 0}
        with torch.no_grad():
            for places, features in load_features(index, STORE, preprocess, "query", rows, **how):
                parts[int(places[0])] = run.strategy.forward(to_device(features, world.device))
        assert torch.allclose(e_ND, torch.cat([parts[place] for place in range(len(rows))]), atol=1e-5)
    # Of all ranks together, and as often on a rank with fewer.
    assert told == [("queries", 0, 7), ("queries", 6, 7), ("queries", 0, 1)]
    stop_world()


def test_encode_keeps_the_order_whatever_the_shares(folder: Path) -> None:
    run_ranks(encode_on_ranks, 3, folder)


def all_strategies_once(rank: int, world_size: int, folder: Path) -> None:
    world = start_world(run_config(folder, "unused", strategy="zero1"))
    for name, keys in {
        "bf16": {"bf16": True},
        "checkpointing": {"gradient_checkpointing": True},
        "plain": {},
    }.items():
        train_in(world, run_config(folder, f"zero1-{name}", strategy="zero1", training={**keys, "max_steps": 2}))
    train_in(world, run_config(folder, "pure-bf16", strategy="ddp", training={"pure_bf16": True, "max_steps": 2}))
    stop_world()


def test_precision_and_checkpointing_reach_the_training(folder: Path) -> None:
    run_ranks(all_strategies_once, 2, folder)
    loss = {n: lines(folder / n / "metrics.jsonl")[1]["loss"] for n in ("zero1-plain", "zero1-bf16", "pure-bf16")}
    assert lines(folder / "zero1-checkpointing" / "metrics.jsonl")[1]["loss"] == pytest.approx(
        loss["zero1-plain"], rel=1e-5
    )
    assert loss["zero1-bf16"] != loss["zero1-plain"]
    assert loss["zero1-bf16"] == pytest.approx(loss["zero1-plain"], rel=0.05)
    assert loss["pure-bf16"] == pytest.approx(loss["zero1-plain"], rel=0.2)


def test_records_are_cut_back_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "kind": "after"}\n{"step": 3}\n{"st')
    cut_after(path, 2)
    assert lines(path) == [{"step": 1}, {"step": 2}]
    for damage in (b'{"st', b"{}", b"[1]", b"\xff"):
        path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl line 2 is no record of a step"):
            cut_after(path, 2)
        assert path.read_bytes().count(b"\n") == 3


def test_records_stand_once_after_a_second_start_and_a_second_end(folder: Path) -> None:
    keys: dict[str, Any] = {"data": {"eval": str(folder / "data" / "eval-*.tar")}, "training": {"max_steps": 1}}
    for _ in range(2):
        farnear.train(run_config(folder, "twice", **keys))
        shutil.rmtree(folder / "twice" / "checkpoints")
        (folder / "twice" / "summary.json").unlink()
    farnear.train(run_config(folder, "twice", **keys))
    farnear.train(run_config(folder, "twice", **keys), "newest")
    assert [step["step"] for step in lines(folder / "twice" / "metrics.jsonl")] == [1]
    assert [evaluation["kind"] for evaluation in lines(folder / "twice" / "eval.jsonl")] == ["before", "after"]


def test_the_loss_that_is_shown_is_that_of_the_pairs() -> None:
    records = [{"loss": 4.0, "pairs": 8}, {"loss": 2.0, "pairs": 7}, {"loss": 0.0, "pairs": 1}]
    assert mean_loss(records) == pytest.approx((32 + 14) / 16)
    assert mean_loss([]) is mean_loss([{"loss": None, "pairs": 3}]) is None


def test_weights_that_overflowed_are_neither_measured_nor_saved(folder: Path) -> None:
    keys: dict[str, Any] = {"training": {"max_steps": 1, "learning_rate": 1.0, "weight_decay": 0.0}}
    config = run_config(folder, "diverged", **keys)
    world = World(0, 1, torch.device("cpu"))
    run, progress = open_run(config, None, world)
    run.strategy.slices(owned=False)[0].weight_n.fill_(float("inf"))
    with pytest.raises(RunStoppedError, match=r"made model\..* non-finite, so nothing was saved"):
        run.saver.save(run.state, replace(progress, step=1), periodic=True)
        run.saver.finish()
    assert not list((folder / "diverged").glob("checkpoints/*"))
    with pytest.raises(RunStoppedError, match=r"of 22 embeddings \(document\) are not finite"):
        index, tokens = run.data.train, page_tokens(run.built.model)
        by = Inference(run.strategy, world, run.built.preprocess, tokens, batch_size=8, num_workers=0)
        encode(by, index, STORE, "document", index.positives)


def test_a_refused_resume_leaves_the_run_as_it_is(folder: Path) -> None:
    keys: dict[str, Any] = {"data": {"eval": str(folder / "data" / "eval-*.tar")}}
    farnear.train(run_config(folder, "long", **keys, training={"max_steps": 2}))

    def content() -> dict[Path, bytes]:
        files = [
            path
            for path in (folder / "long").rglob("*")
            if path.is_file() and path.name not in ("run.lock", "status.json")
        ]
        return {path: path.read_bytes() for path in files}

    before = content()
    with pytest.raises(UserError, match=r"has taken 2 steps, but the run file asks for 1; raise training\.max_steps"):
        farnear.train(run_config(folder, "long", **keys, training={"max_steps": 1}), "newest")
    other = {"data": {**keys["data"], "tail": "drop"}, "training": {"max_steps": 4}}
    with pytest.raises(UserError, match=r"made with another value of data\.tail"):
        farnear.train(run_config(folder, "long", **other), "newest")
    with pytest.raises(UserError, match=r"loss.matryoshka_dims names 4096, 2048, but"):
        farnear.train(run_config(folder, "long", **keys, loss={"matryoshka_dims": [4096, 2048, 64]}), "newest")
    assert content() == before
    status = json.loads((folder / "long" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "loss.matryoshka_dims names 4096, 2048" in status["reason"]


def test_a_best_is_compared_with_its_like_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One query and its page score 1.0 at every step; eight queries do not."""

    def keys(steps: int, sample: int, **training: Any) -> dict[str, Any]:
        return {
            "data": {"eval": str(folder / "data" / "eval-*.tar")},
            "training": {"max_steps": steps, "save_steps": 2, **training},
            "evaluation": {"eval_steps": 2, "sample_queries": sample, "sample_pages": sample},
        }

    run = folder / "compared"
    best = run / "checkpoints" / "step-00000002"
    farnear.train(run_config(folder, "compared", **keys(4, 1)))
    assert (run / "best").read_text() == f"{best.name}\n"
    # The same measure: the best stands, and is looked at before hours are spent.
    weights = next(best.glob("rank-*"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"step-00000002.*bytes, not the"):
        farnear.train(run_config(folder, "compared", **keys(6, 1, load_best_model_at_end=True)), "newest")
    weights.write_bytes(whole)
    farnear.train(run_config(folder, "compared", **keys(6, 1)), "newest")
    assert (run / "best").read_text() == f"{best.name}\n"
    # Another sample.
    capsys.readouterr()
    farnear.train(run_config(folder, "compared", **keys(8, 8)), "newest")
    assert f"{best.name}, was measured otherwise or on other pages" in capsys.readouterr().out
    assert (run / "best").read_text() == "step-00000008\n"
    # Gone.
    for path in run.glob("checkpoints/step-*"):
        if path.name != "step-00000004":
            shutil.rmtree(path)
    farnear.train(run_config(folder, "compared", **keys(6, 1)), "newest")
    assert f"{best.name}, is gone: the best is chosen among" in capsys.readouterr().out
    assert (run / "best").read_text() == "step-00000006\n"


def test_files_have_the_usual_permissions(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    umask = os.umask(0)
    os.umask(umask)
    for path in [*run.glob("export/*.safetensors"), *run.glob("checkpoints/*/*.safetensors")]:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_script_without_a_main_guard_trains_once(folder: Path, tmp_path: Path) -> None:
    """Data workers would run an unguarded script again."""
    tree = run_tree(folder, "unguarded", data={"dataloader_num_workers": 1}, training={"max_steps": 1})
    script = tmp_path / "script.py"
    script.write_text(
        f"import farnear\nfrom farnear.config import parse_config\nfarnear.train(parse_config({tree!r}))\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=120, capture_output=True)
    assert len(lines(folder / "unguarded" / "metrics.jsonl")) == 1


def test_the_learning_rate_follows_transformers(folder: Path) -> None:
    def rates(**training: Any) -> list[float]:
        schedule = learning_rate_schedule(
            run_config(folder, "x", training={"learning_rate": 1.0, **training}).training, 10
        )
        return [round(schedule(step), 4) for step in range(10)]

    assert rates() == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates(warmup_steps=2)[:4] == [0.0, 0.5, 1.0, 0.875]
    assert rates(warmup_steps=0.2) == rates(warmup_steps=2) == rates(warmup_ratio=0.2)
    assert rates(warmup_steps=2, warmup_ratio=0.5) == rates(warmup_steps=2)
    cosine = rates(lr_scheduler_type="cosine", warmup_ratio=0.2)
    assert cosine[2] == 1.0
    assert cosine[6] == 0.5
    assert steps_of(0.25, 10) == 3
    assert steps_of(4, 10) == 4
    assert steps_of(0, 10) is steps_of(None, 10) is None


def test_the_best_so_far_is_exported_and_a_failure_is_noted(folder: Path) -> None:
    def broken(parts: Any, batch: Any) -> dict[str, Any]:
        if batch.step == 4:
            raise ZeroDivisionError("in step 5")
        return train_step(parts, batch)

    config = run_config(
        folder,
        "breaks",
        data={"eval": str(folder / "data" / "eval-*.tar")},
        evaluation={"eval_steps": 2, "eval_on_start": False},
        training={"save_steps": 0},
    )
    with patch("farnear.training.loop.train_step", broken), pytest.raises(ZeroDivisionError):
        farnear.train(config)
    run = folder / "breaks"
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"] == "rank 0: ZeroDivisionError: in step 5"
    best = (run / "best").read_text().strip()
    assert status["checkpoint"] == "step-00000004" or best == "step-00000002"
    exported = dict(SentenceTransformer(str(run / "export"), device="cpu").named_parameters())
    saved = load_file(run / "checkpoints" / best / "rank-00000.0.safetensors")
    for name, weight in exported.items():
        assert torch.equal(weight.flatten(), saved[f"weight/0/model.{name}"]), name
    # It goes on, and the evaluations are those of a run that nothing has broken.
    farnear.train(config, "auto")
    steps = [line["step"] for line in lines(run / "eval.jsonl") if line["kind"] == "during"]
    assert steps == [2, 4, 6]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_an_evaluation_that_was_broken_off_is_made_up_for_once(folder: Path) -> None:
    """A signal comes in the evaluation of step 2, then a kill after it was made up for, before the next save."""
    keys: dict[str, Any] = {
        "data": {"eval": str(folder / "data" / "eval-*.tar")},
        "evaluation": {"eval_steps": 2, "eval_on_start": False},
        "training": {"save_steps": 4},
    }
    farnear.train(run_config(folder, "even", **keys))
    config, run = run_config(folder, "broken-off", **keys), folder / "broken-off"
    alone, signals = World(0, 1, torch.device("cpu")), Signals()

    def at(watch: Watch, phase: str, **places: Any) -> None:
        real_at(watch, phase, **places)
        if phase == "evaluation":
            signals.first = signal.SIGTERM

    real_at = Watch.at
    with (
        patch.object(Watch, "at", at),
        pytest.raises(RunInterruptedError, match=r"SIGTERM at rank 0 after step 2, saved in step-00000002; .*--resume"),
    ):
        train_in(alone, config, None, signals)
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert not (run / "eval.jsonl").exists()

    def killed(parts: Any, batch: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    with patch("farnear.training.loop.train_step", killed), pytest.raises(ZeroDivisionError):
        train_in(alone, config, "newest")
    assert len(lines(run / "eval.jsonl")) == 1
    train_in(alone, config, "newest")
    untimed = [[{**line, "seconds": 0} for line in lines(one / "eval.jsonl")] for one in (run, folder / "even")]
    assert untimed[0] == untimed[1]
    assert (run / "best").read_text() == (folder / "even" / "best").read_text()


def stopped_after(step: int) -> Any:
    """What ends a training before a step as a kill would, but for the process."""

    def train_one(parts: Any, batch: Any) -> dict[str, Any]:
        if batch.step == step:
            raise ZeroDivisionError
        return train_step(parts, batch)

    return patch("farnear.training.loop.train_step", train_one)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_best_checkpoint_that_is_damaged_does_not_block_a_run(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best is step 2, damaged: before a resume, which looks at it, and while the run goes on."""
    config = run_config(
        folder,
        f"best-{damage}",
        data={"eval": str(folder / "data" / "eval-*.tar")},
        evaluation={"eval_steps": 2, "sample_queries": 1, "sample_pages": 1, "eval_on_start": False},
        training={"save_steps": 1, "load_best_model_at_end": True},
    )
    run, alone = folder / f"best-{damage}", World(0, 1, torch.device("cpu"))

    def harm() -> None:
        path = run / "checkpoints" / (run / "best").read_text().strip() / "rank-00000.0.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "flip" else data[:-1])

    with stopped_after(3), pytest.raises(ZeroDivisionError):
        train_in(alone, config)
    assert (run / "best").read_text() == "step-00000002\n"
    harm()
    with pytest.raises(UserError, match=r"step-00000002/rank-00000\.0\.safetensors .*; say --resume auto to go on"):
        train_in(alone, config, "newest")
    with stopped_after(5), pytest.raises(ZeroDivisionError):
        train_in(alone, config, "auto")
    assert "the best checkpoint so far, step-00000002, is damaged" in capsys.readouterr().out
    assert (run / "best").read_text() == "step-00000004\n"

    def train_last(parts: Any, batch: Any) -> dict[str, Any]:
        harm()
        return train_step(parts, batch)

    with patch("farnear.training.loop.train_step", train_last):
        train_in(alone, config, "auto")
    assert "the last model is measured and exported in place of the best" in capsys.readouterr().out
    exported = dict(SentenceTransformer(str(run / "export"), device="cpu").named_parameters())
    saved = load_file(run / "checkpoints" / "step-00000006" / "rank-00000.0.safetensors")
    assert all(torch.equal(weight.flatten(), saved[f"weight/0/model.{name}"]) for name, weight in exported.items())


def test_records_are_cut_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    before = path.stat().st_ino
    cut_after(path, 3)
    assert path.stat().st_ino == before
    with patch("os.replace", side_effect=OSError("no room")), pytest.raises(OSError, match="no room"):
        cut_after(path, 1)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    cut_after(path, 1)
    assert [line["step"] for line in lines(path)] == [1]
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fallback_leaves_no_name_of_what_is_set_aside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(
        folder,
        "falls-back",
        data={"eval": str(folder / "data" / "eval-*.tar")},
        evaluation={"eval_steps": 3, "eval_on_start": False},
        training={"save_steps": 1, "max_steps": 4},
    )
    run, alone = folder / "falls-back", World(0, 1, torch.device("cpu"))
    with stopped_after(3), pytest.raises(ZeroDivisionError):
        train_in(alone, config)
    assert (run / "best").read_text() == (run / "latest").read_text() == "step-00000003\n"
    (run / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    with stopped_after(2), pytest.raises(ZeroDivisionError):
        train_in(alone, config, "auto")
    assert (run / "latest").read_text() == "step-00000002\n"
    assert not (run / "best").exists()
    assert (run / "checkpoints" / "step-00000003.damaged").is_dir()
    assert "going back before it, it stays as" in capsys.readouterr().out
    train_in(alone, config, "auto")
    assert (run / "best").read_text() == "step-00000003\n"
    assert (run / "checkpoints" / "step-00000003").is_dir()
