"""Runs with a gallery of drawn pages: one made on the spot, and a short training."""

import json
import warnings
from pathlib import Path

import numpy as np
from report_makers import step_line, write_run
from tar_makers import STORE, index_of

import farnear
from farnear.config import parse_config
from farnear.demo import read_shards
from farnear.ingest.synthetic import synthesise
from farnear.retrieve.evaluate import build_task
from farnear.retrieve.gallery import write_gallery
from farnear.retrieve.measure import measure
from farnear.retrieve.rankings import rankings_of

DIMS = {128: 1.0, 64: 0.95, 32: 0.85}
"""Share of the measures at the full dimension that is said of each."""


def drawn_run(folder: Path, queries: int = 80, steps: int = 60) -> Path:
    """A run over drawn pages that has gone well: at random before, and after with most of the right pages in front."""
    shards = synthesise(folder / "data", train_pairs=1, eval_pairs=queries, seed=0)[1]
    task = build_task(index_of(shards), STORE)
    generator = np.random.default_rng(0)
    before = np.stack([generator.permutation(task.pages) for _ in task.relevant])
    after = np.stack([generator.permutation(task.pages) for _ in task.relevant])
    for query, relevant in enumerate(task.relevant):
        # The right page changes places with one in front; for every tenth query that was so before, and is no more.
        page_P = (before if query % 10 == 3 else after)[query]
        place = min(int(generator.geometric(0.7)) - 1, task.pages - 1)
        old = int(np.flatnonzero(page_P == min(relevant))[0])
        page_P[[place, old]] = page_P[[old, place]]
    score_QP = np.sort(generator.random(after.shape), axis=1)[:, ::-1].astype(np.float32)
    evaluations = []
    for kind, step, page_QP in (("before", 0, before), ("after", steps, after)):
        write_gallery(folder / "run" / "gallery", task, rankings_of(page_QP, score_QP, task.relevant), kind, step)
        measures = measure(page_QP[:, :10], task.relevant)
        by_dim = {str(dim): {name: value * share for name, value in measures.items()} for dim, share in DIMS.items()}
        evaluations.append({"step": step, "kind": kind, "queries": queries, "pages": task.pages, "metrics": by_dim})
    lines = [
        step_line(step, padding_share=0.1 + step / 1000, quarantined=int(step == 7)) for step in range(1, steps + 1)
    ]
    run = write_run(folder / "run", lines, evaluations)
    mined = {"step": 30, "pairs": 1000, "negatives": 4000, "pairs_with_fewer": 3, "seconds": 12.5}
    (run / "mined.jsonl").write_text(json.dumps(mined) + "\n")
    status = {"state": "finished", "time": "2026-11-22T01:00:00Z"}
    (run / "status.json").write_text(json.dumps(status))
    return run


def trained_run(folder: Path, steps: int = 50) -> Path:
    """A run of the demo's model and pages, cut short: enough to have learned something, in a minute."""
    from farnear.model.tiny import save_tiny_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*queries repeat")
        train, _ = synthesise(folder / "data", train_pairs=128 * steps, eval_pairs=200, seed=0)
    reader = read_shards(train[:1])
    texts = [reader[row] for row in reader.index.query_N.tolist()]
    save_tiny_model(folder / "base", texts=texts, seed=0)
    tree = {
        "output_dir": str(folder / "demo"),
        "strategy": "single",
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "data" / "train-*.tar"), "eval": str(folder / "data" / "eval-*.tar")},
        "loss": {"matryoshka_dims": [128, 64, 32]},
        "training": {
            "global_batch_size": 128,
            "mini_batch_size": 16,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
        },
        "evaluation": {"eval_steps": 10, "per_device_eval_batch_size": 50},
    }
    farnear.train(parse_config(tree))
    return folder / "demo"
