"""One training step of a reranker against sentence-transformers' cached loss for a CrossEncoder.

    python benchmarks/reranker.py                        everything, about four minutes on two cores
    python benchmarks/reranker.py --pairs 6 --rounds 1   smaller, for a look

One process of one thread trains the same tiny Qwen3-VL with the yes_no head (there: LogitScore) on the same lists, a
query with its positive and four negatives of the batch, by the same loss, scale 10 over a sigmoid, with the same AdamW.
The contestants are

    sentence-transformers   CachedMultipleNegativesRankingLoss at its best mini-batch size. It draws its negatives
                            itself; here it is given farnear's, so that the lists are the same
    farnear                 the step of a training with mini-batches of as many pairs, and of as many pages

What is held equal beside the lists is that size; the memory that either needs with it is measured. Seconds are those of
the process on its core: nothing in a step waits, and other programs on the machine disturb them little.

sentence-transformers has to preprocess inside its loss, as it draws the negatives there: every pair once for each of
its two passes, in the process that trains. farnear's workers do it beside the step, each page once. So that workers
that nobody counts do not win the race, farnear preprocesses in the timed step too (`speedup_vs_st`); and both are timed
once more with all features made beforehand (`speedup_vs_st_prepared`). Pages are decoded beforehand always.

Two more ratios tell where the gain comes from. With negatives of the batch a page is in five lists, for which farnear's
vision tower runs once; `speedup_vs_st_hard_negatives` is for lists of four hard negatives, where every page is in one.
And the vocabulary of these is the tokenizer's own; with one of 151,936 words, as large models have, this tiny model
would be nearly all embedding table, so that speed is told beside the headline (`speedup_vs_st_large_vocabulary`).

`peak_memory_vs_st` is for the large vocabulary. sentence-transformers computes the logits of all its words too, at the
last position; what its step is made of there is dense gradients as large as the table, one of the embedding layer and
one of the head for each mini-batch, where farnear adds up rows. Without that it is `..._small_vocabulary`. Memory is
that of `benchmarks/engine.py`, in a fresh process for each contestant. Before anything is timed both gradients are
compared (`loss_difference`, `gradient_difference`). The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from engine import CPU, WORDS, bytes_at_rest, high_water_bytes, write_pairs
from exactness import relative_error
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor
from transformers.utils import logging as transformers_logging

from farnear.config import parse_config
from farnear.data.index_cache import ShardSet, SourceShards, cached_index
from farnear.data.list_dealing import ListBatch, ListDealing, ListShare
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
from farnear.sections import ModelConfig, TrainingConfig
from farnear.training.optim import build_optimizer
from farnear.training.rerank_step import RerankStep
from farnear.training.step import StepFigures

ST_MINI_BATCH_SIZES = (5, 10, 20)
NEGATIVES = 4
TRIAL_STEPS = 3
VOCABULARIES = {"small": None, "large": 151_936}
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Setting:
    """What one contestant is.

    Attributes:
        is_st: Whether it is sentence-transformers.
        mini_batch_size: In pairs.
        vocabulary: A name in `VOCABULARIES`.
        hard: Whether the negatives are hard ones, each of one list, and not the batch's.
        prepared: Whether all features are made before the step.
    """

    is_st: bool
    mini_batch_size: int
    vocabulary: str = "small"
    hard: bool = False
    prepared: bool = False


@dataclass
class Contestant:
    """Its inputs, the gradient of a step as it leaves it in the parameters, and the update.

    Attributes:
        gradient: Returns the loss and the seconds of preprocessing.
    """

    model: CrossEncoder
    inputs: Callable[[], Any]
    gradient: Callable[[Any], tuple[float, float]]
    update: Callable[[], Any]


class GivenLists(CachedMultipleNegativesRankingLoss):
    """The loss without negatives drawn from the batch: they come as columns, as hard ones do."""

    def get_in_batch_negatives(self, anchors: list[Any], candidates: list[list[Any]]) -> Iterator[list[Any]]:
        """None."""
        return iter(())


class Bench:
    """The lists of one step, and contestants for them."""

    def __init__(self, folder: Path, pairs: int) -> None:
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        self.folder = folder
        store = ShardStore(ShardCache(folder / "cache" / "shards"))
        shards = tuple(map(str, sorted((folder / "shards").glob("*.tar"))))
        self.index = cached_index(ShardSet((SourceShards("train", shards),)), folder / "cache", store, processes=1)
        self.order = Order(self.index, PlanSettings(0, pairs), folder)
        self.reader = InputReader(self.index, store)

    def contestant(self, setting: Setting) -> Contestant:
        """A fresh one."""
        return self._theirs(setting) if setting.is_st else self._ours(setting)

    def _dealt(self, setting: Setting, model: CrossEncoder) -> tuple[ListDealing, ListShare]:
        dealing = ListDealing(
            rank=0,
            world_size=1,
            page_tokens=page_tokens(model),
            mini_batch_size=dict.fromkeys(("document", "pair"), setting.mini_batch_size),
            mini_batch_num_tokens=dict.fromkeys(("document", "pair")),
            negatives=Negatives.of_index(self.index),
            num_hard=NEGATIVES if setting.hard else 0,
            num_in_batch=0 if setting.hard else NEGATIVES,
        )
        return dealing, dealing.slice_of(self.order, 0)

    def _decoded(self, share: ListShare) -> dict[int, Any]:
        rows = np.unique(np.concatenate([self.index.query_N[share.pairs_b], share.document_e]))
        return {row: self.reader[row] for row in rows.tolist()}

    def _ours(self, setting: Setting) -> Contestant:
        """The step of a training, its workers' jobs done in this process."""
        path, reranker = str(self.folder / setting.vocabulary), RerankerConfig()
        model = load_reranker(ModelConfig(name_or_path=path), reranker)
        preprocess, pick = PairPreprocessing(model, shares_images=True), PairPicker(model)
        dealing, share = self._dealt(setting, model)
        module = Reranker(model, bf16=False)
        world = World(0, 1, CPU)
        run = {"output_dir": "unused", "strategy": "single", "model": {"name_or_path": path}, "data": {"train": ["-"]}}
        optimizer = build_optimizer(module, TrainingConfig())
        strategy = build_strategy(parse_config(run), module, optimizer, world)
        strategy.train(True)
        step = RerankStep(strategy, world, reranker, 0, pick)

        def prepare(inputs: dict[int, Any]) -> ListBatch:
            done: list[Any] = []
            for job, _ in share.jobs:
                done.append((preprocess(job.units([inputs[row] for row in job.rows.tolist()])), []))
            return dealing.batch(self.order, 0, share, done, 0.0)

        def inputs() -> dict[int, Any] | ListBatch:
            decoded = self._decoded(share)
            return prepare(decoded) if setting.prepared else decoded

        def gradient(inputs: Any) -> tuple[float, float]:
            started = process_time()
            batch = inputs if setting.prepared else prepare(inputs)
            seconds = process_time() - started
            figures = StepFigures()
            step.gradient(batch, figures)
            return figures.loss, seconds

        return Contestant(model, inputs, gradient, lambda: strategy.step(LEARNING_RATE))

    def _theirs(self, setting: Setting) -> Contestant:
        """What sentence-transformers' trainer does in a step, with transformers' default optimizer."""
        model = CrossEncoder(str(self.folder / setting.vocabulary), device="cpu").train()
        _, share = self._dealt(setting, model)
        document_bn = share.document_e.reshape(len(share.pairs_b), -1)
        loss = GivenLists(model, mini_batch_size=setting.mini_batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
        preprocess = model.preprocess
        seconds = 0.0

        def timed(pairs: list[Any], **options: Any) -> Any:
            nonlocal seconds
            started = process_time()
            features = preprocess(pairs, **options)
            seconds += process_time() - started
            return features

        model.preprocess = timed

        def inputs() -> list[list[Any]]:
            decoded = self._decoded(share)
            queries = [decoded[row] for row in self.index.query_N[share.pairs_b].tolist()]
            columns = [queries, *([decoded[row] for row in column] for column in document_bn.T.tolist())]
            if setting.prepared:
                pairs = [pair for column in columns[1:] for pair in zip(queries, column, strict=True)]
                size = setting.mini_batch_size
                parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
                # Both passes ask for the mini-batches in order.
                prepared = cycle([preprocess(part, prompt=prompt) for part in parts])
                model.preprocess = lambda pairs, **options: dict(next(prepared))
            return columns

        def gradient(columns: list[list[Any]]) -> tuple[float, float]:
            nonlocal seconds
            seconds = 0.0
            value = loss(columns, None, prompt=prompt)
            value.backward()
            return float(value.detach()), seconds

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Contestant(model, inputs, gradient, update)


def measured(contestant: Contestant) -> tuple[float, float, int]:
    """(seconds of a step, of its preprocessing, most memory)."""
    start_bytes = bytes_at_rest()
    inputs = contestant.inputs()
    started = process_time()
    _, preprocessing = contestant.gradient(inputs)
    contestant.update()
    return process_time() - started, preprocessing, high_water_bytes() - start_bytes


def trial(bench: Bench, setting: Setting) -> tuple[float, int]:
    """(seconds, memory) of a contestant, the first step left out."""
    contestant = bench.contestant(setting)
    runs = [measured(contestant) for _ in range(TRIAL_STEPS)][1:]
    return statistics.median(seconds for seconds, _, _ in runs), max(peak for _, _, peak in runs)


def differences(bench: Bench, ours: Setting, theirs: Setting) -> tuple[float, float]:
    """Relative difference of the losses and of the gradients."""
    losses: list[float] = []
    gradients: list[dict[str, Tensor]] = []
    for setting in (ours, theirs):
        contestant = bench.contestant(setting)
        losses.append(contestant.gradient(contestant.inputs())[0])
        named = contestant.model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    return abs(losses[0] - losses[1]) / losses[1], relative_error(*gradients)


def rounds_of(bench: Bench, settings: dict[str, Setting], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, of preprocessing) of every contestant in each round; the first one, a warm-up, is left out."""
    contestants = {name: bench.contestant(setting) for name, setting in settings.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            seconds, preprocessing, _ = measured(contestant)
            if number:
                times[name].append((seconds, preprocessing))
    return times


class Fresh:
    """Runs functions of a `Bench` in processes of their own, forked: importing all this takes ten seconds."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns, by way of JSON."""
        out = self.folder / "out.json"
        mp.start_processes(_into, (out, self.folder, self.pairs, function, arguments), nprocs=1, start_method="fork")
        return json.loads(out.read_text(encoding="utf-8"))


def _into(_: int, out: Path, folder: Path, pairs: int, function: Callable[..., Any], arguments: Any) -> None:
    out.write_text(json.dumps(function(Bench(folder, pairs), *arguments)), encoding="utf-8")


def prepare(_: int, folder: Path, pairs: int) -> None:
    """Shards, and a model of each vocabulary, as sentence-transformers saves it."""
    write_pairs(folder, pairs, negatives=NEGATIVES)
    # The template's words are tokens, as they are to a large model; each has to occur twice for that.
    template = Path(load_reranker.__code__.co_filename).with_name("reranker.jinja").read_text(encoding="utf-8")
    for name, size in VOCABULARIES.items():
        texts = (" ".join(WORDS), template, "yes", "no") * 2
        raw = save_tiny_model(folder / f"raw-{name}", texts=texts, vocab_size=size)
        load_plain_reranker(ModelConfig(name_or_path=str(raw)), RerankerConfig()).save(str(folder / name))


def best_of_st(fresh: Fresh) -> int:
    """The smallest mini-batch size, for it needs the least memory, whose step takes at most a tenth more than any."""
    seconds = {}
    for size in ST_MINI_BATCH_SIZES:
        seconds[size], memory = fresh(trial, Setting(True, size))
        print(
            f"  sentence-transformers, mini-batches of {size:2} {seconds[size]:6.2f} s {memory / 1e6:5.0f} MB",
            flush=True,
        )
    return next(size for size in ST_MINI_BATCH_SIZES if seconds[size] <= 1.1 * min(seconds.values()))


def compare(fresh: Fresh, rounds: int) -> dict[str, Any]:
    """All figures."""
    size = best_of_st(fresh)
    both = {"sentence-transformers": Setting(True, size), "farnear": Setting(False, size)}
    loss_difference, gradient_difference = fresh(differences, *reversed(both.values()))
    print(f"relative differences: loss {loss_difference:.1e}, gradient {gradient_difference:.1e}", flush=True)
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        ", prepared": {"prepared": True},
        ", hard negatives": {"hard": True},
        ", large vocabulary": {"vocabulary": "large"},
    }
    settings = {name + kind: replace(one, **keys) for kind, keys in kinds.items() for name, one in both.items()}
    memory = {}
    for name, setting in settings.items():
        if not setting.prepared:
            _, memory[name] = fresh(trial, setting)
            print(f"  {name:40} {memory[name] / 1e6:5.0f} MB", flush=True)
    times = fresh(rounds_of, settings, rounds)
    for name in settings:
        seconds, preprocessing = (statistics.median(column) for column in zip(*times[name], strict=True))
        print(f"{name:42} {seconds:6.2f} s, {preprocessing:5.2f} of them preprocessing")

    def speedup(kind: str) -> float:
        theirs, ours = (times[name + kind] for name in both)
        return round(statistics.median(a / b for (a, _), (b, _) in zip(theirs, ours, strict=True)), 3)

    def of_memory(kind: str) -> float:
        theirs, ours = (memory[name + kind] for name in both)
        return round(ours / theirs, 3)

    return {
        "speedup_vs_st": speedup(""),
        "speedup_vs_st_prepared": speedup(", prepared"),
        "speedup_vs_st_hard_negatives": speedup(", hard negatives"),
        "speedup_vs_st_large_vocabulary": speedup(", large vocabulary"),
        "peak_memory_vs_st": of_memory(", large vocabulary"),
        "peak_memory_vs_st_small_vocabulary": of_memory(""),
        "peak_memory_vs_st_hard_negatives": of_memory(", hard negatives"),
        "loss_difference": loss_difference,
        "gradient_difference": gradient_difference,
        "mini_batch_size": size,
    }


def main() -> int:
    """Set up, measure in fresh processes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="lists of the batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each contestant (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="farnear-bench-") as name:
        folder = Path(name)
        # Not here: threads that are started in this process are missing in those that are forked from it.
        mp.start_processes(prepare, (folder, options.pairs), nprocs=1, start_method="fork")
        print(json.dumps(compare(Fresh(folder, options.pairs), options.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
