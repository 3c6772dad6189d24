"""One training step of farnear against sentence-transformers' and against no gradient cache at all.

    python benchmarks/engine.py                 everything, about ten minutes on two cores
    python benchmarks/engine.py --pairs 32      smaller, for a look

Two gloo processes of one thread train the same tiny Qwen3-VL on the same pairs: pages of mixed sizes, queries of mixed
lengths, the same global batch, the same Matryoshka dims, one AdamW step each. The contestants are

    sentence-transformers   CachedMultipleNegativesRankingLoss(gather_across_devices=True) inside MatryoshkaLoss, the
                            model in DistributedDataParallel, as its trainer sets them up; at its best mini-batch size
    farnear                 the cached step with mini-batches by tokens; at the best of some budgets and shares of kept
                            graphs that need no more memory than sentence-transformers, with no graph kept, with half
    uncached                plain forward and backward of the whole batch in one piece, one reduction; and of its sorted
                            mini-batches, which has no padding either and so is what a cache has to be held against

and the first two again with the vision tower frozen. A step is timed from features on the host to changed weights;
making features is left out on both sides. Memory is the kernel's high-water mark of the process above what it held
with the model alone, features included. Contestants take turns, the slower of the two ranks counts, and the figures are
medians of the rounds' ratios. The last line is JSON.
"""

import argparse
import ctypes
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as transformers_logging

from farnear.config import RunConfig, parse_config
from farnear.data.dealing import SIDES, Dealing
from farnear.data.index import Index
from farnear.data.index_cache import ShardSet, SourceShards, cached_index
from farnear.data.loader import RankBatch, TrainLoader
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.read import InputReader
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import ShardStore
from farnear.ingest.shards import Pair, write_shards
from farnear.model.embedder import Embedder, Preprocessing
from farnear.model.features import FeatureMerger
from farnear.model.frozen import FrozenOutputs
from farnear.model.load import load_model
from farnear.model.pixels import page_tokens
from farnear.model.tiny import save_tiny_model
from farnear.parallel.strategy import Strategy, build_strategy
from farnear.parallel.world import World
from farnear.sections import LossConfig, ModelConfig
from farnear.training.cache import CachedStep, StepFigures

DIMS = (128, 96, 64, 32)
WORDS = ("revenue", "costs", "chart", "page", "table", "report", "2019", "2021", "quarter", "annual", "of", "the", "in")
ST_MINI_BATCH_SIZES = (2, 4, 8, 16)
NUM_TOKENS = (256, 768)
KEPT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
CPU = torch.device("cpu")


def write_pairs(folder: Path, pairs: int) -> list[Path]:
    """Shards with pages of 96 to 384 pixels a side and queries of 3 to 60 words."""
    rng = np.random.default_rng(0)

    def page() -> bytes:
        width, height = rng.integers(3, 13, 2) * 32
        buffer = BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    made = (
        Pair(f"k{n:05d}", " ".join(rng.choice(WORDS, rng.integers(3, 60))) + f" {n}", page(), "png", document=str(n))
        for n in range(pairs)
    )
    return write_shards(made, folder / "shards", prefix="train", pairs_per_shard=pairs)


def run_config(base: Path) -> RunConfig:
    """Of which the strategy and the optimizer's settings matter here."""
    return parse_config(
        {"output_dir": "unused", "strategy": "ddp", "model": {"name_or_path": str(base)}, "data": {"train": ["unused"]}}
    )


@dataclass
class Contestant:
    """Makes its features of a batch, and takes a step with them."""

    features: Callable[[], Any]
    step: Callable[[Any], StepFigures | None]


