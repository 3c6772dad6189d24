"""One training step of a 2B model on one GPU: farnear against sentence-transformers, and ZeRO against no cache at all.

    python benchmarks/gpu_step.py                         the step; begins no round after nine minutes
    python benchmarks/gpu_step.py --attention varlen      without padding (or flash_attention_2, where it is installed)
    python benchmarks/gpu_step.py --zero                  the cached gradient under zero1, zero2, zero3; needs DeepSpeed
    python benchmarks/gpu_step.py --tiny [--zero]         the same with a toy, on any machine: shows that it runs

The model has Qwen3-VL-Embedding-2B's exact shape and random weights, made on the GPU itself: nothing is downloaded and
nothing of that size written. It computes in bf16 from fp32 weights. Pages are noise of 600 x 600 pixels, 64 of them,
which come back under new hashes, and queries have mixed lengths. A step is timed from features in pinned host memory to
changed weights, so making features is left out on both sides. The contestants are

    sentence-transformers   CachedMultipleNegativesRankingLoss inside MatryoshkaLoss, under autocast around the model's
                            forward as accelerate puts it there, pages' patches embedded by a convolution as
                            transformers does it; at the best of some mini-batch sizes, and of some numbers of tokens
                            where the installed version knows them
    farnear                 the cached step; at the best of some token budgets
    farnear, N kept         the same with as many graphs kept from pass one as fit

All of them train one and the same model with one and the same AdamW, in one process and in turns. Two copies would fit
(34 GB each: weights, gradients and two moments), but each would then leave the other less memory for its mini-batches
than it has in a training of its own, and the best sizes are what is looked for. The speed does not depend on the values
of the weights.

Sizes are chosen on a small batch; then every contestant takes the whole step once to warm up, and rounds follow as time
allows. Ratios are medians over rounds. MFU is three forwards' FLOPs over the time of the two passes over the card's
dense peak. It is told of each pass alone too, with what that pass computes: one forward in pass one, a forward and a
backward (three forwards' worth) in pass two. FLOPs are those of the tokens without padding, by a formula of ours, and
so the same for all contestants and attentions; what farnear counts for its metrics.jsonl is compared with it.

`--zero` takes one SGD step of a small model in fp32 under each stage, with overlap_comm on and off, buckets that hold a
fraction of the gradient, and half of the graphs kept. The error is that of the update against the gradient that
strategy single computes without a cache, as in exactness.py. Exit code 1 when it is above the bound there.

What a machine with torch, sentence-transformers, transformers, accelerate, pyarrow, xxhash, pyyaml and psutil lacks has
to travel as wheels: pydantic, pydantic-core, annotated-types, typing-inspection; for `--zero` also deepspeed (`pip
wheel --no-deps deepspeed` builds it, as pure Python) and hjson. farnear itself needs PYTHONPATH=src:benchmarks only.
The last line is JSON.
"""

import argparse
import gc
import importlib.util
import inspect
import json
import math
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import sentence_transformers
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from exactness import BOUND_FP32
from gpu_inputs import WORDS, Inputs, Setting
from gpu_zero import zero_figures
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import Tensor
from transformers import AutoModel, Qwen3VLConfig
from transformers.utils import logging as transformers_logging

from farnear.config import parse_config
from farnear.data.batch import MiniBatch, RankBatch
from farnear.data.dealing import SIDES
from farnear.errors import UserError
from farnear.model.attention import VARLEN, tell_towers
from farnear.model.attention_choice import check_attention
from farnear.model.embedder import Embedder, to_device
from farnear.model.features import FeatureMerger
from farnear.model.load import load_model
from farnear.model.patches import PatchConv3d, multiply_patches
from farnear.model.tiny import save_tiny_model
from farnear.parallel.strategy import build_strategy
from farnear.parallel.world import World
from farnear.training.cache import CachedStep
from farnear.training.engine import casts_kept
from farnear.training.metrics import model_flops_utilisation, peak_memory_bytes
from farnear.training.optim import build_optimizer
from farnear.training.step import StepFigures

