"""What the loss costs: seven Matryoshka dimensions against one, against sentence-transformers, in memory and exchanges.

    python benchmarks/loss.py                   everything, about five minutes on two cores
    python benchmarks/loss.py --rows 1024       smaller, for a look

Timed is the loss stage of a gradient-cached step, from embeddings to the gradient of each embedding: B local rows
against N columns (positives and hard negatives), D = 1,024. sentence-transformers' side is its own
CachedMultipleNegativesRankingLoss inside its MatryoshkaLoss, asked for what its cached step asks for: embeddings in,
gradients out, chunk by chunk, with its best chunk of those tried. All are in one process, taken in turn; the figures
are medians of the rounds' ratios.

`collectives` are counted in two gloo processes, over several batches, tiles and numbers of dimensions. `peak_bytes` is
the most that the process holds above its inputs, sampled from its resident memory, against the formula in
`expected_bytes`. The last line is JSON.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch import Tensor, nn

from farnear.data.batch import RankBatch
from farnear.loss.contrastive import TILE_BYTES, contrastive_gradient, tile_rows
from farnear.loss.false_negatives import BatchFacts
from farnear.parallel.traffic import count_in
from farnear.parallel.world import World
from farnear.sections import LossConfig
from farnear.training.objective import Sizes, embedding_gradient

DIMS = (1024, 768, 512, 384, 256, 128, 64)
CHUNKS = (256, 1024, 2048)


class Passing(nn.Module):
    """A 'model' whose embeddings are its inputs."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features themselves."""
        return dict(features)


def facts_of(rows: int, documents: int) -> BatchFacts:
    """Pairs without duplicates; the documents after the positives are their first, second, ... hard negatives."""
    return BatchFacts(
        query_hash_B=torch.arange(rows) + 10**12,
        pair_valid_B=torch.ones(rows, dtype=torch.bool),
        answers_Bm=torch.arange(rows)[:, None],
        positive_B=torch.arange(rows),
        page_hash_N=torch.arange(documents),
        owner_N=torch.arange(documents) % rows,
        page_valid_N=torch.ones(documents, dtype=torch.bool),
    )