class Bench:
    """One rank's models, batch and contestants."""

    def __init__(self, folder: Path, index: Index, pairs: int, world: World) -> None:
        self.folder, self.index, self.pairs, self.world = folder, index, pairs, world
        self.store = ShardStore(ShardCache(folder / "cache" / "shards"))
        self.reader = InputReader(index, self.store)
        self.loss = LossConfig(matryoshka_dims=DIMS)

    def model(self, *, frozen: bool) -> SentenceTransformer:
        """A fresh one, in training mode."""
        model = load_model(ModelConfig(name_or_path=str(self.folder / "base")))
        if frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".visual." not in name)
        return model.train()

    def batch(self, preprocess: Preprocessing, num_tokens: int | None) -> RankBatch:
        """This rank's part of the first global batch, by the loader; in one piece where there is no bound."""
        model = preprocess._model
        dealing = Dealing(
            rank=self.world.rank,
            world_size=self.world.world_size,
            page_tokens=page_tokens(model),
            mini_batch_size=dict.fromkeys(SIDES),
            mini_batch_num_tokens=dict.fromkeys(SIDES, num_tokens),
        )
        order = Order(self.index, PlanSettings(0, self.pairs), self.folder)
        with closing(TrainLoader(order, dealing, self.store, preprocess, num_workers=0).batches(0, 1)) as batches:
            return next(batches)

    def ours(
        self, num_tokens: int | None, *, frozen: bool = False, keep_graphs: float = 0.0, together: int = 1
    ) -> Contestant:
        """The cached step under ddp."""
        model = self.model(frozen=frozen)
        preprocess = Preprocessing(model)
        module = Embedder(model, bf16=False)
        outputs = FrozenOutputs(module, 2 << 30) if frozen else None
        strategy = self._strategy(module)
        step = CachedStep(
            strategy,
            self.world,
            self.loss,
            0,
            keep_graphs=keep_graphs,
            together=together,
            merge=FeatureMerger(model),
            frozen=outputs,
        )

        def take(batch: RankBatch) -> StepFigures:
            figures = StepFigures()
            step.gradient(batch, figures, scale=self.loss.scale)
            strategy.step(1e-6)
            return figures

        return Contestant(lambda: self.batch(preprocess, num_tokens), take)

    def theirs(self, mini_batch_size: int, *, frozen: bool = False) -> Contestant:
        """sentence-transformers' cached step under DistributedDataParallel."""
        model = self.model(frozen=frozen)
        wrapped = DistributedDataParallel(model)
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size, gather_across_devices=True)
        with_dims = MatryoshkaLoss(model, loss, list(DIMS))
        loss.model = wrapped  # as its trainer does
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

        def take(features: list[dict[str, Any]]) -> None:
            with_dims(features, torch.empty(0)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Contestant(lambda: self._whole(model), take)

    def _strategy(self, module: Embedder) -> Strategy:
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)
        strategy = build_strategy(run_config(self.folder / "base"), module, optimizer, self.world)
        strategy.train(True)
        return strategy

    def _whole(self, model: SentenceTransformer) -> list[dict[str, Any]]:
        """The rank's pairs as their collator would have them: queries and pages, each in one piece."""
        order = Order(self.index, PlanSettings(0, self.pairs), self.folder)
        pairs_b = (
            Dealing(
                rank=self.world.rank,
                world_size=self.world.world_size,
                page_tokens=page_tokens(model),
                mini_batch_size=dict.fromkeys(SIDES, 1),
            )
            .slice_of(order, 0)
            .pairs_b
        )
        queries = [self.reader[int(row)] for row in self.index.query_N[pairs_b]]
        pages = [self.reader[int(self.index.positives_of(int(pair))[0])] for pair in pairs_b]
        return [model.preprocess(queries), model.preprocess(pages)]