# As the config.json of Qwen/Qwen3-VL-Embedding-2B says.
TEXT_2B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "initializer_range": 0.02,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
VISION_2B = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
    "initializer_range": 0.02,
}
# Mini-batches that go through pass one together: what a run has where its file says nothing. Flash attention's features
# of text, which come without padding, cannot be put together, so that a run finds out that it is 1.
TOGETHER = {"sdpa": 4, "varlen": 4, "flash_attention_2": 1}
# Of the device's memory; the rest is lost between the allocator's blocks.
SHARE_OF_MEMORY = 0.95


FULL = Setting(
    TEXT_2B, VISION_2B, 1024, 128, (600,), 64, (4, 8, 16, 24), (2048, 1536, 1024, 512, 256, 128, 64), bf16=True
)
TINY = Setting({"num_key_value_heads": 1}, {"depth": 3}, 16, 8, (96,), 4, (2, 4), (64, 32, 16), bf16=False)


class Clock:
    """Says where the time goes, and whether there is some left.

    Args:
        limit_s: Seconds from now in which everything should be done.
    """

    def __init__(self, limit_s: float) -> None:
        self._started, self.limit_s = perf_counter(), limit_s

    @property
    def elapsed_s(self) -> float:
        return perf_counter() - self._started

    def say(self, text: str) -> None:
        """A line, with the seconds so far and those there are."""
        print(f"[{self.elapsed_s:4.0f}/{self.limit_s:.0f} s] {text}", flush=True)


@dataclass
class Contestant:
    """Has its batch of some pairs, and takes a step with it.

    Attributes:
        batch: Features on the host, for a number of pairs.
        step: Gives the seconds of each phase.
        pages_at_once: That a mini-batch has the tokens of; farnear's only.
        kept: Mini-batches that keep their graph.
    """

    name: str
    batch: Callable[[int], Any]
    step: Callable[[Any], dict[str, float]]
    pages_at_once: int = 0
    kept: int = 0


@dataclass
class Taken:
    """Steps that one contestant took, in order."""

    seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0

    def median(self, phase: str) -> float:
        """Seconds."""
        return statistics.median(phases[phase] for phases in self.phases)