def ours(q_bD: Tensor, k_ND: Tensor, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """Gradients by farnear."""
    rows = slice(0, len(q_bD))
    weight_b = torch.full((len(q_bD),), 1.0 / len(q_bD))
    facts = facts_of(len(q_bD), len(k_ND))
    outcome = contrastive_gradient(q_bD, k_ND, None, facts, rows, weight_b, loss, scale=loss.scale)
    return outcome.dq_bD, outcome.dk_ND


def theirs(q_bD: Tensor, k_ND: Tensor, dims: tuple[int, ...], chunk: int) -> tuple[Tensor, Tensor]:
    """Gradients by sentence-transformers' cached loss stage."""
    model = SentenceTransformer(modules=[Passing()], device="cpu")
    inner = CachedMultipleNegativesRankingLoss(model, mini_batch_size=chunk)
    # Its MatryoshkaLoss gives a cached loss each prefix in turn, by decorating this very method.
    MatryoshkaLoss(model, inner, list(dims))
    columns = [q_bD, *k_ND.split(len(q_bD))]
    leaves = [x.detach().requires_grad_() for x in columns]
    inner.calculate_loss([[leaf] for leaf in leaves], with_backward=True)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return gradients[0], torch.cat(gradients[1:])


def expected_bytes(loss: LossConfig, rows: int, documents: int, width: int) -> int:
    """The formula: two gradients, the buffers of a tile, and of each row and column a few numbers a dimension."""
    dims = len(loss.matryoshka_dims or (0,))
    gradients = 4 * width * (rows + documents)
    tile = 4 * (dims + 2) * documents * min(rows, tile_rows(loss, documents, rows))
    norms = 2 * 4 * dims * (rows + documents)
    keys = 8 * 8 * (rows + documents)
    return gradients + tile + norms + keys


@contextmanager
def peak_above_start() -> Iterator[list[int]]:
    """The most resident memory of the process above what it had at the start, put into the list at the end."""
    peak: list[int] = []
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's own high-water mark starts anew
    start = psutil.Process().memory_info().rss
    yield peak
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak.append(1024 * int(status.split("VmHWM:")[1].split()[0]) - start)


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    started = perf_counter()
    work()
    return perf_counter() - started


def compare(rows: int, documents: int, rounds: int) -> dict[str, Any]:
    """Contestants in turn; medians of the rounds' ratios."""
    torch.manual_seed(0)
    q_bD, k_ND = torch.randn(rows, DIMS[0]), torch.randn(documents, DIMS[0])
    one, seven = LossConfig(), LossConfig(matryoshka_dims=DIMS)
    for mine, other in zip(
        ours(q_bD[:512], k_ND[:1024], seven), theirs(q_bD[:512], k_ND[:1024], DIMS, 256), strict=True
    ):
        error = float((mine - other).norm() / other.norm())
        if error > 1e-5:
            raise RuntimeError(f"the two losses differ by {error:.1e}: nothing to compare")
    # Its best chunk on an eighth of the rows against all columns: a chunk's work does not depend on how many there are.
    some_bD = q_bD[: max(max(CHUNKS), rows // 8)]
    tried = {chunk: timed(lambda chunk=chunk: theirs(some_bD, k_ND, DIMS, chunk)) for chunk in CHUNKS}
    best = min(tried, key=lambda chunk: tried[chunk])
    print(f"sentence-transformers, {len(some_bD)} rows, by chunk: {tried}", flush=True)
    contestants: dict[str, Callable[[], Any]] = {
        "farnear, 1 dim": lambda: ours(q_bD, k_ND, one),
        "farnear, 7 dims": lambda: ours(q_bD, k_ND, seven),
        "sentence-transformers, 7 dims": lambda: theirs(q_bD, k_ND, DIMS, best),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, work in contestants.items():
            times[name].append(timed(work))
            print(f"round {number + 1}  {name:30} {times[name][-1]:7.2f} s", flush=True)

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[above], times[below], strict=True)), 3)

    return {
        "dims_cost": ratio("farnear, 7 dims", "farnear, 1 dim"),
        "speedup_vs_st": ratio("sentence-transformers, 7 dims", "farnear, 7 dims"),
        "st_chunk": best,
        "seconds": round(statistics.median(times["farnear, 7 dims"]), 2),
    }


def measure_memory(rows: int, documents: int, width: int, dims: tuple[int, ...] | None) -> dict[str, Any]:
    """Peak memory above the inputs, in a process of its own, for a heap that has no holes yet."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "memory.json")
        mp.spawn(_memory_main, (rows, documents, width, dims, str(out)), nprocs=1)
        return json.loads(out.read_text(encoding="utf-8"))


def _memory_main(_: int, rows: int, documents: int, width: int, dims: tuple[int, ...] | None, out: str) -> None:
    loss = LossConfig(matryoshka_dims=dims)
    ours(torch.randn(64, width), torch.randn(128, width), loss)  # libraries set up their buffers once
    q_bD, k_ND = torch.randn(rows, width), torch.randn(documents, width)
    with peak_above_start() as peak:
        seconds = timed(lambda: ours(q_bD, k_ND, loss))
    figures = {
        "peak_bytes": peak[0],
        "expected_bytes": expected_bytes(loss, rows, documents, width),
        "seconds": seconds,
    }
    Path(out).write_text(json.dumps(figures), encoding="utf-8")


def count_collectives() -> list[int]:
    """Exchanges of the loss stage in two processes, one number a combination of batch, directions and dimensions."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder, "counts.json")
        mp.spawn(_count_main, (port, str(out)), nprocs=2)
        return json.loads(out.read_text(encoding="utf-8"))


def _count_main(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    world = World(rank, 2, torch.device("cpu"))
    count_in(world.traffic)
    counts = []
    for pairs in (8, 700):
        for options in (
            {},
            {"matryoshka_dims": (64, 32, 8)},
            {"directions": ("query_to_doc", "doc_to_query"), "matryoshka_dims": (64, 32)},
        ):
            loss = LossConfig(**options)
            world.traffic.start()
            batch = RankBatch(
                step=0,
                epoch=0,
                pairs_b=np.arange(pairs),
                valid_b=np.ones(pairs, dtype=bool),
                query_hash_b=np.arange(pairs) + 10**6 * rank,
                page_hash_p=np.arange(2 * pairs) + 10**6 * rank,
                owner_p=np.arange(2 * pairs) % pairs,
                page_valid_p=np.ones(2 * pairs, dtype=bool),
                teacher_p=np.full(2 * pairs, np.nan, np.float32),
                answers_bm=np.arange(pairs)[:, None] + 10**6 * rank,
                mini_batches=(),
                quarantined=(),
                seconds_waited=0.0,
            )
            embedding = {"query": torch.randn(pairs, 64), "document": torch.randn(2 * pairs, 64)}
            sizes = Sizes((pairs, pairs), (2 * pairs, 2 * pairs), (1, 1))
            embedding_gradient(embedding, batch, sizes, loss, world, scale=20.0)
            counts.append(sum(world.traffic.calls.values()) + 1)  # and the one by which ranks agreed on the sizes
    if rank == 0:
        Path(out).write_text(json.dumps(counts), encoding="utf-8")
    dist.destroy_process_group()


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="B, local rows; there are twice as many columns")
    parser.add_argument("--large-rows", type=int, default=65536, help="B of the case that must fit into 4 GiB")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures = compare(options.rows, 2 * options.rows, options.rounds)
    memory = measure_memory(options.rows, 2 * options.rows, DIMS[0], DIMS)
    large = measure_memory(options.large_rows, options.large_rows, 256, None)
    counts = count_collectives()
    print(f"memory at B = {options.rows}: {memory}\nmemory at B = {options.large_rows}, D = 256: {large}")
    print(f"exchanges of the loss stage: {counts}; tile of {TILE_BYTES >> 20} MiB")
    print(
        json.dumps(
            {
                **figures,
                "collectives": max(counts),
                "collectives_depend_on_nothing": len(set(counts)) == 1,
                "peak_bytes": memory["peak_bytes"],
                "peak_over_formula": round(memory["peak_bytes"] / memory["expected_bytes"], 3),
                "large_peak_bytes": large["peak_bytes"],
                "large_fits_4_gib": large["peak_bytes"] <= 4 << 30,
                "large_seconds": round(large["seconds"], 1),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
