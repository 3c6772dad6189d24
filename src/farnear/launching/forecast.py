"""What a run will take, before it is started: memory, network, time and what would go wrong, from its run file alone.

    config.json -> blueprint: parameters, graph and FLOPs of a mini-batch        farnear.model.blueprint
    index of the shards, or a number -> pairs, tokens, steps                     farnear.launching.run_data
    both -> memory a rank by part, under each strategy                           farnear.launching.memory
         -> bytes sent and seconds of a step                                     farnear.launching.step_time

docs/planning.md explains the figures. None of them is measured.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farnear.config import RunConfig
from farnear.launching.memory import (
    TILE_BYTES,
    Holding,
    Memory,
    bucket_elements,
    checkpoint_bytes,
    memory_of,
)
from farnear.launching.run_data import RunData, run_data
from farnear.launching.step_time import Machine, Network, StepTime, Work, network_of, save_seconds, step_time
from farnear.model.blueprint import TOKENS_OF_TEMPLATE, Blueprint, find_config
from farnear.model.hollow import CannotTraceError, Trace
from farnear.resources import resource

# What a run takes for the two that are `auto` (farnear.training.choices).
SHARE_OF_A_MINI_BATCH, SHARE_OF_GRAPHS, MOST_INPUTS = 0.25, 0.6, 256
PREFETCHED = 50_000_000
"""Elements that ZeRO-3 fetches ahead, stage3_prefetch_bucket_size of ds_configs/zero3.json."""
USABLE_SHARE = 0.95
"""Of a GPU's memory; the rest is lost between the allocator's blocks."""
SIDES = ("document", "query")


@dataclass(frozen=True)
class SideForecast:
    """One side of a rank's step.

    Attributes:
        inputs: In a step.
        mini_batch: Inputs of a mini-batch, by the largest.
        tokens: Of the largest input.
        mean_share: Mean tokens over those of the largest.
        first, second: Traces of ``mini_batch`` inputs and of twice as many; None where there is one only.
    """

    inputs: int
    mini_batch: int
    tokens: int
    mean_share: float
    first: Trace
    second: Trace | None

    @property
    def mini_batches(self) -> int:
        return -(-self.inputs // self.mini_batch)

    def backward_bytes(self, inputs: int) -> int:
        """Of a mini-batch of so many inputs, on the line through the two that are known."""
        first = self.first.backward_bytes
        if self.second is None:
            return first * inputs // self.mini_batch
        slope = (self.second.backward_bytes - first) / self.mini_batch
        return max(0, round(first + slope * (inputs - self.mini_batch)))


@dataclass(frozen=True)
class StrategyForecast:
    """One strategy on the machine.

    Attributes:
        memory: With the run file's mini-batches.
        largest_mini_batch: Pages at once with which it still fits, at most a step's; 0 if none does. None on a CPU.
    """

    name: str
    memory: Memory
    network: Network
    time: StepTime
    largest_mini_batch: int | None


@dataclass(frozen=True)
class Forecast:
    """Of one run on one machine.

    Attributes:
        chosen: The run file's strategy; offload where its DeepSpeed config says so.
        strategies: All that can run there, the chosen one among them.
        sides: "document" and "query".
        keep_graphs, together: Share of kept graphs, mini-batches in pass one.
        estimated: Why the model could not be traced; empty if it was.
        saved_bytes, save_seconds: Of a checkpoint.
    """

    config: RunConfig
    machine: Machine
    model_folder: Path
    model: Blueprint
    data: RunData
    sides: dict[str, SideForecast]
    work: Work
    holding: Holding
    keep_graphs: float
    together: int
    chosen: StrategyForecast
    strategies: tuple[StrategyForecast, ...]
    estimated: str
    saved_bytes: int
    save_seconds: float

    @property
    def budget_bytes(self) -> int | None:
        """Of a GPU's memory; None on a CPU."""
        gpu = self.machine.gpu
        return None if gpu is None else int(gpu.memory_bytes * USABLE_SHARE)

    @property
    def cheapest(self) -> StrategyForecast | None:
        """Of the strategies that fit the one whose step is shortest; the fewest bytes decide between equals."""
        fitting = [one for one in self.strategies if one.largest_mini_batch and _runs_here(one.name, self.machine)]
        return min(fitting, key=lambda one: (one.time.total, one.network.travelling), default=None)


