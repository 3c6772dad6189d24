"""How far from the exact gradient is a cached step in fp32, bf16 and fp16, when it adds up more and more mini-batches?

    python benchmarks/precision.py                 8, 64 and 512 mini-batches a rank, about 15 minutes on two cores

Two ranks, mini-batches of one query or one page. The reference is the plain fp32 gradient of the whole batch in one
process, without a cache (`exactness.reference_gradient`), and the error is the norm of the difference over its norm,
all parameters together. Gradients add up in fp32 under every strategy, so the error should not grow with the number of
mini-batches, as it does in DeepSpeed's own bf16 mode, which adds them up in bf16. The figures that were measured are in
`docs/precision.md`. The last line is JSON. Exit code 1 when a bound is broken.
"""

import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from exactness import (
    BOUND_BF16,
    BOUND_FP16,
    BOUND_FP32,
    Case,
    cached_update,
    free_port,
    join_ranks,
    make_batch,
    reference_gradient,
    relative_error,
)

from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
MINI_BATCHES = (8, 64, 512)
BOUNDS = {"fp32": BOUND_FP32, "bf16": BOUND_BF16, "fp16": BOUND_FP16}
WORLD_SIZE = 2


def rank_main(rank: int, port: int, model_path: str, mini_batches: tuple[int, ...], out: str) -> None:
    """One of two processes. Rank 0 writes the results."""
    world, counts = join_ranks(rank, WORLD_SIZE, port)
    rows = []
    for mini_batches_per_rank in mini_batches:
        # A pair is a mini-batch of one page and one of one query.
        case = Case("precision", pairs=WORLD_SIZE * mini_batches_per_rank // 2, mini_batch_size=1)
        batch = make_batch(case, WORLD_SIZE)
        model = load_model(ModelConfig(name_or_path=model_path))
        gradient = reference_gradient(model, case, batch)
        norm = float(torch.stack([g.norm() for g in gradient.values()]).norm())
        lr = float(torch.stack([p.detach().norm() for p in model.parameters()]).norm()) / norm
        wanted = {name: lr * g for name, g in gradient.items()}
        for strategy in STRATEGIES:
            for precision in BOUNDS:
                update, _ = cached_update(strategy, case, model_path, batch, world, counts, lr, 0.0, precision)
                row = {"strategy": strategy, "precision": precision, "mini_batches": mini_batches_per_rank}
                if update:
                    rows.append({**row, "error": relative_error(update, wanted)})
    if rank == 0:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(mini_batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Errors of each strategy and precision at these numbers of mini-batches a rank."""
    with tempfile.TemporaryDirectory() as folder:
        texts = ["red blue bar pie chart revenue costs 2019 2021"]
        model = str(save_tiny_model(Path(folder) / "model", texts=texts, hidden_size=64, num_layers=2))
        out = str(Path(folder) / "errors.json")
        multiprocessing.set_forkserver_preload(["sentence_transformers", "deepspeed", "farnear.training.cache"])
        arguments = (free_port(), model, mini_batches, out)
        mp.start_processes(rank_main, arguments, nprocs=WORLD_SIZE, start_method="forkserver")
        rows: list[dict[str, Any]] = json.loads(Path(out).read_text(encoding="utf-8"))
    return rows


def main() -> int:
    """Run, print, judge."""
    rows = run(MINI_BATCHES)
    error = {(row["precision"], row["strategy"], row["mini_batches"]): row["error"] for row in rows}
    print("type strategy " + " ".join(f"{count:>8}" for count in MINI_BATCHES))
    for precision in BOUNDS:
        for strategy in STRATEGIES:
            figures = " ".join(f"{error[precision, strategy, count]:8.1e}" for count in MINI_BATCHES)
            print(f"{precision:4} {strategy:8} {figures}")
    worst = {
        precision: {count: max(error[precision, strategy, count] for strategy in STRATEGIES) for count in MINI_BATCHES}
        for precision in BOUNDS
    }
    print(json.dumps({"worst_relative_error": worst, "bounds": BOUNDS}))
    return 0 if all(max(worst[precision].values()) <= bound for precision, bound in BOUNDS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
