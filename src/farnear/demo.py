"""`farnear demo`: the whole of farnear in a few minutes on any machine.

It does what a user does with their own pages, with nothing stubbed: shards are written (of drawn pages), a base model
is made (a tiny Qwen3-VL with random weights), a run file is written and launched with several processes, and the result
is a run folder like any other. The evaluation pages show combinations that no training page shows.
"""

import argparse
import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from farnear.errors import UserError
from farnear.launching.local import launch

if TYPE_CHECKING:
    from farnear.data.read import InputReader

TRAIN_PAIRS = 12_800
EVAL_PAIRS = 200
# The folder is the demo's own if this file is in it, and may then be replaced by the next demo.
RUN_FILE = "demo.yaml"


def run_demo(arguments: argparse.Namespace) -> int:
    """Draw, train, measure, and say how to use the result. Returns the exit code.

    Args:
        arguments: out (the run folder, or None), strategy, ranks (or None), seed.

    Raises:
        UserError: The folder holds something else, or the launch met a user's mistake.
    """
    started = time.monotonic()
    out = empty_folder(arguments.out or Path("runs/demo"))
    run_file = out / RUN_FILE
    run_file.write_text(yaml.safe_dump(demo_run(arguments, out), sort_keys=False), encoding="utf-8")
    print(f"drawing {TRAIN_PAIRS} training and {EVAL_PAIRS} evaluation pages", flush=True)
    prepare(out, arguments.seed)
    code = launch(run_file, [])
    if code == 0:
        print(closing_words(out, time.monotonic() - started), flush=True)
    return code


def empty_folder(out: Path) -> Path:
    """The folder, empty; a demo that is in it goes.

    Raises:
        UserError: It holds something else.
    """
    if out.exists():
        if any(out.iterdir()) and not (out / RUN_FILE).exists():
            raise UserError(
                f"{out} holds something that is not a demo, which would be lost; name another folder with --out"
            )
        print(f"replacing the demo in {out}; --out names another folder", flush=True)
        shutil.rmtree(out)
    out.mkdir(parents=True)
    return out


def of_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says in a run file's words."""
    ranks = arguments.ranks or (1 if arguments.strategy == "single" else 2)
    return {"strategy": arguments.strategy, "num_processes": ranks, "seed": arguments.seed}


def demo_run(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The run file, as a user would write it."""
    return {
        "output_dir": str(out),
        **of_arguments(arguments),
        "model": {"name_or_path": str(out / "base")},
        "data": {
            "train": str(out / "data" / "train-*.tar"),
            "eval": str(out / "data" / "eval-*.tar"),
            "dataloader_num_workers": 1,
        },
        "loss": {"matryoshka_dims": [128, 64, 32]},
        "training": {
            "global_batch_size": 128,
            "mini_batch_size": 16,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "save_steps": 0.5,
        },
        "evaluation": {"eval_steps": 0.5, "per_device_eval_batch_size": 50},
    }


def prepare(out: Path, seed: int) -> None:
    """Draw the shards and make the base model, whose tokenizer knows the training queries."""
    # Imported here: torch and transformers take seconds, which `farnear --help` should not.
    from farnear.ingest.synthetic import synthesise
    from farnear.model.tiny import save_tiny_model

    with warnings.catch_warnings():
        # The training combinations come again, drawn anew; the plan keeps equal queries apart.
        warnings.filterwarnings("ignore", message=".*queries repeat")
        train, _ = synthesise(out / "data", train_pairs=TRAIN_PAIRS, eval_pairs=EVAL_PAIRS, seed=seed)
    reader = read_shards(train[:1])
    save_tiny_model(out / "base", texts=[reader[row] for row in reader.index.query_N.tolist()], seed=seed)


def read_shards(shards: Sequence[Path]) -> "InputReader":
    """Reads what some shards hold."""
    from farnear.data.index_cache import ShardSet, SourceShards, cache_folder, cached_index
    from farnear.data.read import InputReader
    from farnear.data.shard_cache import ShardCache
    from farnear.data.shard_store import ShardStore

    cache = cache_folder(None)
    store = ShardStore(ShardCache(cache / "shards"))
    names = tuple(os.path.abspath(shard) for shard in shards)
    return InputReader(cached_index(ShardSet((SourceShards("shards", names),)), cache, store), store)


def closing_words(out: Path, seconds: float) -> str:
    """What was gained, where the model is, and three lines that query it, which work as they stand."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["ndcg@10_by_dim_before"], summary["ndcg@10_by_dim"]
    rows = [f"{dim:>10}  {before[dim]:>6.3f}  {after[dim]:>6.3f}" for dim in sorted(after, key=int, reverse=True)]
    ranks = summary["world_size"]
    how = f"{summary['strategy']}, {ranks} rank{'' if ranks == 1 else 's'}, {seconds:.0f} s"
    query, pages = save_examples(out)
    return "\n".join(
        [
            "",
            f"nDCG@10 on {EVAL_PAIRS} pages never seen ({how})",
            f"{'dimension':>10}  {'before':>6}  {'after':>6}",
            *rows,
            "",
            f"the model is in {summary['export']}; which of three unseen pages answers a query? The first one:",
            "",
            "    from sentence_transformers import SentenceTransformer",
            f"    model = SentenceTransformer({summary['export']!r})",
            f"    print(model.similarity(model.encode_query({query!r}), model.encode_document({pages})))",
        ]
    )


def save_examples(out: Path) -> tuple[str, list[str]]:
    """Write three evaluation pages as images; their paths, and the query that the first one answers."""
    reader = read_shards(sorted((out / "data").glob("eval-*.tar")))
    paths = []
    for pair in range(3):
        path = out / f"page-{pair}.png"
        reader[int(reader.index.positives_of(pair)[0])].save(path)
        paths.append(str(path))
    return reader[int(reader.index.query_N[0])], paths