def measured(contestant: Contestant) -> tuple[float, int, StepFigures | None]:
    """(seconds of a step on the slower rank, most memory of a rank, what ours says about it)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    start_bytes = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    features = contestant.features()
    dist.barrier()
    started = perf_counter()
    figures = contestant.step(features)
    seconds = perf_counter() - started
    status = Path("/proc/self/status").read_text(encoding="ascii")
    worst = torch.tensor(
        [seconds, 1024.0 * int(status.split("VmHWM:")[1].split()[0]) - start_bytes], dtype=torch.float64
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst[0]), int(worst[1]), figures


def warmed(contestant: Contestant) -> tuple[float, int]:
    """(seconds, memory) of a contestant that has run once."""
    measured(contestant)
    runs = [measured(contestant) for _ in range(2)]
    return statistics.median(seconds for seconds, _, _ in runs), max(peak for _, peak, _ in runs)


def rank_main(rank: int, port: int, folder: str, pairs: int, rounds: int, out: str) -> None:
    """One of two processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    dist.init_process_group("gloo")
    path = Path(folder)
    store = ShardStore(ShardCache(path / "cache" / "shards"))
    shards = tuple(map(str, sorted((path / "shards").glob("*.tar"))))
    index = cached_index(ShardSet((SourceShards("train", shards),)), path / f"cache-{rank}", store, processes=1)
    bench = Bench(path, index, pairs, World(rank, 2, CPU))
    say = print if rank == 0 else lambda *_: None

    say("looking for the best mini-batch size of sentence-transformers, and for the best of ours in its memory")
    st_size: dict[bool, int] = {}
    ours: dict[bool, tuple[int, float]] = {}
    for frozen in (False, True):
        tried: dict[int, tuple[float, int]] = {}
        for size in ST_MINI_BATCH_SIZES:
            tried[size] = warmed(bench.theirs(size, frozen=frozen))
            say(f"  frozen={frozen} their mini-batch {size:3}: {tried[size][0]:6.2f} s, {tried[size][1] / 1e6:5.0f} MB")
        st_size[frozen] = min(tried, key=lambda one: tried[one][0])
        allowed = tried[st_size[frozen]][1]
        of_ours: dict[tuple[int, float], float] = {}
        for tokens in NUM_TOKENS:
            for keep in KEPT_SHARES:
                seconds, peak = warmed(bench.ours(tokens, frozen=frozen, keep_graphs=keep))
                say(f"  frozen={frozen} our {tokens:4} tokens, {keep:.2f} kept: {seconds:6.2f} s, {peak / 1e6:5.0f} MB")
                if peak > allowed:
                    break
                of_ours[tokens, keep] = seconds
        ours[frozen] = min(of_ours, key=lambda one: of_ours[one], default=(NUM_TOKENS[0], 0.0))
    tokens = ours[False][0]
    contestants = {
        "sentence-transformers": bench.theirs(st_size[False]),
        "farnear": bench.ours(tokens, keep_graphs=ours[False][1]),
        "farnear, none kept": bench.ours(tokens),
        "farnear, none kept, three at once": bench.ours(tokens, together=3),
        "farnear, half kept": bench.ours(tokens, keep_graphs=0.5),
        "uncached": bench.ours(None, keep_graphs=1.0),
        "uncached, sorted mini-batches": bench.ours(tokens, keep_graphs=1.0),
        "sentence-transformers, frozen": bench.theirs(st_size[True], frozen=True),
        "farnear, frozen": bench.ours(ours[True][0], frozen=True, keep_graphs=ours[True][1]),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    most_bytes = dict.fromkeys(contestants, 0)
    padding_share = 0.0
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            seconds, peak, figures = measured(contestant)
            if number == 0:
                continue  # the first is a warm-up
            times[name].append(seconds)
            most_bytes[name] = max(most_bytes[name], peak)
            if name == "farnear" and figures is not None:
                padding_share = figures.padding / (figures.padding + figures.tokens)
                phases = {phase: round(value, 2) for phase, value in figures.seconds.items()}
                say(f"  round {number}: farnear {seconds:.2f} s {phases}")

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[above], times[below], strict=True)), 3)

    for name in contestants:
        say(f"{name:32} {statistics.median(times[name]):7.2f} s {most_bytes[name] / 1e6:7.0f} MB")
    if rank == 0:
        figures = {
            "speedup_vs_st": ratio("sentence-transformers", "farnear"),
            "speedup_vs_st_frozen": ratio("sentence-transformers, frozen", "farnear, frozen"),
            "vs_uncached": ratio("farnear, none kept", "uncached"),
            "vs_uncached_half": ratio("farnear, half kept", "uncached"),
            "vs_uncached_sorted": ratio("farnear, none kept", "uncached, sorted mini-batches"),
            "vs_uncached_sorted_half": ratio("farnear, half kept", "uncached, sorted mini-batches"),
            "speedup_vs_st_none_kept": ratio("sentence-transformers", "farnear, none kept"),
            "speedup_three_at_once": ratio("farnear, none kept", "farnear, none kept, three at once"),
            "padding_share": round(padding_share, 3),
            "num_tokens": ours[False][0],
            "kept": ours[False][1],
            "num_tokens_frozen": ours[True][0],
            "kept_frozen": ours[True][1],
            "st_mini_batch_size": st_size[False],
            "st_mini_batch_size_frozen": st_size[True],
            "memory_over_st": round(most_bytes["farnear"] / most_bytes["sentence-transformers"], 3),
            "memory_over_st_frozen": round(
                most_bytes["farnear, frozen"] / most_bytes["sentence-transformers, frozen"], 3
            ),
        }
        Path(out).write_text(json.dumps(figures), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Set up, measure in two processes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=128, help="the global batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each contestant (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="farnear-bench-") as folder, socket.socket() as free:
        write_pairs(Path(folder), options.pairs)
        save_tiny_model(Path(folder) / "base", texts=[" ".join(WORDS)])
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = str(Path(folder) / "figures.json")
        mp.spawn(rank_main, (port, folder, options.pairs, options.rounds, out), nprocs=2)
        print(Path(out).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
