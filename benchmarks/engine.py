"""One training step of farnear against sentence-transformers' and against no gradient cache at all.

    python benchmarks/engine.py                 everything, about twelve minutes on two cores
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
making features is left out on both sides. Contestants take turns, the slower of the two ranks counts, and the figures
are medians of the rounds' ratios.

Memory is the kernel's high-water mark of the process above what it held with the model alone, features included. It is
measured in a trial of two fresh processes for each contestant: the heap that one leaves behind has holes, in which
another's tensors may or may not find room. The last line is JSON.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
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
from farnear.data.batch import RankBatch
from farnear.data.dealing import SIDES, Dealing
from farnear.data.index import Index
from farnear.data.index_cache import ShardSet, SourceShards, cached_index
from farnear.data.loader import TrainLoader
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.read import InputReader
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import ShardStore
from farnear.ingest.images import PageFile
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
from farnear.training.cache import CachedStep
from farnear.training.step import StepFigures

DIMS = (128, 96, 64, 32)
WORDS = ("revenue", "costs", "chart", "page", "table", "report", "2019", "2021", "quarter", "annual", "of", "the", "in")
ST_MINI_BATCH_SIZES = (2, 4, 8, 16)
NUM_TOKENS = (256, 384, 512)
KEPT_SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
TRIAL_STEPS = 4
CPU = torch.device("cpu")


def write_pairs(folder: Path, pairs: int, *, negatives: int = 0) -> list[Path]:
    """Shards with pages of 96 to 384 pixels a side and queries of 3 to 60 words; each pair with some hard negatives."""
    rng = np.random.default_rng(0)

    def page() -> bytes:
        width, height = rng.integers(3, 13, 2) * 32
        buffer = BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def pair(n: int) -> Pair:
        query = " ".join(rng.choice(WORDS, rng.integers(3, 60))) + f" {n}"
        hard = tuple(PageFile(page(), "png") for _ in range(negatives))
        return Pair(f"k{n:05d}", query, page(), "png", document=str(n), negatives=hard)

    return write_shards(map(pair, range(pairs)), folder / "shards", prefix="train", pairs_per_shard=pairs)


def run_config(base: Path) -> RunConfig:
    """Of which the strategy and the optimizer's settings matter here."""
    return parse_config(
        {"output_dir": "unused", "strategy": "ddp", "model": {"name_or_path": str(base)}, "data": {"train": ["unused"]}}
    )


@dataclass(frozen=True)
class Setting:
    """What one contestant is.

    Attributes:
        st_mini_batch_size: Of sentence-transformers; None for the step of farnear.
        num_tokens: The mini-batches' budget; None for one mini-batch of everything.
        keep_graphs: Share of the mini-batches.
        together: Mini-batches that go through pass one at once.
        frozen: Whether the vision tower is.
    """

    st_mini_batch_size: int | None = None
    num_tokens: int | None = None
    keep_graphs: float = 0.0
    together: int = 1
    frozen: bool = False


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

    def model(self, load: Callable[[str], SentenceTransformer], *, frozen: bool) -> SentenceTransformer:
        """A fresh one, in training mode."""
        model = load(str(self.folder / "base"))
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

    def contestant(self, setting: Setting) -> Contestant:
        """A fresh one."""
        return self._ours(setting) if setting.st_mini_batch_size is None else self._theirs(setting)

    def _ours(self, setting: Setting) -> Contestant:
        """The cached step under ddp."""
        model = self.model(lambda name: load_model(ModelConfig(name_or_path=name)), frozen=setting.frozen)
        preprocess = Preprocessing(model)
        module = Embedder(model, bf16=False)
        outputs = FrozenOutputs(module, 2 << 30) if setting.frozen else None
        strategy = self._strategy(module)
        step = CachedStep(
            strategy,
            self.world,
            self.loss,
            0,
            keep_graphs=setting.keep_graphs,
            together=setting.together,
            merge=FeatureMerger(model),
            frozen=outputs,
        )

        def take(batch: RankBatch) -> StepFigures:
            figures = StepFigures()
            step.gradient(batch, figures, scale=self.loss.scale)
            strategy.step(1e-6)
            return figures

        return Contestant(lambda: self.batch(preprocess, setting.num_tokens), take)

    def _theirs(self, setting: Setting) -> Contestant:
        """sentence-transformers' cached step under DistributedDataParallel."""
        model = self.model(SentenceTransformer, frozen=setting.frozen)
        wrapped = DistributedDataParallel(model)
        loss = CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=setting.st_mini_batch_size, gather_across_devices=True
        )
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