class Bench:
    """One model, its optimizer, and the contestants that train it in turn."""

    def __init__(self, folder: Path, setting: Setting, attention: str, device: torch.device) -> None:
        self.setting, self.device = setting, device
        tree: dict[str, Any] = {
            "output_dir": "unused",
            "strategy": "single",
            "model": {"name_or_path": str(folder), "attn_implementation": attention},
            "data": {"train": ["unused"]},
            "loss": {"matryoshka_dims": setting.dims},
            "training": {"bf16": setting.bf16, "global_batch_size": setting.pairs},
        }
        self.config = parse_config(tree)
        check_attention(self.config.model, device, half_precision=setting.bf16)
        toy = load_model(self.config.model)
        self.inputs = Inputs(toy, setting)
        self.model = of_shape(toy, setting, attention, device)
        multiply_patches(self.model)
        self.world = World(0, 1, device)
        module = Embedder(self.model, bf16=setting.bf16)
        self.optimizer = build_optimizer(module, self.config.training)
        self.strategy = build_strategy(self.config, module, self.optimizer, self.world)
        self.strategy.train(True)
        self.accounted_flops = math.nan

    @property
    def tokens_of_a_page(self) -> int:
        """The largest."""
        return int(self.inputs.page_tokens_n.max())

    def ours(self, pages_at_once: int, *, kept: int = 0) -> Contestant:
        """The cached step, as `farnear.training.engine` sets it up; ``kept`` mini-batches keep their graph."""
        budget = pages_at_once * self.tokens_of_a_page
        cached_step: list[CachedStep] = []

        def take(batch: RankBatch) -> dict[str, float]:
            if not cached_step:
                share = (kept + 0.5) / len(batch.mini_batches) if kept else 0.0
                cached_step.append(self.cached_step(min(1.0, share)))
            figures = StepFigures()
            cached_step[0].gradient(batch, figures, scale=self.config.loss.scale)
            phases = dict(figures.seconds)
            phases["optimizer"] = seconds_of(lambda: self.strategy.step(1e-6), self.device)
            if len(batch.pairs_b) == self.setting.pairs:
                self.accounted_flops = figures.model_flops
            return phases

        name = f"farnear, {budget} tokens" + (f", {kept} kept" if kept else "")
        return Contestant(name, lambda pairs: self.inputs.cut_batch(pairs, budget), take, pages_at_once, kept)

    def cached_step(self, keep_graphs: float) -> CachedStep:
        """With what a run has where its file says nothing."""
        return CachedStep(
            self.strategy,
            self.world,
            self.config.loss,
            0,
            keep_graphs=keep_graphs,
            together=TOGETHER[str(self.config.model.attn_implementation)],
            merge=FeatureMerger(self.model),
            cast_once=casts_kept(self.config, self.world),
        )

    def theirs(self, **mini_batches: int) -> Contestant:
        """sentence-transformers' cached step, with what its trainer does around it.

        Args:
            mini_batches: ``mini_batch_size`` or ``mini_batch_num_tokens``.
        """
        # A shell of its own around the same modules, for its forward is replaced.
        model = SentenceTransformer(modules=list(self.model), device=str(self.device)).train()
        if self.setting.bf16:
            model.forward = convert_outputs_to_fp32(torch.autocast(self.device.type, torch.bfloat16)(model.forward))
        loss = CachedMultipleNegativesRankingLoss(model, scale=self.config.loss.scale, **mini_batches)
        with_dims = MatryoshkaLoss(model, loss, list(self.setting.dims))
        parameters = list(model.parameters())
        spent = {"loss": 0.0}
        original = loss.calculate_loss

        def calculate_loss(*args: Any, **kwargs: Any) -> Any:
            results: list[Any] = []
            spent["loss"] += seconds_of(lambda: results.append(original(*args, **kwargs)), self.device)
            return results[0]

        loss.calculate_loss = calculate_loss

        @convolved_patches(self.model)
        def take(features: list[dict[str, Any]]) -> dict[str, float]:
            spent["loss"] = 0.0
            losses: list[Tensor] = []

            def forward() -> None:
                on_device = [to_device(of_side, self.device) for of_side in features]
                losses.append(with_dims(on_device, torch.empty(0)))

            def update() -> None:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.training.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

            phases = {"pass_one": seconds_of(forward, self.device) - spent["loss"], "loss": spent["loss"]}
            phases["pass_two"] = seconds_of(lambda: losses.pop().backward(), self.device)
            phases["optimizer"] = seconds_of(update, self.device)
            return phases

        (kind, size), *_ = mini_batches.items()
        unit = "tokens" if kind == "mini_batch_num_tokens" else "inputs"
        return Contestant(f"sentence-transformers, {size} {unit}", self.inputs.whole_batch, take)

    def graphs_that_fit(self, pages_at_once: int, peak_bytes: int) -> int:
        """About how many of the last mini-batches can keep their graph beside what a step without any needs.

        They are used up before the first page is computed again, so they may take the place of its graph too.
        """
        mini_batches = self.inputs.cut_batch(self.setting.pairs, pages_at_once * self.tokens_of_a_page).mini_batches
        if self.device.type == "cpu":
            return len(mini_batches) // 2
        queries = [mini_batch for mini_batch in mini_batches if mini_batch.side == "query"]
        bytes_of = {side: self._graph_bytes(side, mini_batches) for side in SIDES}
        total = torch.cuda.get_device_properties(self.device).total_memory
        free = SHARE_OF_MEMORY * total - peak_bytes + bytes_of["document"]
        of_queries = min(len(queries), int(free / bytes_of["query"]))
        of_pages = int((free - of_queries * bytes_of["query"]) / bytes_of["document"])
        return max(0, min(len(mini_batches), of_queries + (of_pages if of_queries == len(queries) else 0)))

    def _graph_bytes(self, side: str, mini_batches: Sequence[MiniBatch]) -> int:
        text = next(one for one in mini_batches if one.side == "query")
        largest = next(one for one in mini_batches if one.side == side)
        with casts_kept(self.config, self.world)():
            self.strategy.forward(to_device(text.features, self.device))  # which leaves the casts of the weights
            before = torch.cuda.memory_allocated(self.device)
            graph = self.strategy.forward(to_device(largest.features, self.device))
            taken = torch.cuda.memory_allocated(self.device) - before
            del graph
        return max(1, taken)

    def take(self, contestant: Contestant, batch: Any, taken: Taken) -> None:
        """One step, timed."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        phases: dict[str, float] = {}
        taken.seconds.append(seconds_of(lambda: phases.update(contestant.step(batch)), self.device))
        taken.phases.append(phases)
        taken.peak_bytes = max(taken.peak_bytes, peak_memory_bytes(self.device))

    def tried(self, contestant: Contestant, pairs: int, steps: int) -> Taken | None:
        """Some steps of a batch, the first of them forgotten if there are more; None where memory does not suffice."""
        taken, fits = Taken(), True
        batch = contestant.batch(pairs)
        try:
            for _ in range(steps):
                self.take(contestant, batch, taken)
        except torch.OutOfMemoryError:
            fits = False
        if not fits:
            # Outside of the handler, in which the failed step's frames still hold their tensors.
            self.optimizer.zero_grad(set_to_none=True)
            release(self.device)
            return None
        return Taken(taken.seconds[-1:], taken.phases[-1:], taken.peak_bytes)


def of_shape(toy: SentenceTransformer, setting: Setting, attention: str, device: torch.device) -> SentenceTransformer:
    """A model with the toy's tokenizer and processor, whose towers have another shape and random weights on the device.

    The words of the toy are few among those that the embedding has rows for, which costs nothing and changes nothing.
    """
    torch.manual_seed(0)
    with torch.device(device):
        towers: Any = AutoModel.from_config(
            shaped_config(toy, setting), attn_implementation=attention, dtype=torch.float32
        )
    if attention == VARLEN:
        tell_towers(towers)
    transformer: Any = toy[0]
    transformer.model = towers
    modules = [transformer, Pooling(towers.config.text_config.hidden_size, "lasttoken"), Normalize()]
    return SentenceTransformer(modules=modules, device=str(device)).train()


@contextmanager
def convolved_patches(model: SentenceTransformer) -> Iterator[None]:
    """What `multiply_patches` changed is undone within: sentence-transformers computes as transformers has it."""
    changed = [module for module in model.modules() if type(module) is PatchConv3d]
    for module in changed:
        module.__class__ = torch.nn.Conv3d
    try:
        yield
    finally:
        multiply_patches(model)


def shaped_config(toy: SentenceTransformer, setting: Setting) -> Qwen3VLConfig:
    """The toy's config with the setting's shape in it; special tokens keep their numbers."""
    tree = toy[0].model.config.to_dict()
    return Qwen3VLConfig.from_dict(
        {
            **tree,
            "text_config": {**tree["text_config"], **setting.text},
            "vision_config": {**tree["vision_config"], **setting.vision},
        }
    )


def step_figures(setting: Setting, attention: str, device: torch.device, rounds: int, clock: Clock) -> dict[str, Any]:
    """The contest."""
    with tempfile.TemporaryDirectory(prefix="farnear-bench-") as folder:
        save_tiny_model(folder, texts=[" ".join(WORDS)], hidden_size=64, num_layers=2)
        bench = Bench(Path(folder), setting, attention, device)
    parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    flops = bench.inputs.forward_flops(bench.model[0].model.config, setting.pairs)
    clock.say(
        f"{parameters / 1e9:.3f} B parameters, {bench.tokens_of_a_page} tokens a page, {setting.pairs} pairs, "
        f"{flops / 1e12:.3g} TFLOP a forward of all"
    )

    def fastest(candidates: Iterable[Contestant]) -> list[Contestant]:
        """By their trial, the fastest first; those without the memory left out."""
        seconds: list[tuple[float, Contestant]] = []
        for candidate in candidates:
            if seconds and clock.elapsed_s > 0.4 * clock.limit_s:
                clock.say("  no time for further sizes")
                break
            trial = bench.tried(candidate, setting.trial_pairs, 2)
            told = (
                f"{trial.seconds[0]:7.3f} s, {trial.peak_bytes / 1e9:6.1f} GB" if trial else "memory does not suffice"
            )
            clock.say(f"  {candidate.name:44} {told}")
            if trial:
                seconds.append((trial.seconds[0], candidate))
        return [candidate for _, candidate in sorted(seconds, key=lambda one: one[0])]

    def first_that_fits(candidates: Iterable[Contestant]) -> tuple[Contestant, int] | None:
        """With the peak of its step of the whole batch."""
        for candidate in candidates:
            warm_up = bench.tried(candidate, setting.pairs, 1)
            told = f"{warm_up.seconds[0]:7.3f} s" if warm_up else "memory does not suffice"
            clock.say(f"  {candidate.name:44} {told}")
            if warm_up:
                return candidate, warm_up.peak_bytes
        return None

    clock.say(f"steps of {setting.trial_pairs} pairs, to find the best sizes")
    own_by_speed = fastest(bench.ours(n) for n in setting.pages_at_once)
    st_by_speed = fastest(bench.theirs(**size) for size in st_sizes(setting, bench.tokens_of_a_page))
    clock.say(f"steps of {setting.pairs} pairs, to warm up")
    own, theirs = first_that_fits(own_by_speed), first_that_fits(st_by_speed)
    if own is None or theirs is None:
        raise UserError("no mini-batch fits into this GPU's memory; a card of 80 GB or more is needed, or --tiny")
    most = bench.graphs_that_fit(own[0].pages_at_once, own[1])
    release(device)
    counts = dict.fromkeys(count for count in (most, 3 * most // 4, most // 2) if count > 0)
    kept = first_that_fits(bench.ours(own[0].pages_at_once, kept=count) for count in counts)

    contestants = {"st": theirs[0], "none": own[0], **({"kept": kept[0]} if kept else {})}
    taken = {role: Taken() for role in contestants}
    for number in range(1, rounds + 1):
        started = clock.elapsed_s
        for role, contestant in contestants.items():
            bench.take(contestant, contestant.batch(setting.pairs), taken[role])
        clock.say(f"round {number}: " + ", ".join(f"{role} {one.seconds[-1]:.3f} s" for role, one in taken.items()))
        if clock.elapsed_s + (clock.elapsed_s - started) > clock.limit_s and number < rounds:
            clock.say("no time for another round")
            break
    print(HEADER)
    for role, contestant in contestants.items():
        print(row_of(contestant.name, taken[role], setting.pairs, flops, device))

    def ratio(role: str) -> float:
        return statistics.median(a / b for a, b in zip(taken["st"].seconds, taken[role].seconds, strict=True))

    best = max((role for role in contestants if role != "st"), key=ratio)
    plain, chosen = taken["none"], taken[best]
    seconds = statistics.median(chosen.seconds)
    return {
        **machine(device),
        "attention": attention,
        "pairs": setting.pairs,
        "page_pixels": setting.page_side[0],
        "parameters": parameters,
        "rounds": len(chosen.seconds),
        "farnear": contestants[best].name,
        "sentence-transformers": contestants["st"].name,
        "speedup_vs_st": ratio(best),
        "speedup_vs_st_nothing_kept": ratio("none"),
        "kept": contestants[best].kept,
        "mini_batches": len(own[0].batch(setting.pairs).mini_batches),
        "mfu": step_mfu(chosen, flops, device),
        # A kept graph is computed in pass one and used in pass two: only without any does each pass stand alone.
        "mfu_pass_one": model_flops_utilisation(flops, {"pass_one": plain.median("pass_one"), "pass_two": 0.0}, device),
        "mfu_pass_two": model_flops_utilisation(
            3 * flops, {"pass_one": 0.0, "pass_two": plain.median("pass_two")}, device
        ),
        "mfu_st": step_mfu(taken["st"], flops, device),
        "loss_share": chosen.median("loss") / seconds,
        "loss_share_st": taken["st"].median("loss") / statistics.median(taken["st"].seconds),
        "step_s": seconds,
        "pages_per_s": setting.pairs / seconds,
        "pages_per_s_st": setting.pairs / statistics.median(taken["st"].seconds),
        "peak_gb": chosen.peak_bytes / 1e9,
        "peak_gb_nothing_kept": plain.peak_bytes / 1e9,
        "peak_gb_st": taken["st"].peak_bytes / 1e9,
        "accounted_flops": bench.accounted_flops / (3 * flops),
    }


def st_sizes(setting: Setting, tokens_of_a_page: int) -> Iterator[dict[str, int]]:
    """What sentence-transformers' loss is tried with."""
    for pages in setting.pages_at_once:
        yield {"mini_batch_size": pages}
    if "mini_batch_num_tokens" in inspect.signature(CachedMultipleNegativesRankingLoss).parameters:
        for pages in setting.pages_at_once:
            yield {"mini_batch_num_tokens": pages * tokens_of_a_page}


