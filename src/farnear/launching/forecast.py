"""What a run will take, before it is started: memory, network, time and what would go wrong, from its run file alone.

    config.json -> blueprint: parameters, graph and FLOPs of a mini-batch        farnear.model.blueprint
    index of the shards, or a number -> pairs, tokens, steps                     farnear.launching.run_data
    both -> inputs, mini-batches and passes of a step                            farnear.launching.step_shape
         -> memory a rank by part, under each strategy                           farnear.launching.memory
         -> bytes sent and seconds of a step                                     farnear.launching.step_time

docs/planning.md explains the figures. None of them is measured.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farnear.config import RunConfig
from farnear.launching.memory import (
    Holding,
    Memory,
    bucket_elements,
    checkpoint_bytes,
    memory_of,
)
from farnear.launching.passes import Side, elements_of_passes, flops_of_step, kept_bytes
from farnear.launching.run_data import RunData, run_data
from farnear.launching.step_shape import StepShape, embedder_shape, reranker_shape
from farnear.launching.step_time import Machine, Network, StepTime, Work, network_of, save_seconds, step_time
from farnear.model.blueprint import TOKENS_OF_TEMPLATE, Blueprint, EmbedderBlueprint
from farnear.model.blueprint_reranker import RerankerBlueprint
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
        largest_mini_batch: Inputs of the main side at once with which it still fits, at most a step's; 0 if none does.
            None on a CPU.
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
        keep_graphs: Share of kept graphs.
        saved_bytes, save_seconds: Of a checkpoint.
    """

    config: RunConfig
    machine: Machine
    model: Blueprint
    data: RunData
    shape: StepShape
    work: Work
    keep_graphs: float
    chosen: StrategyForecast
    strategies: tuple[StrategyForecast, ...]
    saved_bytes: int
    save_seconds: float

    @property
    def sides(self) -> Mapping[str, Side]:
        """Of a rank's step."""
        return self.shape.sides

    @property
    def budget_bytes(self) -> int | None:
        """Of a GPU's memory; None on a CPU."""
        gpu = self.machine.gpu
        return None if gpu is None else int(gpu.memory_bytes * USABLE_SHARE)

    def fits(self, strategy: StrategyForecast) -> bool:
        """Whether a strategy fits with the run file's mini-batches; on a CPU all do, as far as is known."""
        return self.budget_bytes is None or strategy.memory.total_bytes <= self.budget_bytes

    @property
    def cheapest(self) -> StrategyForecast | None:
        """Of the strategies that fit a GPU the one whose step is shortest; the chosen one among equals.

        Between others the fewest bytes decide. A hundredth of the time is no difference to this model.
        """
        fitting = [one for one in self.strategies if one.largest_mini_batch]
        best = min(fitting, key=lambda one: (one.time.total, sum(one.network.sent.values())), default=None)
        is_equal = best is not None and self.chosen in fitting and self.chosen.time.total < 1.01 * best.time.total
        return self.chosen if is_equal else best


def forecast(config: RunConfig, run_file: Path, machine: Machine, pairs: int | None = None) -> Forecast:
    """Plan a run.

    Args:
        run_file: Beside it the model's config.json may lie.
        pairs: Training pairs, where the shards are not here.

    Raises:
        UserError: There is no config.json, or none that describes a model; or it is one that cannot be planned.
    """
    model, data, shape = _step(config, run_file, machine.ranks, pairs)
    sides, together = shape.sides, shape.together
    holding = _holding(config, model, shape)
    name: str = config.strategy
    keep_graphs = _kept_share(config, holding, sides, machine, name)
    holding = replace(holding, kept_bytes=kept_bytes(sides, keep_graphs))
    most_used = max(side.first.used_elements for side in sides.values())
    work = Work(
        flops=flops_of_step(sides, keep_graphs),
        gathered_elements=elements_of_passes(sides, together, keep_graphs, lambda side: side.first.used_elements),
        skipping_elements=elements_of_passes(
            sides, together, keep_graphs, lambda side: min(PREFETCHED, most_used - side.first.used_elements)
        ),
        reduced_elements=sum(
            side.mini_batches * side.first.used_elements * model.trained // model.parameters_in_all
            for side in sides.values()
        ),
        shown_bytes=shape.shown_bytes,
        said_bytes=shape.said_bytes,
        groups=len(sides),
    )

    def of(strategy: str) -> StrategyForecast:
        return _of_strategy(strategy, config, holding, work, shape, machine)

    strategies = {strategy: of(strategy) for strategy in _possible(config, machine)}
    strategies.setdefault(name, of(name))
    saved = checkpoint_bytes(model.trained)
    return Forecast(
        config=config,
        machine=machine,
        model=model,
        data=data,
        shape=shape,
        work=work,
        keep_graphs=keep_graphs,
        chosen=strategies[name],
        strategies=tuple(strategies.values()),
        saved_bytes=saved,
        save_seconds=save_seconds(saved),
    )