def bytes_at_rest() -> int:
    """What this process holds once all that is unused is given back; from now on its high-water mark is measured."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(psutil.Process().memory_info().rss)


def high_water_bytes() -> int:
    """The most that this process has held since `bytes_at_rest`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measured(contestant: Contestant) -> tuple[float, int, StepFigures | None]:
    """(seconds of a step on the slower rank, most memory of a rank, what ours says about it)."""
    start_bytes = bytes_at_rest()
    features = contestant.features()
    dist.barrier()
    started = perf_counter()
    figures = contestant.step(features)
    seconds = perf_counter() - started
    worst = torch.tensor([seconds, high_water_bytes() - start_bytes], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst[0]), int(worst[1]), figures


@contextmanager
def joined(rank: int, rendezvous: str, folder: Path, pairs: int) -> Iterator[Bench]:
    """This process as one of two ranks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    store = ShardStore(ShardCache(folder / "cache" / "shards"))
    shards = tuple(map(str, sorted((folder / "shards").glob("*.tar"))))
    index = cached_index(ShardSet((SourceShards("train", shards),)), folder / f"cache-{rank}", store, processes=1)
    yield Bench(folder, index, pairs, World(rank, 2, CPU))
    dist.barrier()
    dist.destroy_process_group()


def trial_main(rank: int, out: str, folder: Path, pairs: int, setting: Setting) -> None:
    """One rank of a trial: a contestant's seconds and memory, the first step left out."""
    with joined(rank, f"{out}.rendezvous", folder, pairs) as bench:
        contestant = bench.contestant(setting)
        runs = [measured(contestant) for _ in range(TRIAL_STEPS)][1:]
        if rank == 0:
            found = (statistics.median(seconds for seconds, _, _ in runs), max(peak for _, peak, _ in runs))
            Path(out).write_text(json.dumps(found), encoding="utf-8")


def rounds_main(rank: int, out: str, folder: Path, pairs: int, settings: dict[str, Setting], rounds: int) -> None:
    """One rank of the rounds: seconds of every contestant, and the share of padding in farnear's mini-batches."""
    times: dict[str, list[float]] = {name: [] for name in settings}
    padding_share = 0.0
    with joined(rank, f"{out}.rendezvous", folder, pairs) as bench:
        contestants = {name: bench.contestant(setting) for name, setting in settings.items()}
        for number in range(rounds + 1):
            for name, contestant in contestants.items():
                seconds, _, figures = measured(contestant)
                if number == 0:
                    continue  # the first is a warm-up
                times[name].append(seconds)
                if name == "farnear" and figures is not None:
                    padding_share = figures.padding / (figures.padding + figures.tokens)
                    phases = {phase: round(value, 2) for phase, value in figures.seconds.items()}
                    if rank == 0:
                        print(f"  round {number}: farnear {seconds:.2f} s {phases}", flush=True)
        if rank == 0:
            Path(out).write_text(json.dumps((times, padding_share)), encoding="utf-8")


class Ranks:
    """Runs functions in two fresh processes. They are forked: importing all that is needed here takes ten seconds."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs
        self._runs = 0

    def __call__(self, function: Callable[..., None], *arguments: Any) -> Any:
        """What rank 0 wrote down."""
        self._runs += 1
        out = self.folder / f"run-{self._runs}.json"
        mp.start_processes(function, (str(out), self.folder, self.pairs, *arguments), nprocs=2, start_method="fork")
        return json.loads(out.read_text(encoding="utf-8"))


def search(ranks: Ranks, frozen: bool) -> tuple[Setting, Setting, dict[Setting, int]]:
    """sentence-transformers' best, ours that is best in no more memory, and the memory of each."""
    seconds: dict[Setting, float] = {}
    memory: dict[Setting, int] = {}

    def tries(setting: Setting) -> None:
        seconds[setting], memory[setting] = ranks(trial_main, setting)
        size = setting.st_mini_batch_size
        what = f"our {setting.num_tokens:4} tokens, {setting.keep_graphs:.2f} kept" if size is None else f"their {size}"
        print(f"  frozen={frozen} {what:27} {seconds[setting]:6.2f} s, {memory[setting] / 1e6:5.0f} MB", flush=True)

    for size in ST_MINI_BATCH_SIZES:
        tries(Setting(st_mini_batch_size=size, frozen=frozen))
    theirs = min(seconds, key=lambda one: seconds[one])
    fit: list[Setting] = []
    for tokens in NUM_TOKENS:
        for keep in KEPT_SHARES:
            setting = Setting(num_tokens=tokens, keep_graphs=keep, frozen=frozen)
            tries(setting)
            if memory[setting] > memory[theirs]:
                break
            fit.append(setting)
    none_fits = Setting(num_tokens=NUM_TOKENS[0], frozen=frozen)
    return theirs, min(fit, key=lambda one: seconds[one], default=none_fits), memory


