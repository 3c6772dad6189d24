"""Is the gradient of a reranker's step the plain one? Every head and loss, strategy and number of ranks, one SGD step.

    python benchmarks/exactness_reranker.py            all cases, about ten minutes on two cores
    python benchmarks/exactness_reranker.py --slice    the few that run in `make test`

The reference is a single process that puts every pair of every list through sentence-transformers' own modules at once,
pixels and all, with the losses written out below from their definitions: no step, no turns, no shared towers, no
ranks. farnear's side is what a training is: shards, plan, dealing, workers' jobs, step, strategy. Which pages a list
holds is taken from `farnear.data.lists` on both sides; what it may hold is tested on its own.

The error is that of `benchmarks/exactness.py`. What it may be is told by the plain gradient itself, as in `farnear
doctor`: 1.5 times what that one loses by its precision on the same lists, uncached and in one process. For half
precision this is its distance from fp32. For fp32 it is that from fp64 (but for what a model computes in fp32 whatever
its weights are, its norms for instance), or 1e-5 if that is more: two lists alone can have a gradient so small beside
its terms that fp32 is 1.4e-5 off by itself. The last line is JSON. Exit code 1 when a bound is broken.
"""

import io
import json
import math
import multiprocessing
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from exactness import (
    BOUND_FP32,
    SEED,
    free_port,
    join_ranks,
    main,
    parameters_split,
    relative_error,
    run_config,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional

from farnear.data.budget import PageTokens
from farnear.data.index import Index
from farnear.data.index_cache import ShardSet, SourceShards, cached_index
from farnear.data.list_dealing import ListBatch, ListDealing
from farnear.data.lists import Lists, lists_of_step
from farnear.data.loader import TrainLoader
from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.read import InputReader
from farnear.data.shard_cache import ShardCache
from farnear.data.shard_store import ShardStore
from farnear.model.embedder import to_device
from farnear.model.load_reranker import load_plain_reranker, load_reranker
from farnear.model.pairs import PairPicker, PairPreprocessing
from farnear.model.pixels import page_tokens
from farnear.model.reranker import Reranker
from farnear.model.tiny import save_tiny_model
from farnear.model.trainable import choose_trainable
from farnear.parallel.strategy import build_strategy
from farnear.parallel.world import World
from farnear.reranker_section import RerankerConfig
from farnear.sections import ModelConfig
from farnear.training.rerank_step import RerankStep
from farnear.training.step import StepFigures

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
VARIANTS = ("zero3-mini_batch", "fsdp2-mini_batch", "zero3-offload")
WORLD_SIZES = (1, 2, 3)
MODELS = {"tied": True, "untied": False}
# Rounding of another order loses another amount.
OVER_PLAIN = 1.5


@dataclass(frozen=True)
class Case:
    """Lists and an objective.

    Attributes:
        pairs: G; their pages are of three sizes, the last one is a text, and every second one has hard negatives.
        pair: Most entries of a turn; below a list's length there is a gradient cache.
        document: Most pages of a job.
        pair_tokens: Most tokens of a turn.
        shares: Whether a page is seen once a step.
        broken: A page that cannot be read: the positive of one pair, a negative of others.
        model: "tied" or "untied": the language-model head.
        freeze, lora: As in the section `model` of a run file.
    """

    name: str
    reranker: RerankerConfig = field(default_factory=lambda: RerankerConfig(head="linear"))
    pairs: int = 6
    pair: int | None = 12
    document: int | None = 2
    pair_tokens: int | None = None
    shares: bool = True
    keep_graphs: float = 0.0
    broken: bool = False
    model: str = "tied"
    freeze: tuple[str, ...] = ()
    lora: bool = False


def head(name: str, **keys: Any) -> RerankerConfig:
    """A section `reranker`."""
    return RerankerConfig.model_validate({"head": name, "num_negatives": 3, **keys})


CASES = (
    Case("whole_lists", head("linear")),
    Case("cached", head("linear"), pair=2),
    Case("cached_half_kept", head("linear"), pair=2, keep_graphs=0.5),
    Case("whole_lists_kept", head("linear"), keep_graphs=1.0),
    Case("by_tokens", head("linear"), pair=None, pair_tokens=900, document=None),
    Case("not_apart", head("linear"), shares=False),
    Case("not_apart_cached", head("linear"), pair=2, shares=False),
    Case("yes_no", head("yes_no")),
    Case("yes_no_untied", head("yes_no"), model="untied", pair=2),
    Case("yes_no_linear", head("yes_no_linear")),
    Case("broken_page", head("linear"), broken=True),
    Case("fewer_lists_than_ranks", head("yes_no"), pairs=2),
    Case("frozen_tower", head("yes_no"), freeze=("visual",)),
    Case("head_alone", head("linear"), freeze=("0",), pair=2),
    Case("lora", head("yes_no"), lora=True),
)
# Of the losses, where ranks matter least: the sums are those of the listwise one.
LOSS_CASES = (
    Case("pairwise_logistic", head("linear", loss="pairwise_logistic")),
    Case("binary", head("linear", loss="binary"), pair=2),
    Case("margin_mse", head("linear", loss="margin_mse", num_negatives=0)),
    Case("listwise_distillation", head("linear", loss="listwise_distillation", num_negatives=0), pair=2),
    Case("identity", head("linear", activation_fn="identity", scale=1.0)),
)
CASES_OF_VARIANTS = ("whole_lists", "cached", "fewer_lists_than_ranks")
# Of each number of ranks: the cases that run in `make test`.
SLICE = {1: ("cached_half_kept", "broken_page"), 2: ("yes_no", "cached"), 3: ()}


def write_shard(path: Path, case: Case) -> None:
    """The pairs of a case as a shard."""
    random = np.random.default_rng(SEED)

    def png(i: int) -> bytes:
        pixels = random.integers(0, 255, (64 + 32 * (i % 3), 96, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        return stream.getvalue()

    with tarfile.open(path, "w") as tar:
        for i in range(case.pairs):
            members = {"json": json.dumps({"query": f"where is the {'red ' * i}chart number {i}?"}).encode()}
            if case.pairs > 2 and i == case.pairs - 1:
                members["txt"] = b"a page of text alone"
            else:
                members["png"] = png(i)
            for n in range(2 if i % 2 == 0 else 0):
                members[f"neg{n}.png"] = png(i + n)
            if case.broken and i == 1:
                members["png"] = members["png"][:200]  # its header is whole, and says its size
            for name, data in members.items():
                info = tarfile.TarInfo(f"{i:03d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def negatives_of(index: Index, case: Case) -> Negatives:
    """The shard's hard negatives, with a made-up teacher."""
    negatives = Negatives.of_index(index)
    random = np.random.default_rng(SEED)
    return replace(
        negatives,
        teacher=random.normal(size=len(negatives.rows)).astype(np.float32),
        positive_teacher=random.normal(size=len(index.positives)).astype(np.float32) + 1,
    )


def reference_gradient(
    model_path: str, case: Case, lists: Lists, index: Index, store: ShardStore, precision: str
) -> tuple[dict[str, Tensor], float]:
    """Gradient of the mean loss over all lists, all pairs at once, by the definitions; and the weights' norm.

    In half precision it is that of farnear's module, which computes its head in fp32.
    """
    config = model_config(model_path, case)
    is_half = precision in ("bf16", "fp16")
    model = (load_reranker if is_half else load_plain_reranker)(config, case.reranker)
    prepare(model, config)
    model.train()
    if precision == "fp64":
        model.double()
    module = Reranker(model, bf16=precision == "bf16", fp16=precision == "fp16")
    reader = InputReader(index, store)
    pairs, list_e, teacher_e = [], [], []
    bad = set()
    for number, pair in enumerate(lists.pair_G.tolist()):
        query = {"text": reader[int(index.query_N[pair])]}
        for entry in range(*lists.start_G1[number : number + 2].tolist()):
            try:
                page = reader[int(lists.document_E[entry])]
            except Exception:
                bad.add(entry)
                continue
            pairs.append((query, {"text": page} if isinstance(page, str) else page))
            list_e.append(number)
            teacher_e.append(lists.teacher_E[entry])
    prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
    features = to_device(model.preprocess(pairs, prompt=prompt), torch.device("cpu"))
    score_e = module(features) if is_half else model(features)["scores"].squeeze(-1)
    losses = []
    for number in range(len(lists.pair_G)):
        own = torch.tensor([place for place, owner in enumerate(list_e) if owner == number], dtype=torch.int64)
        if int(lists.start_G1[number]) in bad or (len(own) < 2 and case.reranker.loss != "binary"):
            continue
        teacher = torch.tensor([teacher_e[place] for place in own])
        losses.append(loss_of_list(score_e[own], teacher, case.reranker))
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    norm = float(torch.stack([p.detach().norm() for p in trained.values()]).norm())
    # Small gradients would be zeros in fp16; too large a scale makes others infinite.
    for scale in (2.0**power for power in (range(16, 0, -1) if precision == "fp16" else (0,))):
        model.zero_grad()
        (scale * torch.stack(losses).mean()).backward(retain_graph=True)
        gradient = {name: p.grad / scale for name, p in trained.items() if p.grad is not None}
        if all(bool(g.isfinite().all()) for g in gradient.values()):
            break
    return gradient, norm


def errors_of_plain(gradient: dict[str, Tensor], precisions: tuple[str, ...], *about: Any) -> dict[str, float]:
    """What an update may lose in each precision, given the plain gradient in fp32."""
    allowed = {}
    for precision in precisions:
        other, _ = reference_gradient(*about, "fp64" if precision == "fp32" else precision)
        allowed[precision] = OVER_PLAIN * relative_error(other, gradient)
    return {**allowed, "fp32": max(BOUND_FP32, allowed["fp32"])}


def loss_of_list(score: Tensor, teacher: Tensor, reranker: RerankerConfig) -> Tensor:
    """The losses as their papers have them: the positive stands first."""
    if reranker.loss == "listwise":
        activated = torch.sigmoid(score) if reranker.activation_fn == "sigmoid" else score
        return functional.cross_entropy((reranker.scale * activated)[None], torch.tensor([0]))
    if reranker.loss == "pairwise_logistic":
        return (1 + (score[1:] - score[0]).exp()).log().mean()
    if reranker.loss == "binary":
        label = torch.zeros_like(score)
        label[0] = 1.0
        return functional.binary_cross_entropy_with_logits(score, label)
    if reranker.loss == "margin_mse":
        return ((score[0] - score[1:]) - (teacher[0] - teacher[1:])).square().mean()
    temperature = reranker.distillation_temperature
    wanted = (teacher / temperature).softmax(0)
    return (wanted * (wanted.log() - (score / temperature).log_softmax(0))).sum()


def model_config(path: str, case: Case) -> ModelConfig:
    """Section `model` of a case."""
    return ModelConfig(name_or_path=path, freeze=case.freeze, lora={"r": 4} if case.lora else None)


def prepare(model: Any, config: ModelConfig) -> None:
    """Its adapters, which would begin at zero and leave each other without a gradient, and its frozen parts."""
    choose_trainable(model, config, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def step_update(
    strategy_name: str,
    case: Case,
    model_path: str,
    order: Order,
    store: ShardStore,
    world: World,
    counts: dict[str, int],
    lr: float,
    precision: str,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """farnear's update (old weights minus new) on rank 0, and what was reduced on the way."""
    config = model_config(model_path, case)
    model = load_reranker(config, case.reranker)
    preprocess = PairPreprocessing(model, shares_images=case.shares)
    pick = PairPicker(model) if case.shares else None
    tokens = page_tokens(model)
    prepare(model, config)
    module = Reranker(model, bf16=precision == "bf16", fp16=precision == "fp16")
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    with parameters_split(strategy_name):
        run = run_config(strategy_name, model_path, 0.0, fp16=precision == "fp16")
        strategy = build_strategy(run, module, optimizer, world)
    strategy.train(True)
    batch = rank_batch(case, order, store, preprocess, tokens, world, strategy.forward_is_collective)
    step = RerankStep(strategy, world, case.reranker, SEED, pick, case.keep_graphs)
    elements = sum(p.numel() for p in before.values())
    norm = float("nan")
    figures = StepFigures()
    # fp16 leaves out steps until it has found a scale.
    while math.isnan(norm):
        counts.update(calls=0, elements=0, gathered=0)
        step.gradient(batch, figures)
        passes = round(counts["elements"] / elements, 3)
        norm = strategy.step(lr)
    check_that_it_was_used(case, batch, figures)
    after = strategy.full_weights()
    update = {name: before[name] - after[name] for name in before} if after else {}
    return update, {"passes": passes}


def rank_batch(
    case: Case,
    order: Order,
    store: ShardStore,
    preprocess: PairPreprocessing,
    tokens: PageTokens,
    world: World,
    same_modalities: bool,
) -> ListBatch:
    """This rank's lists of step 0, as a training's loader brings them."""
    dealing = ListDealing(
        rank=world.rank,
        world_size=world.world_size,
        page_tokens=tokens,
        mini_batch_size={"document": case.document, "pair": case.pair},
        mini_batch_num_tokens={"document": None, "pair": case.pair_tokens},
        negatives=negatives_of(order.index, case),
        num_hard=None,
        num_in_batch=case.reranker.num_negatives,
        shares_images=case.shares,
        same_modalities=same_modalities,
    )
    loader = TrainLoader(order, dealing, store, preprocess, num_workers=0)
    return next(iter(loader.batches(0, 1)))


def check_that_it_was_used(case: Case, batch: ListBatch, figures: StepFigures) -> None:
    """What a case is about must have happened."""
    if batch.whole_lists != (case.pair != 2):
        raise RuntimeError(f"case {case.name}: whole lists are {batch.whole_lists}")
    if case.keep_graphs and not figures.kept_graphs:
        raise RuntimeError(f"case {case.name}: no graph was kept")
    if case.broken and not figures.quarantined:
        raise RuntimeError(f"case {case.name}: nothing was quarantined")


def names_for(case: Case, world_size: int, small: bool) -> list[str]:
    """The strategies and variants that meet a case."""
    if small:
        return list(STRATEGIES) if case.name in SLICE[world_size] else []
    if case in LOSS_CASES:
        return ["ddp", "zero3"] if world_size == 2 else ["ddp"]
    return [*STRATEGIES, *(VARIANTS if case.name in CASES_OF_VARIANTS else ())]


def rank_main(rank: int, world_size: int, port: int, folder: str, small: bool, out: str) -> None:
    """One of W processes: all cases of this W, sharing the process group. Rank 0 writes the results."""
    world, counts = join_ranks(rank, world_size, port)
    store = ShardStore(ShardCache(Path(folder) / "shards"))
    results = []
    for case in (*CASES, *LOSS_CASES):
        if not (names := names_for(case, world_size, small)):
            continue
        shard = str(Path(folder) / f"pairs-{case.pairs}-{case.broken}.tar")
        index = cached_index(ShardSet((SourceShards("pairs", (shard,)),)), Path(folder) / "cache", store)
        order = Order(index, PlanSettings(seed=SEED, global_batch_size=case.pairs), Path(folder) / "plans")
        lists = lists_of_step(
            order, 0, negatives_of(index, case), num_hard=None, num_in_batch=case.reranker.num_negatives
        )
        model_path = str(Path(folder) / case.model)
        about = (model_path, case, lists, index, store)
        gradient, norm_of_weights = reference_gradient(*about, "fp32")
        halves = ("bf16", "fp16") if case.name in ("whole_lists", "yes_no") and not small else ()
        bounds = errors_of_plain(gradient, ("fp32", *halves), *about)
        # An update as large as the weights, so that their rounding does not drown it.
        lr = norm_of_weights / float(torch.stack([g.norm() for g in gradient.values()]).norm())
        wanted = {name: lr * g for name, g in gradient.items()}
        for name in names:
            for precision in bounds:
                update, reduced = step_update(name, case, model_path, order, store, world, counts, lr, precision)
                row = {"strategy": name, "world_size": world_size, "case": case.name, "precision": precision}
                error = relative_error(update, wanted) if update else 0.0
                results.append({**row, "error": error, "bound": bounds[precision], "reductions": reduced})
    if rank == 0:
        Path(out).write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(world_sizes: tuple[int, ...], small: bool) -> list[dict[str, Any]]:
    """All cases at each W, in fresh processes a W."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        texts = [
            "Judge whether the document meets the query, yes or no, where is the red chart number of text alone",
            "yes",
            "no",
        ]
        for name, tied in MODELS.items():
            save_tiny_model(
                Path(folder) / name, texts=texts * 2, hidden_size=64, num_layers=2, tie_word_embeddings=tied
            )
        for case in CASES:
            if not (shard := Path(folder) / f"pairs-{case.pairs}-{case.broken}.tar").exists():
                write_shard(shard, case)
        for world_size in world_sizes:
            out = str(Path(folder) / f"{world_size}.json")
            multiprocessing.set_forkserver_preload(["sentence_transformers", "deepspeed", "farnear.training.run"])
            arguments = (world_size, free_port(), folder, small, out)
            mp.start_processes(rank_main, arguments, nprocs=world_size, start_method="forkserver")
            results += json.loads(Path(out).read_text(encoding="utf-8"))
    return results


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the last line."""
    errors = {of: [r["error"] for r in results if r["precision"] == of] for of in ("fp32", "bf16", "fp16")}
    passes = {}
    for name in (*STRATEGIES, *VARIANTS):
        own = [r for r in results if r["strategy"] == name and r["world_size"] > 1 and r["precision"] == "fp32"]
        if own:
            passes[name] = max(r["reductions"]["passes"] for r in own)
    return {
        "worst_relative_error": max(errors["fp32"]),
        "worst_relative_error_bf16": max(errors["bf16"], default=None),
        "worst_relative_error_fp16": max(errors["fp16"], default=None),
        "worst_over_bound": float(np.max([r["error"] / r["bound"] for r in results])),  # nan, if one is
        "cases": len({(r["strategy"], r["world_size"], r["case"]) for r in results}),
        "reductions_per_step": passes,
    }


def is_good(summary: dict[str, Any]) -> bool:
    """Whether every bound holds."""
    return bool(summary["worst_over_bound"] <= 1)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, WORLD_SIZES, summarise, is_good))