def _step(config: RunConfig, run_file: Path, ranks: int, pairs: int | None) -> tuple[Blueprint, RunData, StepShape]:
    """The model, what is known of the pairs, and a rank's step."""

    def data_for(model: Blueprint) -> RunData:
        return run_data(config, model.pages.tokens_of, model.pages.most_tokens + TOKENS_OF_TEMPLATE, pairs)

    if config.reranker is not None:
        reranker = RerankerBlueprint(config, config.reranker, run_file)
        data = data_for(reranker)
        return reranker, data, reranker_shape(config, config.reranker, reranker, data, ranks)
    embedder = EmbedderBlueprint(config, run_file)
    data = data_for(embedder)
    return embedder, data, embedder_shape(config, embedder, data, ranks)


def _of_strategy(
    strategy: str,
    config: RunConfig,
    holding: Holding,
    work: Work,
    shape: StepShape,
    machine: Machine,
) -> StrategyForecast:
    training, sides = config.training, shape.sides
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

    def memory_with(inputs: int) -> Memory:
        forward, backward = shape.most_bytes(inputs)
        with_inputs = replace(holding, forward_bytes=forward, backward_bytes=backward)
        return memory_of(strategy, with_inputs, ranks, ranks_of_copy, on_gpu=on_gpu)

    largest = None
    if machine.gpu is not None:
        budget = int(machine.gpu.memory_bytes * USABLE_SHARE)
        largest = _largest(sides[shape.main].inputs, lambda inputs: memory_with(inputs).total_bytes <= budget)
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


def _holding(config: RunConfig, model: Blueprint, shape: StepShape) -> Holding:
    training, sides = config.training, shape.sides
    # A reranker whose tower cannot be run apart has pages with its pairs.
    pages = sides.get("document", sides[shape.main])
    prepared = config.data.dataloader_num_workers * config.data.dataloader_prefetch_factor * pages.mini_batch
    frozen = training.frozen_cache_gb if config.reranker is None else 0
    forward, backward = shape.most_bytes()
    return Holding(
        parameters=model.parameters_in_all,
        trained=model.trained,
        weight_bytes=model.weight_bytes,
        element_bytes=model.element_bytes,
        largest_trained=model.largest_trained,
        small_trained=model.small_trained,
        units=model.units,
        cast_bytes=shape.cast_bytes,
        forward_bytes=forward,
        backward_bytes=backward,
        kept_bytes=0,
        embedding_bytes=shape.embedding_bytes,
        tile_bytes=shape.tile_bytes,
        feature_bytes=shape.feature_bytes,
        page_bytes=(shape.documents + prepared) * model.pages.host_bytes(shape.page_tokens),
        frozen_bytes=0 if frozen == "auto" or model.trained == model.parameters_in_all else int(frozen * 1e9),
        reduces_at_once=False,
        keeps_gathered=False,
        eight_bit=False,
        bucket_elements=0,
    )


def _kept_share(
    config: RunConfig, holding: Holding, sides: Mapping[str, Side], machine: Machine, strategy: str
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
