"""One training step of a reranker against sentence-transformers' cached loss for a CrossEncoder.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
from engine import WORDS, write_pairs
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import CachedMultipleNegativesRankingLoss
from transformers.utils import logging as transformers_logging

from farnear.config import parse_config
from farnear.data.index_cache import ShardSet, SourceShards, cached_index
from farnear.data.list_dealing import ListBatch, ListDealing
from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.read import InputReader
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import ShardStore
from farnear.model.load_reranker import load_plain_reranker, load_reranker
from farnear.model.pairs import PairPicker, PairPreprocessing
from farnear.model.pixels import page_tokens
from farnear.model.reranker import Reranker
from farnear.model.tiny import save_tiny_model
from farnear.parallel.strategy import build_strategy
from farnear.parallel.world import World
from farnear.reranker_section import RerankerConfig
from farnear.sections import ModelConfig
from farnear.training.rerank_step import RerankStep
from farnear.training.step import StepFigures

CPU = torch.device("cpu")
VOCABULARIES = {"small": None, "large": 151_936}


@dataclass(frozen=True)
class Setting:
    theirs: bool
    vocabulary: str
    mini_batch_size: int
    prepared: bool = False


@dataclass
class Contestant:
    features: Callable[[], Any]
    step: Callable[[Any], Any]
    gradient: Callable[[Any], float]
    model: Any


class Bench:
    def __init__(self, folder: Path, pairs: int) -> None:
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        self.folder = folder
        store = ShardStore(ShardCache(folder / "cache" / "shards"))
        shards = tuple(map(str, sorted((folder / "shards").glob("*.tar"))))
        index = cached_index(ShardSet((SourceShards("train", shards),)), folder / "cache", store, processes=1)
        self.order = Order(index, PlanSettings(0, pairs), folder)
        self.reader = InputReader(index, store)

    def contestant(self, setting: Setting) -> Contestant:
        return self._theirs(setting) if setting.theirs else self._ours(setting)

    def dealing(self, model: CrossEncoder, size: int | None) -> ListDealing:
        return ListDealing(
            rank=0, world_size=1, page_tokens=page_tokens(model),
            mini_batch_size={"document": size, "pair": size},
            mini_batch_num_tokens={"document": None, "pair": None},
            negatives=Negatives.of_index(self.order.index), num_hard=None, num_in_batch=4,
        )

    def _ours(self, setting: Setting) -> Contestant:
        reranker = RerankerConfig()
        path = str(self.folder / setting.vocabulary)
        model = load_reranker(ModelConfig(name_or_path=path), reranker)
        preprocess, pick = PairPreprocessing(model, shares_images=True), PairPicker(model)
        dealing = self.dealing(model, setting.mini_batch_size)
        share = dealing.slice_of(self.order, 0)
        module = Reranker(model, bf16=False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)
        world = World(0, 1, CPU)
        config = parse_config({"output_dir": "unused", "strategy": "single", "model": {"name_or_path": path}, "data": {"train": ["unused"]}})
        strategy = build_strategy(config, module, optimizer, world)
        strategy.train(True)
        step = RerankStep(strategy, world, reranker, 0, pick)

        def read():
            rows = np.unique(np.concatenate([job.rows for job, _ in share.jobs]))
            return {int(row): self.reader[int(row)] for row in rows}

        def prepare(inputs) -> ListBatch:
            done = [(preprocess(job.units([inputs[row] for row in job.rows.tolist()]), "pair"), []) for job, _ in share.jobs]
            return dealing.batch(self.order, 0, share, done, 0.0)

        def gradient(given):
            figures = StepFigures()
            start = perf_counter()
            batch = given if setting.prepared else prepare(given)
            figures.seconds["prepare"] = perf_counter() - start
            step.gradient(batch, figures)
            return figures

        def take(given):
            figures = gradient(given)
            strategy.step(1e-6)
            return figures

        return Contestant(lambda: prepare(read()) if setting.prepared else read(), take, gradient, model)

    def _theirs(self, setting: Setting) -> Contestant:
        model = CrossEncoder(str(self.folder / setting.vocabulary), device="cpu").train()
        share = self.dealing(model, None).slice_of(self.order, 0)
        index = self.order.index
        rows_b5 = share.document_e.reshape(len(share.pairs_b), -1)
        class Given(CachedMultipleNegativesRankingLoss):
            def get_in_batch_negatives(self, anchors, candidates):
                pages = self.pages
                for column in rows_b5[:, 1:].T:
                    yield [pages[int(row)] for row in column]
        loss = Given(model, mini_batch_size=setting.mini_batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        whole = model.preprocess
        prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None

        def read():
            pages = {int(row): self.reader[int(row)] for row in np.unique(share.document_e)}
            queries = [self.reader[int(row)] for row in index.query_N[share.pairs_b]]
            return queries, pages

        seconds = [0.0]
        def preprocess(pairs, **kw):
            start = perf_counter()
            out = whole(pairs, **kw)
            seconds[0] += perf_counter() - start
            return out
        model.preprocess = preprocess

        def gradient(given):
            queries, pages = given
            seconds[0] = 0
            loss.pages = pages
            value = loss([queries, [pages[int(row)] for row in rows_b5[:, 0]]], None, prompt=prompt)
            value.backward()
            figures = StepFigures(loss=float(value))
            figures.seconds["prepare"] = seconds[0]
            return figures

        def take(given):
            figures = gradient(given)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return figures
        return Contestant(read, take, gradient, model)


def measured(contestant):
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    start_bytes = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    given = contestant.features()
    started = perf_counter()
    figures = contestant.step(given)
    seconds = perf_counter() - started
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return seconds, 1024 * int(status.split("VmHWM:")[1].split()[0]) - start_bytes, figures

def prepare(folder, pairs):
    write_pairs(folder, pairs)
    texts = [" ".join(WORDS), "yes", "no"]
    text = (Path(__file__).parent.parent / "src/farnear/model/reranker.jinja").read_text().split("<|im_start|>system", 1)[1]
    raw = save_tiny_model(folder / "r", texts=[*texts, text] * 2)
    for name, size in VOCABULARIES.items():
        raw = save_tiny_model(folder / f"raw-{name}", texts=[*texts, text] * 2, vocab_size=size)
        load_plain_reranker(ModelConfig(name_or_path=str(raw)), RerankerConfig()).save(str(folder / name))

if __name__ == "__main__":
    folder = Path("/tmp/b7/f"); pairs = 24
    if not folder.exists():
        folder.mkdir()
        prepare(folder, pairs)
    name, voc, size = sys.argv[1:4]
    bench = Bench(folder, pairs)
    c = bench.contestant(Setting(name == "theirs", voc, int(size)))
    for _ in range(3):
        s, m, f = measured(c)
        print(name, voc, size, f"{s:.2f} s {m/1e6:.0f} MB loss {f.loss:.6f}", {k: round(v, 2) for k, v in f.seconds.items()}, f.tokens, f.padding)
