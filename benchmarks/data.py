"""How fast pairs come: against webdataset, `datasets` streaming and a bare loop that only decodes and resizes.

    python benchmarks/data.py [--pairs 600] [--rounds 5] [--plan-pairs 1000000]

The same local shards of JPEG pages, the same work on each pair (decode, RGB, resize to 448x560, the query's text) and
the same number of worker processes for all. Rounds alternate between the contestants and medians are compared, for a
machine's speed drifts by more than the differences. The bare loop has the bytes in memory already: it is what one core
can do at most.

Resuming and planning are measured on an index of a million pairs: the pairs of the shards many times over, each with
identities of its own.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from farnear.data.columns import ArrowStrings
from farnear.data.dealing import SIDES, Dealing
from farnear.data.index import Index, open_index, write_index
from farnear.data.index_cache import ShardSet, SourceShards, cached_index
from farnear.data.loader import TrainLoader
from farnear.data.order import Order, pair_facts
from farnear.data.plan import PlanSettings, plan_epoch
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import OpenShards, ShardStore
from farnear.ingest.shards import Pair, write_shards
from farnear.model.embedder import Preprocessing
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

PAGE, TARGET = (800, 1000), (448, 560)
MINI_BATCH = 8
GLOBAL_BATCH = 32
PREFETCH = 2
WORKERS = (1, 2)


def page_bytes(number: int) -> bytes:
    """A page of lines of text over a chart-like ground, as a scanner's JPEG: about 150 kB."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(225, 255, (PAGE[1], PAGE[0], 3), np.uint8))
    draw = ImageDraw.Draw(image)
    for line in range(20, PAGE[1] - 20, 22):
        draw.text((30, line), "".join(map(chr, rng.integers(65, 122, 90))), fill=(20, 20, 20))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def small_page(image: Image.Image) -> np.ndarray:
    """The work that everybody does on a decoded page in mode RGB, which ours come in."""
    return np.asarray(image.resize(TARGET, Image.Resampling.BICUBIC))


def preprocess(inputs: list[Any], side: str) -> dict[str, Any]:
    """What our workers are given to do."""
    if side == "query":
        return {"texts": inputs}
    return {"pixels": torch.from_numpy(np.stack([small_page(image) for image in inputs]))}


def page_tokens(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Pages of one size cost the same."""
    return np.full(len(width), 300, np.int64)


def main() -> None:
    """Measure everything and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=600, help="in the shards (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each contestant (default: %(default)s)")
    parser.add_argument("--plan-pairs", type=int, default=1_000_000, help="of the large index (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="farnear-bench-") as folder:
        figures = measure(Path(folder), arguments.pairs, arguments.rounds, arguments.plan_pairs)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value}")
    print(json.dumps(figures))


