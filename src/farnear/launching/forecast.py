"""What a run will take, before it is started: memory, network, time and what would go wrong, from its run file alone.

    config.json -> blueprint: parameters, graph and FLOPs of a mini-batch        farnear.model.blueprint
    index of the shards, or a number -> pairs, tokens, steps                     farnear.launching.run_data
    both -> memory a rank by part, under each strategy                           farnear.launching.memory
         -> bytes sent and seconds of a step                                     farnear.launching.step_time

docs/planning.md explains the figures. None of them is measured.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.launching.memory import (
    TILE_BYTES,
    Holding,
    Memory,
    bucket_elements,
    checkpoint_bytes,
    memory_of,
)
from farnear.launching.passes import Side, elements_of_passes, flops_of_step, kept_bytes, sides_of
from farnear.launching.run_data import RunData, run_data
from farnear.launching.step_time import Machine, Network, StepTime, Work, network_of, save_seconds, step_time
from farnear.model.blueprint import TOKENS_OF_TEMPLATE, Blueprint, find_config
from farnear.model.stored import ROUTES
from farnear.resources import resource

SHARE_OF_GRAPHS = 0.6
"""Of the free memory under `keep_graphs: auto`, as in farnear.training.choices."""
PREFETCHED = 50_000_000
"""Elements that ZeRO-3 fetches ahead, stage3_prefetch_bucket_size of ds_configs/zero3.json."""
USABLE_SHARE = 0.95
"""Of a GPU's memory; the rest is lost between the allocator's blocks."""


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
        chosen: The run file's strategy.
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
    sides: dict[str, Side]
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
        """Of the strategies that fit a GPU the one whose step is shortest; the fewest bytes decide between equals."""
        fitting = [one for one in self.strategies if one.largest_mini_batch]
        return min(fitting, key=lambda one: (one.time.total, sum(one.network.sent.values())), default=None)


def _cannot_be_planned(whose: str) -> UserError:
    return UserError(
        f"{whose} memory and time cannot be planned yet; start it with a small training.max_steps to see them in "
        "metrics.jsonl, and submit it with --no-plan"
    )


def forecast(config: RunConfig, run_file: Path, machine: Machine, pairs: int | None = None) -> Forecast:
    """Plan a run.

    Args:
        run_file: Beside it the model's config.json may lie.
        pairs: Training pairs, where the shards are not here.

    Raises:
        UserError: There is no config.json, or none that describes a model; or it is one that cannot be planned.
    """
    if config.reranker is not None:
        raise _cannot_be_planned("a reranker's")
    if config.model.router is not None or (Path(config.model.name_or_path).expanduser() / ROUTES).is_file():
        raise _cannot_be_planned("a Router's")
    folder = find_config(config.model, run_file)
    model = Blueprint(config, folder)
    if model.is_dual:
        raise _cannot_be_planned("a dual encoder's")
    data = run_data(config, _page_tokens(model), model.pages.most_tokens + TOKENS_OF_TEMPLATE, pairs)
    batch = min(config.training.global_batch_size, data.pairs or config.training.global_batch_size)
    ranks = machine.ranks
    pairs_of_rank = -(-batch // ranks)
    inputs = {"document": math.ceil(pairs_of_rank * (1 + data.negatives)), "query": pairs_of_rank}
    sides, estimated = sides_of(config, model, data, inputs)
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
        reduced_elements=0,
        queries_are_columns=any(name.endswith("_to_query") for name in config.loss.directions),
    )
    holding = _holding(config, model, work, sides, together, data)
    name: str = config.strategy
    keep_graphs = _kept_share(config, holding, sides, machine, name)
    holding = replace(holding, kept_bytes=kept_bytes(sides, keep_graphs))
    most_used = max(side.first.used_elements for side in sides.values())
    work = replace(
        work,
        flops=flops_of_step(sides, keep_graphs),
        gathered_elements=elements_of_passes(sides, together, keep_graphs, lambda side: side.first.used_elements),
        skipping_elements=elements_of_passes(
            sides, together, keep_graphs, lambda side: min(PREFETCHED, most_used - side.first.used_elements)
        ),
        reduced_elements=sum(
            side.mini_batches * side.first.used_elements * model.trained // model.parameters_in_all
            for side in sides.values()
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
    sides: dict[str, Side],
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
    half_precision = training.precision != "fp32"

    def memory_with(pages: int) -> Memory:
        both = [(sides["document"], pages), (sides["query"], min(pages, sides["query"].inputs))]
        with_pages = replace(
            holding,
            forward_bytes=max(side.forward_bytes(inputs * together) for side, inputs in both),
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


def _holding(
    config: RunConfig, model: Blueprint, work: Work, sides: dict[str, Side], together: int, data: RunData
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
        forward_bytes=max(s.forward_bytes(s.mini_batch * together) for s in sides.values()),
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


def _kept_share(config: RunConfig, holding: Holding, sides: dict[str, Side], machine: Machine, strategy: str) -> float:
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
    return max(0, min(16, int(16 * free / max(kept_bytes(sides, 1.0), 1)))) / 16


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