def forecast(config: RunConfig, run_file: Path, machine: Machine, pairs: int | None = None) -> Forecast:
    """Plan a run.

    Args:
        run_file: Beside it the model's config.json may lie.
        pairs: Training pairs, where the shards are not here.

    Raises:
        UserError: There is no config.json, or none that describes a model.
    """
    folder = find_config(config.model, run_file)
    model = Blueprint(config, folder)
    data = run_data(config, _page_tokens(model), model.pages.most_tokens + TOKENS_OF_TEMPLATE, pairs)
    batch = min(config.training.global_batch_size, data.pairs or config.training.global_batch_size)
    ranks = machine.ranks
    pairs_of_rank = -(-batch // ranks)
    inputs = {"document": math.ceil(pairs_of_rank * (1 + data.negatives)), "query": pairs_of_rank}
    sides, estimated = _sides(config, model, data, inputs, machine)
    together = 1 if config.training.keep_graphs == 1.0 else config.training.no_grad_mini_batch_factor
    work = Work(
        pairs=pairs_of_rank,
        documents=inputs["document"],
        pairs_of_all=batch,
        documents_of_all=math.ceil(batch * (1 + data.negatives)),
        width=model.width,
        flops=0.0,
        gathered_elements=0,
        skipping_elements=0,
        queries_are_columns=any(name.endswith("_to_query") for name in config.loss.directions),
    )
    holding = _holding(config, model, work, sides, together, data)
    name = _chosen_name(config)
    keep_graphs = _kept_share(config, holding, sides, machine, name)
    holding = replace(holding, kept_bytes=_kept_bytes(sides, keep_graphs))
    most_used = max(side.first.used_elements for side in sides.values())
    work = replace(
        work,
        flops=_flops(sides, keep_graphs),
        gathered_elements=_gathered_elements(sides, together, keep_graphs, lambda side: side.first.used_elements),
        skipping_elements=_gathered_elements(
            sides, together, keep_graphs, lambda side: min(PREFETCHED, most_used - side.first.used_elements)
        ),
    )

    def of(strategy: str) -> StrategyForecast:
        return _of_strategy(strategy, config, holding, work, sides, machine, together)

    strategies = {strategy: of(strategy) for strategy in _possible(config, machine)}
    strategies.setdefault(name, of(name))
    saved = checkpoint_bytes(model.trained)
    return Forecast(
        config=config,
        machine=machine,
        model_folder=folder,
        model=model,
        data=data,
        sides=sides,
        work=work,
        holding=holding,
        keep_graphs=keep_graphs,
        together=together,
        chosen=strategies[name],
        strategies=tuple(strategies.values()),
        estimated=estimated,
        saved_bytes=saved,
        save_seconds=save_seconds(saved),
    )


def _of_strategy(
    strategy: str,
    config: RunConfig,
    holding: Holding,
    work: Work,
    sides: dict[str, SideForecast],
    machine: Machine,
    together: int,
) -> StrategyForecast:
    training = config.training
    spread = strategy.startswith("zero3") or strategy == "fsdp2"
    # Settings that the other strategies do not have do not count for them.
    holding = replace(
        holding,
        reduces_at_once=training.reduce == "mini_batch" and (spread or strategy == "zero2"),
        keeps_gathered=training.reshard == "step" and spread,
        eight_bit=training.optim == "adamw_8bit" and strategy in ("single", "ddp"),
        bucket_elements=_bucket_elements(strategy),
    )
    ranks = 1 if strategy == "single" else machine.ranks
    ranks_of_copy = machine.ranks_of_node if config.shard_within == "node" else ranks
    on_gpu = machine.gpu is not None
    network = network_of(strategy, holding, work, ranks, ranks_of_copy)
    half_precision = training.bf16 or training.fp16 or training.pure_bf16

    def memory_with(pages: int) -> Memory:
        both = [(sides["document"], pages), (sides["query"], min(pages, sides["query"].inputs))]
        with_pages = replace(
            holding,
            forward_bytes=max(_forward(side, min(inputs * together, side.inputs)) for side, inputs in both),
            backward_bytes=max(side.backward_bytes(inputs) for side, inputs in both),
        )
        return memory_of(strategy, with_pages, ranks, ranks_of_copy, on_gpu=on_gpu)

    largest = None
    if machine.gpu is not None:
        budget = int(machine.gpu.memory_bytes * USABLE_SHARE)
        largest = _largest(sides["document"].inputs, lambda pages: memory_with(pages).total_bytes <= budget)
    return StrategyForecast(
        name=strategy,
        memory=memory_of(strategy, holding, ranks, ranks_of_copy, on_gpu=on_gpu),
        network=network,
        time=step_time(strategy, holding, work, machine, network, half_precision=half_precision),
        largest_mini_batch=largest,
    )


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, by bisection; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _forward(side: SideForecast, inputs: int) -> int:
    """Without a graph all that lives belongs to inputs."""
    return side.first.forward_bytes * inputs // side.mini_batch


def _sides(
    config: RunConfig, model: Blueprint, data: RunData, inputs: dict[str, int], machine: Machine
) -> tuple[dict[str, SideForecast], str]:
    sides: dict[str, SideForecast] = {}
    estimated = ""
    for side in SIDES:
        tokens = data.page if side == "document" else data.query
        visual = tokens.largest - TOKENS_OF_TEMPLATE if side == "document" else 0
        text = tokens.largest - visual
        size = _mini_batch(config, side, inputs[side], tokens.largest)
        try:
            if not model.pages.is_known and visual:
                raise CannotTraceError("its config does not say how a page becomes tokens")
            first = model.trace(size, text_tokens=text, visual_tokens=visual, together=size)
            # The larger side decides what fits, and only its second trace is worth its time.
            second = model.trace(2 * size, text_tokens=text, visual_tokens=visual) if side == "document" else None
        except CannotTraceError as error:
            estimated = str(error)
            first, second = _estimated(model, size, tokens.largest), None
        sides[side] = SideForecast(inputs[side], size, tokens.largest, tokens.mean / tokens.largest, first, second)
    return sides, estimated


def _estimated(model: Blueprint, inputs: int, tokens: int) -> Trace:
    """By the number of parameters alone, where a model cannot be traced.

    FLOPs are 2 a parameter and token forwards and 4 backwards. A layer that is fed a number of h elements a token saves
    about 17 such numbers with flash attention (Korthikanti et al. 2022, arXiv:2205.05198: 34 bytes in half precision)
    for its 12 h**2 parameters.
    """
    *blocks, _ = model.units
    element_bytes = 2 if model.autocast is not None else model.element_bytes
    hidden = [math.sqrt(block / 12) for block in blocks] or [math.sqrt(model.parameters_in_all / 12)]
    graph = round(17 * element_bytes * sum(hidden) * inputs * tokens)
    flops = 2 * model.parameters_in_all * inputs * tokens
    casts = 2 * model.parameters_in_all if model.autocast is not None else 0
    working = round(10 * element_bytes * max(hidden) * inputs * tokens)
    largest = model.element_bytes * model.largest_trained
    return Trace(graph, casts, working, graph + largest, flops, 2 * flops, model.parameters_in_all)


def _mini_batch(config: RunConfig, side: str, inputs: int, tokens: int) -> int:
    """Inputs of a mini-batch that holds the largest; under auto one, from which the plan goes on."""
    size = config.training.mini_batch_size_of[side]
    bound = config.training.mini_batch_num_tokens_of[side]
    most = inputs if size is None else min(size, inputs)
    if bound == "auto":
        return 1
    return max(1, most if bound is None else min(most, bound // tokens))


def _holding(
    config: RunConfig, model: Blueprint, work: Work, sides: dict[str, SideForecast], together: int, data: RunData
) -> Holding:
    training, pages = config.training, sides["document"]
    first_of = [side.first for side in sides.values()]
    prepared = config.data.dataloader_num_workers * config.data.dataloader_prefetch_factor * pages.mini_batch
    dims = len(config.loss.matryoshka_dims or (0,))
    columns = sum(
        work.pairs_of_all if name.endswith("_to_query") else work.documents_of_all for name in config.loss.directions
    )
    rows = min(work.pairs, max(1, TILE_BYTES // (4 * columns * (dims + 2))))
    # Gathered, their gradient, and both once more while they are sent.
    embeddings = work.documents_of_all + (work.pairs_of_all if work.queries_are_columns else 0)
    frozen = training.frozen_cache_gb
    return Holding(
        parameters=model.parameters_in_all,
        trained=model.trained,
        weight_bytes=model.weight_bytes,
        element_bytes=model.element_bytes,
        largest_trained=model.largest_trained,
        small_trained=model.small_trained,
        units=model.units,
        cast_bytes=max(trace.cast_bytes for trace in first_of),
        forward_bytes=max(_forward(s, min(s.mini_batch * together, s.inputs)) for s in sides.values()),
        backward_bytes=max(trace.backward_bytes for trace in first_of),
        kept_bytes=0,
        embedding_bytes=4 * 4 * work.width * embeddings,
        tile_bytes=4 * rows * columns * (dims + 2),
        page_bytes=(work.documents + prepared) * model.pages.uint8_bytes(pages.tokens),
        frozen_bytes=0 if frozen == "auto" or model.trained == model.parameters_in_all else int(frozen * 1e9),
        reduces_at_once=False,
        keeps_gathered=False,
        eight_bit=False,
        bucket_elements=0,
    )


def _kept_share(
    config: RunConfig, holding: Holding, sides: dict[str, SideForecast], machine: Machine, strategy: str
) -> float:
    """keep_graphs, or as a run finds it where that is auto: what fits into a share of the memory that is free."""
    share = config.training.keep_graphs
    if share != "auto":
        return float(share)
    if machine.gpu is None:
        return 0.0
    held = memory_of(
        strategy, replace(holding, forward_bytes=0, backward_bytes=0), machine.ranks, machine.ranks, on_gpu=True
    )
    graphs = [side.first.graph_bytes for side in sides.values()]
    free = (machine.gpu.memory_bytes - held.total_bytes) * SHARE_OF_GRAPHS - max(graphs)
    return max(0, min(16, int(16 * free / max(_kept_bytes(sides, 1.0), 1)))) / 16


def _kept_bytes(sides: dict[str, SideForecast], share: float) -> int:
    return sum(int(share * side.mini_batches) * side.first.graph_bytes for side in sides.values())


def _flops(sides: dict[str, SideForecast], keep_graphs: float) -> float:
    """Of both passes over a rank's inputs of mean size."""
    flops = 0.0
    for side in sides.values():
        scale = side.inputs / side.mini_batch * side.mean_share
        flops += scale * (side.first.forward_flops * (2 - keep_graphs) + side.first.backward_flops)
    return flops


def _gathered_elements(
    sides: dict[str, SideForecast], together: int, keep_graphs: float, of_a_pass: Callable[[SideForecast], int]
) -> int:
    """Of all forwards and backwards together."""
    elements = 0
    for side in sides.values():
        kept = int(keep_graphs * side.mini_batches)
        twice = side.mini_batches - kept
        elements += (-(-twice // together) + 2 * twice + 2 * kept) * of_a_pass(side)
    return elements


def _possible(config: RunConfig, machine: Machine) -> list[str]:
    """Strategies that the run file could name on that many ranks without another change."""
    training = config.training
    if machine.ranks == 1:
        names = ["single", "zero3 offload"]
    else:
        names = ["ddp", "zero1", "zero2", "zero3", "zero3 offload", "fsdp2"]
    if training.pure_bf16 or training.optim == "adamw_8bit":
        names = [name for name in names if name in ("single", "ddp")]
    return names


def _runs_here(name: str, machine: Machine) -> bool:
    return machine.gpu is not None or name != "zero3 offload"


def _chosen_name(config: RunConfig) -> str:
    """The strategy, with offload where the DeepSpeed config that a launcher names has it."""
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if config.strategy == "zero3" and named and "offload" in named:
        return "zero3 offload"
    return config.strategy


def _bucket_elements(strategy: str) -> int:
    if not strategy.startswith("zero"):
        return 0
    path = resource(Path(f"ds_configs/{strategy.replace(' ', '_')}.json"))
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return bucket_elements(settings)


def _page_tokens(model: Blueprint) -> Any:
    from farnear.model.pixels import SmartResizeTokens

    pages = model.pages
    return SmartResizeTokens(pages.patch_pixels, pages.merge, pages.min_pixels, pages.max_pixels, True)
