"""What ranks send each other in a step, against the least that they could, at 1, 2, 4 and 8 gloo processes.

    python benchmarks/scaling.py             all strategies, under six minutes on two cores
    python benchmarks/scaling.py --table     the computed tables of docs/scaling.md: nothing is measured for them

A tiny model takes a few steps of the cached gradient under every strategy. Counted are the collectives of the last one,
by what they are about (`farnear.parallel.traffic`), as rank 0 calls them and as bytes on the wire of a ring, the most
of any rank. The settings are

    weak             4 pairs a rank in mini-batches of 2
    mini-batches     the same pairs one by one: twice as many mini-batches
    half kept        those with half of their graphs kept from pass one
    batch            8 pairs a rank in mini-batches of 2
    strong           16 pairs in all, in mini-batches of 2

and what has to hold is that exchanges and reductions are as many in all of them and at every W, and that their bytes
are near the least. What the least is, from first principles, stands in `scaling_least.py`; gathers of the weights that
a pass goes through (zero3, fsdp2) are compared with it apart, as they have to grow with the number of passes. Beside
embeddings and gradients travel the sizes of the ranks' batches (once), 48 bytes of a pair, by which false negatives are
known, 12 bytes a rank of the step's figures, a flag for each parameter and a norm; they are no part of the least.

The model is made so that ZeRO-3 splits its parameters, as it does with a large one. fsdp2-nodes has two nodes of W / 2
ranks. Seconds are printed and claim nothing: eight processes on two cores measure the cores. The last line is JSON; the
exit code is 1 when a bound is broken.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from exactness import CPU, Case, free_port, make_batch, parameters_split, prepared_model, rank_batch, run_config
from scaling_least import Passes, Weights, least_exchange, least_update, reducing
from scaling_table import computed_tables, markdown
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from farnear.data.batch import RankBatch
from farnear.model.embedder import Embedder
from farnear.model.features import FeatureMerger
from farnear.model.tiny import save_tiny_model
from farnear.parallel.collectives import gather_objects
from farnear.parallel.strategy import build_strategy
from farnear.parallel.traffic import count_in
from farnear.parallel.world import World
from farnear.sections import LossConfig
from farnear.training.cache import CachedStep
from farnear.training.step import StepFigures

WORLD_SIZES = (1, 2, 4, 8)
STRATEGIES = (
    "ddp",
    "zero1",
    "zero2",
    "zero3",
    "zero3-reshard_step",
    "fsdp2",
    "fsdp2-reshard_step",
    "fsdp2-nodes",
)
RANKS_OF_ALL_SETTINGS = 4
WIDTH = 64
# ZeRO-3's first step is not like the others, which are all alike.
STEPS = 2
# Of exchange and update together; DeepSpeed's all-reduce where a reduce-scatter would do makes three halves.
BOUND = {"zero1": 1.52, "zero2": 1.52}
BOUND_OF_OTHERS = 1.05
# Of gathers. DeepSpeed prefetches what it gathered the last time, and the next mini-batch may go another way.
BOUND_OF_GATHERS = {"zero3": 1.35}
BOUND_OF_OTHERS_GATHERS = 1.01


@dataclass(frozen=True)
class Setting:
    """A batch and how it is cut.

    Attributes:
        pairs: In all; None for so many a rank.
    """

    name: str
    mini_batch_size: int
    pairs_per_rank: int = 4
    pairs: int | None = None
    keep_graphs: float = 0.0


SETTINGS = (
    Setting("weak", 2),
    Setting("mini-batches", 1),
    Setting("half kept", 1, keep_graphs=0.5),
    Setting("batch", 2, pairs_per_rank=8),
    Setting("strong", 2, pairs=16),
)


def measure(strategy: str, settings: Sequence[Setting], model_path: str, world: World) -> list[dict[str, Any]]:
    """What a step under each setting sends, on this rank. A collective of all ranks.

    The counter of ``world`` must have been put in place before DeepSpeed was started.
    """
    model = prepared_model(model_path, Case(strategy))
    module = Embedder(model, bf16=False)
    weights = weights_of(module)
    # Cut before a strategy is around the model.
    batches = [_batch(setting, model, world) for setting in settings]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    with parameters_split(strategy):
        engine = build_strategy(run_config(strategy, model_path, 1.0), module, optimizer, world)
        nodes = 2 if strategy == "fsdp2-nodes" else 1
    engine.train(True)
    rows = []
    for setting, batch in zip(settings, batches, strict=True):
        step = CachedStep(engine, world, LossConfig(), 0, keep_graphs=setting.keep_graphs, merge=FeatureMerger(model))
        for _ in range(STEPS):
            started = perf_counter()
            step.gradient(batch, StepFigures(), scale=LossConfig().scale)
            engine.step(1e-4)
            seconds = perf_counter() - started
        traffic = world.traffic
        # Before the ranks tell each other, which is a collective too.
        told = (dict(traffic.calls), dict(traffic.wire_bytes), seconds)
        rows.append(
            {
                "strategy": strategy,
                "world_size": world.world_size,
                "setting": setting.name,
                "pairs_per_rank": len(batch.pairs_b),
                "mini_batches": len(batch.mini_batches),
                **_compared(strategy, gather_objects(told), least_of(strategy, weights, batch, setting, nodes, world)),
            }
        )
    return rows


def _batch(setting: Setting, model: SentenceTransformer, world: World) -> RankBatch:
    pairs = setting.pairs or setting.pairs_per_rank * world.world_size
    case = Case(setting.name, pairs=pairs, mini_batch_size=setting.mini_batch_size)
    return rank_batch(case, make_batch(case, world.world_size), model, world)


def _compared(strategy: str, told_W: Sequence[Any], least: dict[str, float]) -> dict[str, Any]:
    calls = told_W[0][0]
    wire = {kind: max(bytes_of.get(kind, 0) for _, bytes_of, _ in told_W) for kind in calls}
    is_spread = strategy.startswith(("zero3", "fsdp2"))
    # Updated weights are no gathers for a pass.
    update = ("reductions", "checks") if is_spread else ("reductions", "parameter_gathers")
    return {
        "exchange_calls": calls.get("exchange", 0),
        "reduction_calls": calls.get("reductions", 0) + (0 if is_spread else calls.get("parameter_gathers", 0)),
        "gather_calls": calls.get("parameter_gathers", 0) if is_spread else 0,
        "check_calls": calls.get("checks", 0),
        "exchange_bytes": wire.get("exchange", 0),
        "update_bytes": sum(wire.get(kind, 0) for kind in update),
        "gathered_bytes": wire.get("parameter_gathers", 0) if is_spread else 0,
        **{f"least_{kind}": bytes_of for kind, bytes_of in least.items()},
        "seconds": max(seconds for _, _, seconds in told_W),
    }


def least_of(
    strategy: str, weights: Weights, batch: RankBatch, setting: Setting, nodes: int, world: World
) -> dict[str, float]:
    """Bytes that a rank has to send for the exchange, the update and the gathers."""
    ranks, of_copy = world.world_size, world.world_size // nodes
    of_side = {side: [m for m in batch.mini_batches if m.side == side] for side in ("document", "query")}
    pages, queries = (Passes(len(cut), int(setting.keep_graphs * len(cut))) for cut in of_side.values())
    gathered = 0
    if strategy.startswith(("zero3", "fsdp2")):
        gathered = weights.of_page if strategy.endswith("reshard_step") else weights.gathered(pages, queries)
    return {
        "exchange": least_exchange(len(batch.page_hash_p), WIDTH, ranks),
        "update": least_update(strategy, weights.of_page, ranks, of_copy),
        "gathers": reducing(4 * gathered, of_copy),
    }


def weights_of(module: torch.nn.Module) -> Weights:
    """Elements by tower; no strategy is around it yet."""
    sizes = dict.fromkeys(Weights.__annotations__, 0)
    for name, parameter in module.named_parameters():
        part = "vision" if "visual" in name else "text"
        sizes[f"{part}_{'blocks' if '.blocks.' in name or '.layers.' in name else 'rest'}"] += parameter.numel()
    return Weights(**sizes)


def settings_of(strategy: str, world_size: int) -> Sequence[Setting]:
    """All of them; fewer for variants, where a rank is alone, and where eight share two cores."""
    if world_size == 1:
        return SETTINGS[:1]
    if "-" in strategy:
        return SETTINGS[:2]
    return SETTINGS if world_size < 8 else (*SETTINGS[:2], SETTINGS[-1])


def count(rank: int, world_size: int, model_path: str, wanted: dict[str, Sequence[Setting]], out: str) -> None:
    """One of W processes with torchrun's environment: some strategies, each with its settings. Rank 0 writes them."""
    dist.init_process_group("gloo")
    world = World(rank, world_size, CPU)
    count_in(world.traffic)
    rows = [row for strategy, settings in wanted.items() for row in measure(strategy, settings, model_path, world)]
    if rank == 0:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def rank_main(rank: int, world_size: int, port: int, model_path: str, out: str) -> None:
    """`count` of everything, in a process that still has to be made a rank."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    wanted = {strategy: settings_of(strategy, world_size) for strategy in STRATEGIES}
    if world_size < 4:
        # Of two nodes with a rank each, none has a neighbour to share a copy with.
        wanted.pop("fsdp2-nodes")
    count(rank, world_size, model_path, wanted, out)


def run(world_sizes: Iterable[int]) -> list[dict[str, Any]]:
    """All strategies at each W, in fresh processes a W."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model_path = str(save_tiny_model(Path(folder) / "model", texts=["a chart"], hidden_size=WIDTH, num_layers=2))
        multiprocessing.set_forkserver_preload(["sentence_transformers", "deepspeed", "farnear.training.cache"])
        for world_size in world_sizes:
            out = str(Path(folder) / f"{world_size}.json")
            arguments = (world_size, free_port(), model_path, out)
            mp.start_processes(rank_main, arguments, nprocs=world_size, start_method="forkserver")
            rows += json.loads(Path(out).read_text(encoding="utf-8"))
            print(f"{world_size} ranks done", file=sys.stderr, flush=True)
    return rows