def prepare(_: int, folder: Path, pairs: int) -> None:
    """Shards and the model to begin with."""
    write_pairs(folder, pairs)
    raw = save_tiny_model(folder / "raw", texts=[" ".join(WORDS)])
    # With its pooling, so that both sides load the same model, each in its own way.
    load_model(ModelConfig(name_or_path=str(raw))).save(str(folder / "base"))


def compare(ranks: Ranks, rounds: int) -> dict[str, Any]:
    """All figures."""
    print("looking for the best mini-batch size of sentence-transformers, and for the best of ours in its memory")
    st, ours, memory = search(ranks, frozen=False)
    st_frozen, ours_frozen, memory_frozen = search(ranks, frozen=True)
    none_kept = replace(ours, keep_graphs=0.0)
    settings = {
        "sentence-transformers": st,
        "farnear": ours,
        "farnear, none kept": none_kept,
        "farnear, none kept, three at once": replace(none_kept, together=3),
        "farnear, half kept": replace(ours, keep_graphs=0.5),
        "uncached": Setting(keep_graphs=1.0),
        "uncached, sorted mini-batches": replace(ours, keep_graphs=1.0),
        "sentence-transformers, frozen": st_frozen,
        "farnear, frozen": ours_frozen,
    }
    memory |= memory_frozen
    for setting in settings.values():
        if setting not in memory:
            _, memory[setting] = ranks(trial_main, setting)
    times, padding_share = ranks(rounds_main, settings, rounds)

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[above], times[below], strict=True)), 3)

    for name, setting in settings.items():
        print(f"{name:34} {statistics.median(times[name]):6.2f} s {memory[setting] / 1e6:6.0f} MB")
    return {
        "speedup_vs_st": ratio("sentence-transformers", "farnear"),
        "speedup_vs_st_frozen": ratio("sentence-transformers, frozen", "farnear, frozen"),
        "vs_uncached": ratio("farnear, none kept", "uncached"),
        "vs_uncached_half": ratio("farnear, half kept", "uncached"),
        "vs_uncached_sorted": ratio("farnear, none kept", "uncached, sorted mini-batches"),
        "vs_uncached_sorted_half": ratio("farnear, half kept", "uncached, sorted mini-batches"),
        "speedup_vs_st_none_kept": ratio("sentence-transformers", "farnear, none kept"),
        "speedup_three_at_once": ratio("farnear, none kept", "farnear, none kept, three at once"),
        "padding_share": round(padding_share, 3),
        "num_tokens": ours.num_tokens,
        "kept": ours.keep_graphs,
        "num_tokens_frozen": ours_frozen.num_tokens,
        "kept_frozen": ours_frozen.keep_graphs,
        "st_mini_batch_size": st.st_mini_batch_size,
        "st_mini_batch_size_frozen": st_frozen.st_mini_batch_size,
        "memory_over_st": round(memory[ours] / memory[st], 3),
        "memory_over_st_frozen": round(memory[ours_frozen] / memory[st_frozen], 3),
    }


def main() -> int:
    """Set up, measure in two processes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=128, help="the global batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each contestant (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="farnear-bench-") as name:
        folder = Path(name)
        # Not here: threads that are started in this process are missing in those that are forked from it.
        mp.start_processes(prepare, (folder, options.pairs), nprocs=1, start_method="fork")
        print(json.dumps(compare(Ranks(folder, options.pairs), options.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