HEADER = (
    f"{'':44} {'pages/s':>8} {'step s':>8} {'pass one':>8} {'loss':>8} {'pass two':>8} {'optim.':>8} {'MFU':>6} "
    f"{'peak GB':>8}"
)


def row_of(name: str, taken: Taken, pairs: int, flops: float, device: torch.device) -> str:
    """Of the table."""
    seconds = statistics.median(taken.seconds)
    phases = " ".join(f"{taken.median(phase):8.3f}" for phase in ("pass_one", "loss", "pass_two", "optimizer"))
    mfu = step_mfu(taken, flops, device)
    told = "-" if mfu is None else f"{mfu:.3f}"
    return f"{name:44} {pairs / seconds:8.1f} {seconds:8.3f} {phases} {told:>6} {taken.peak_bytes / 1e9:8.1f}"


def step_mfu(taken: Taken, flops: float, device: torch.device) -> float | None:
    """Three forwards over both passes."""
    phases = {phase: taken.median(phase) for phase in ("pass_one", "pass_two")}
    return model_flops_utilisation(3 * flops, phases, device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """From an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def release(device: torch.device) -> None:
    """Give memory back that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, str]:
    """What the figures are of."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentence_transformers": sentence_transformers.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, help=f"the global batch (default: {FULL.pairs}; {TINY.pairs} with --tiny)")
    parser.add_argument("--attention", choices=TOGETHER, default="sdpa", help="of both sides (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each contestant, at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=540.0, help="in which rounds are begun (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a toy in fp32, on the CPU if there is no GPU")
    parser.add_argument("--zero", action="store_true", help="the gradient under ZeRO instead of the step's speed")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        print("no CUDA GPU is visible here, and a step of 2 B parameters needs one; --tiny runs a toy", file=sys.stderr)
        return 2
    if options.zero and importlib.util.find_spec("deepspeed") is None:
        print("--zero needs DeepSpeed, which is not installed here; pip install deepspeed", file=sys.stderr)
        return 2
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    clock = Clock(options.seconds)
    setting = TINY if options.tiny else FULL
    if options.pairs:
        setting = replace(setting, pairs=options.pairs, trial_pairs=min(options.pairs, setting.trial_pairs))
    try:
        if options.zero:
            figures = {**machine(device), **zero_figures(device, clock.say)}
            print(json.dumps(figures))
            return 0 if figures["worst_error"] <= BOUND_FP32 else 1
        figures = step_figures(setting, options.attention, device, options.rounds, clock)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rounded = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in figures.items()}
    print(json.dumps(rounded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