def bytes_vs_minimum(row: dict[str, Any]) -> float:
    """Of exchange and update together."""
    return (row["exchange_bytes"] + row["update_bytes"]) / (row["least_exchange"] + row["least_update"])


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By strategy: calls, the worst ratios, and on what the calls do not depend. One rank alone sends nothing."""
    summary = {}
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == strategy and row["world_size"] > 1]
        calls = {name: {row[name] for row in mine} for name in ("exchange_calls", "reduction_calls")}
        gathers = [row["gathered_bytes"] / row["least_gathers"] for row in mine if row["least_gathers"]]
        summary[strategy] = {
            **{name: max(counts) for name, counts in calls.items()},
            "bytes_vs_minimum": round(max(map(bytes_vs_minimum, mine)), 3),
            "exchange_vs_minimum": round(max(row["exchange_bytes"] / row["least_exchange"] for row in mine), 3),
            "gathers_vs_minimum": round(max(gathers), 3) if gathers else None,
            "constant_in_W": _is_constant(mine, "setting"),
            "constant_in_batch_and_mini_batches": _is_constant(mine, "world_size"),
        }
    return summary


def _is_constant(rows: Sequence[dict[str, Any]], alike: str) -> bool:
    """Whether exchanges and reductions are as many in all rows that are alike in something."""
    seen: dict[Any, set[tuple[int, int]]] = {}
    for row in rows:
        seen.setdefault(row[alike], set()).add((row["exchange_calls"], row["reduction_calls"]))
    return all(len(calls) == 1 for calls in seen.values())


def is_good(summary: dict[str, dict[str, Any]]) -> bool:
    """Whether all that is claimed holds."""
    return all(
        figures["constant_in_W"]
        and figures["constant_in_batch_and_mini_batches"]
        and figures["bytes_vs_minimum"] <= BOUND.get(strategy, BOUND_OF_OTHERS)
        and (figures["gathers_vs_minimum"] or 0.0) <= BOUND_OF_GATHERS.get(strategy, BOUND_OF_OTHERS_GATHERS)
        for strategy, figures in summary.items()
    )


def measured_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: exchange and update by W, gathers by setting."""
    heads = ["strategy", "W", "exchange calls", "reduction calls", "exchange kB", "of least", "update kB", "of least"]
    by_ranks = []
    for row in rows:
        if row["setting"] == "weak":
            cells = [row["strategy"], row["world_size"], row["exchange_calls"], row["reduction_calls"]]
            cells += [_kilobytes(row["exchange_bytes"]), _ratio(row["exchange_bytes"], row["least_exchange"])]
            cells += [_kilobytes(row["update_bytes"]), _ratio(row["update_bytes"], row["least_update"])]
            strong = [other for other in rows if _is_strong(other) and _place(other) == _place(row)]
            cells += [_ratio(other["update_bytes"], other["least_update"]) for other in strong] or ["-"]
            by_ranks.append([*map(str, cells), f"{row['seconds']:.2f}"])
    by_setting = []
    for row in rows:
        if row["world_size"] == RANKS_OF_ALL_SETTINGS and row["gather_calls"]:
            cells = [row["strategy"], row["setting"], row["mini_batches"], row["gather_calls"]]
            cells += [_kilobytes(row["gathered_bytes"]), _ratio(row["gathered_bytes"], row["least_gathers"])]
            by_setting.append([*map(str, cells), str(row["check_calls"])])
    gathers = ["strategy", "setting", "mini-batches", "gather calls", "gathered kB", "of least", "checks"]
    return (
        markdown([*heads, "update of least, strong", "seconds"], by_ranks)
        + f"\n\nGathers for the passes, at W = {RANKS_OF_ALL_SETTINGS}:\n\n"
        + markdown(gathers, by_setting)
    )


def _is_strong(row: dict[str, Any]) -> bool:
    return row["setting"] == "strong"


def _place(row: dict[str, Any]) -> tuple[str, int]:
    return row["strategy"], row["world_size"]


def _kilobytes(size: float) -> str:
    return f"{size / 1e3:,.1f}"


def _ratio(above: float, below: float) -> str:
    return f"{above / below:.3f}" if below else "-"


def main() -> int:
    """Measure, print, judge; or print what is computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the computed tables and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(computed_tables(), end="")
        return 0
    rows = run(WORLD_SIZES)
    print(measured_tables(rows))
    summary = summarise(rows)
    print(json.dumps(summary))
    return 0 if is_good(summary) else 1


if __name__ == "__main__":
    sys.exit(main())