def measure(folder: Path, pairs: int, rounds: int, plan_pairs: int) -> dict[str, Any]:
    """All figures by name."""
    pages = [page_bytes(number) for number in range(pairs)]
    made = (Pair(f"k{n:06d}", f"what is on page {n}?", page, "jpg", document=str(n)) for n, page in enumerate(pages))
    shards = write_shards(made, folder / "shards", prefix="train", pairs_per_shard=-(-pairs // 4))
    store = ShardStore(ShardCache(folder / "cache" / "shards"))
    shard_set = ShardSet((SourceShards("train", tuple(map(str, shards))),))
    started = time.perf_counter()
    index = cached_index(shard_set, folder / "cache", store, processes=1)
    figures: dict[str, Any] = {
        "pairs": pairs,
        "page_kb": round(sum(map(len, pages)) / len(pages) / 1000),
        "cores": len(os.sched_getaffinity(0)),
        "index_members_per_s": round(2 * pairs / (time.perf_counter() - started)),
    }
    contestants: dict[str, Callable[[], Iterator[int]]] = {"limit": lambda: bare_loop(pages)}
    for workers in WORKERS:
        contestants[f"ours_{workers}"] = lambda w=workers: ours(index, store, folder, w)
        contestants[f"webdataset_{workers}"] = lambda w=workers: with_webdataset(shards, w)
        contestants[f"datasets_{workers}"] = lambda w=workers: with_datasets(shards, w)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            rates[name].append(pairs_per_second(run(), 0 if name == "limit" else int(name[-1])))
    median = {name: statistics.median(values) for name, values in rates.items()}
    figures["pairs_per_s"] = {name: round(value, 1) for name, value in median.items()}
    for workers in WORKERS:
        suffix = "" if workers == 1 else f"_{workers}_workers"
        for peer in ("webdataset", "datasets"):
            figures[f"vs_{peer}{suffix}"] = ratio(rates[f"ours_{workers}"], rates[f"{peer}_{workers}"])
    figures["vs_limit"] = ratio(rates["ours_1"], rates["limit"])
    figures |= plan_and_resume(index, store, folder, plan_pairs)
    figures |= host_bytes(folder)
    return figures


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds, each compared within itself, for the machine drifts."""
    return round(statistics.median(own / other for own, other in zip(ours, theirs, strict=True)), 3)


def pairs_per_second(batches: Iterator[int], workers: int) -> float:
    """Pairs a second of a stream of batch sizes, once it runs: starting workers is no throughput.

    The clock starts when the workers have filled their queues, and what stood in these does not count.
    """
    next(batches)
    time.sleep(1.0 if workers else 0.0)
    started = time.perf_counter()
    pairs = sum(batches) - workers * PREFETCH * MINI_BATCH
    return pairs / (time.perf_counter() - started)


def bare_loop(pages: list[bytes]) -> Iterator[int]:
    """Decode and resize, in this process, and nothing else."""
    for page in pages:
        small_page(Image.open(io.BytesIO(page)).convert("RGB"))
        yield 1


def loader_of(index: Index, store: ShardStore, folder: Path, workers: int) -> TrainLoader:
    """Ours, with one epoch in its plan."""
    return TrainLoader(
        Order(index, PlanSettings(0, GLOBAL_BATCH, tail="drop"), folder),
        Dealing(rank=0, world_size=1, page_tokens=page_tokens, mini_batch_size=dict.fromkeys(SIDES, MINI_BATCH)),
        store,
        preprocess,
        num_workers=workers,
        prefetch_factor=2 * PREFETCH,  # queries are jobs of their own, so this is as many pages as the others'
    )


def ours(index: Index, store: ShardStore, folder: Path, workers: int) -> Iterator[int]:
    """The batches of one epoch of ours."""
    loader = loader_of(index, store, folder, workers)
    with closing(loader.batches(0, loader.order.schedule.steps_before(1))) as batches:
        for batch in batches:
            yield len(batch.pairs_b)


def with_webdataset(shards: list[Path], workers: int) -> Iterator[int]:
    """The same by webdataset, in shard order."""
    import webdataset

    dataset = webdataset.WebDataset(list(map(str, shards)), shardshuffle=False, empty_check=False).map(
        webdataset_sample
    )
    yield from batches_of(dataset, workers)


def webdataset_sample(sample: dict[str, Any]) -> tuple[str, np.ndarray]:
    """One sample of webdataset."""
    return json.loads(sample["json"])["query"], small_page(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))


def with_datasets(shards: list[Path], workers: int) -> Iterator[int]:
    """The same by `datasets`, streaming its webdataset format."""
    import datasets

    datasets.disable_progress_bars()
    stream = datasets.load_dataset(
        "webdataset", data_files={"train": list(map(str, shards))}, split="train", streaming=True
    )
    yield from batches_of(stream.map(datasets_sample, remove_columns=["__key__", "__url__", "json", "jpg"]), workers)


def datasets_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """One sample of `datasets`."""
    return {"query": sample["json"]["query"], "pixels": small_page(sample["jpg"].convert("RGB"))}


def batches_of(dataset: Any, workers: int) -> Iterator[int]:
    """Sizes of the batches that torch's DataLoader makes of a stream of samples."""
    loader = DataLoader(
        dataset,
        batch_size=MINI_BATCH,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=collated,
        multiprocessing_context="forkserver",
    )
    for size, _ in loader:
        yield size


def collated(samples: list[Any]) -> tuple[int, torch.Tensor]:
    """Pages as one tensor, as ours come."""
    pages = [sample["pixels"] if isinstance(sample, dict) else sample[1] for sample in samples]
    return len(samples), torch.from_numpy(np.stack([np.asarray(page, np.uint8) for page in pages]))


def plan_and_resume(index: Index, store: ShardStore, folder: Path, pairs: int) -> dict[str, Any]:
    """Seconds to plan an epoch of ``pairs`` pairs, and from its stored plan to the first batch at 99 % of it."""
    write_index(grown(index, pairs), folder / "large.arrow")
    settings = PlanSettings(0, GLOBAL_BATCH, tail="drop")
    plan_seconds = []
    for epoch in range(3):
        started = time.perf_counter()
        plan_epoch(pair_facts(open_index(folder / "large.arrow")), settings, epoch)
        plan_seconds.append(time.perf_counter() - started)
    loader_of(open_index(folder / "large.arrow"), store, folder, 0).order.plan(0)
    read: list[int] = []
    read_range = OpenShards.read
    OpenShards.read = lambda shards, facts, offset, size: read.append(size) or read_range(shards, facts, offset, size)
    resume_seconds = []
    try:
        for _ in range(5):
            read.clear()
            started = time.perf_counter()
            loader = loader_of(open_index(folder / "large.arrow"), store, folder, 0)
            step = loader.order.schedule.steps_before(1) * 99 // 100
            with closing(loader.batches(step, step + 1)) as batches:
                batch = next(batches)
            resume_seconds.append(time.perf_counter() - started)
            large = loader.index
            inputs = np.concatenate([large.query_N[batch.pairs_b], large.positives[batch.pairs_b]])
            of_batch = int(large.part_size_M[large.part_start_I1[inputs]].sum())
    finally:
        OpenShards.read = read_range
    return {
        "plan_seconds": round(statistics.median(plan_seconds), 2),
        "resume_seconds": round(statistics.median(resume_seconds), 3),
        "bytes_read_to_resume": sum(read) - of_batch,
    }


def grown(index: Index, pairs: int) -> Index:
    """The pairs of an index many times over: the same bytes, with keys and identities of their own."""
    times = -(-pairs // len(index))
    inputs, parts = len(index.input_hash_I), len(index.part_hash_M)
    column = {
        name: np.tile(getattr(index, name), times)
        for name in vars(index)
        if name.startswith("part_") and name[-2:] == "_M"
    }
    rows = np.arange(times)[:, None]
    identity = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (2, times * len(index)))
    query_hash_N = identity[0][:pairs]
    return replace(
        index,
        fingerprint=f"{index.fingerprint}x{times}",
        **column,
        part_name=ArrowStrings.joined([index.part_name] * times),
        part_start_I1=np.append((index.part_start_I1[:-1] + rows * parts).ravel(), times * parts),
        input_hash_I=np.random.default_rng(1).integers(-(2**63), 2**63 - 1, times * inputs),
        input_modality_I=np.tile(index.input_modality_I, times),
        pair_key=ArrowStrings.of(f"k{number:07d}" for number in range(pairs)),
        pair_shard_N=np.tile(index.pair_shard_N, times)[:pairs],
        source_start_K1=np.array([0, pairs]),
        query_N=(index.query_N + rows * inputs).ravel()[:pairs],
        query_hash_N=query_hash_N,
        by_query_hash_N=np.argsort(query_hash_N, kind="stable"),
        positive_start_N1=np.arange(pairs + 1),
        positives=(index.positives + rows * inputs).ravel()[:pairs],
        negative_start_N1=np.zeros(pairs + 1, np.int64),
        path=None,
    )


def host_bytes(folder: Path) -> dict[str, Any]:
    """Bytes of a page's features as a worker sends them, against the processor's own."""
    save_tiny_model(folder / "model", texts=["which page?"], hidden_size=64, num_layers=1)
    model = load_model(ModelConfig(name_or_path=str(folder / "model"), max_pixels=TARGET[0] * TARGET[1]))
    pages = [Image.open(io.BytesIO(page_bytes(number))).convert("RGB") for number in range(4)]

    def size(features: dict[str, Any]) -> int:
        tensors = [one for value in features.values() for one in (value if isinstance(value, tuple) else (value,))]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)) // len(pages)

    ours, processors = size(Preprocessing(model)(pages, "document")), size(dict(model.preprocess(pages)))
    return {
        "host_bytes_per_page": ours,
        "host_bytes_per_page_of_processor": processors,
        "host_bytes_ratio": round(ours / processors, 4),
    }


if __name__ == "__main__":
    # Workers import what they are sent, and cannot import a program that runs as __main__.
    from data import main as main_of_module

    main_of_module()
