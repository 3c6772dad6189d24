"""A forecast as lines for a person."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from farnear.config import RunConfig
from farnear.launching.forecast import USABLE_SHARE, Forecast, StrategyForecast
from farnear.launching.foresee import foreseen
from farnear.launching.memory import MOMENTS
from farnear.launching.passes import Side
from farnear.launching.step_time import (
    CPU_FLOPS_OF_A_CORE,
    CPU_LINK,
    CPU_MEMORY_BANDWIDTH,
    DISK_BANDWIDTH,
    FP32_SHARE,
    LINK_SHARE,
    UTILISATION,
)
from farnear.model.blueprint_reranker import RerankerBlueprint
from farnear.model.config_files import CONFIG
from farnear.wording import counted

WIDTH = 120


def plan_lines(forecast: Forecast) -> Iterator[str]:
    """The whole plan."""
    yield f"plan for {_where(forecast)}; computed, nothing is measured"
    yield ""
    yield from _named(_facts(forecast))
    yield from _set_keys(forecast.config)
    yield ""
    yield from _memory(forecast)
    yield ""
    yield from _strategies(forecast)
    yield ""
    yield from _named(_time(forecast))
    _, notes = foreseen(forecast)
    if notes:
        yield ""
        yield from (f"note: {note}" for note in notes)


def _named(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, text in lines:
        yield from _wrapped(name, text)


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{name:>12}  ",
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _where(forecast: Forecast) -> str:
    machine = forecast.machine
    if machine.gpu is None:
        return (
            f"{counted(machine.ranks, 'process', 'processes')} on a CPU, {counted(machine.cores_of_rank, 'core')} each"
        )
    nodes = f" on {machine.nodes} nodes" if machine.nodes > 1 else ""
    return f"{machine.ranks} x {machine.gpu.name}{nodes} ({_size(machine.gpu.memory_bytes)} each)"


def _facts(forecast: Forecast) -> list[tuple[str, str]]:
    config, training, model = forecast.config, forecast.config.training, forecast.model
    precision = "bf16 weights" if training.pure_bf16 else f"fp32 weights, {training.precision} compute"
    trained = "all trained" if model.trained == model.parameters_in_all else f"{model.trained:,} trained"
    switches = [
        f"attention {config.model.attn_implementation or 'as transformers chooses'}",
        f"{training.optim}, lr {training.learning_rate:g}",
        *(["gradient checkpointing"] if training.gradient_checkpointing else []),
        *([f"reduce: {training.reduce}"] if training.reduce != "step" else []),
        *([f"reshard: {training.reshard}"] if training.reshard != "forward" else []),
        f"seed {config.seed}",
    ]
    return [
        ("run", f"strategy {config.strategy}, {precision}, {', '.join(switches)}"),
        (
            "model",
            f"{config.model.title}: {model.parameters_in_all:,} parameters, {trained}; {_gives(forecast)} "
            f"(by {', '.join(str(folder / CONFIG) for folder in model.folders.values())})",
        ),
        *(_lists(forecast) if forecast.shape.lists else _pairs(forecast)),
        ("data", _data(forecast)),
    ]


def _gives(forecast: Forecast) -> str:
    if isinstance(forecast.model, RerankerBlueprint):
        return f"scores by the head {forecast.model.head}"
    return f"embeddings of {forecast.model.width:,}"


def _pairs(forecast: Forecast) -> list[tuple[str, str]]:
    """What an embedder's step is made of."""
    loss, shape = forecast.config.loss, forecast.shape
    dims = loss.matryoshka_dims
    pages, queries = forecast.sides["document"], forecast.sides["query"]
    hard = f" and {shape.documents_of_all - shape.pairs_of_all:,} hard ones" if shape.documents > shape.pairs else ""
    return [
        (
            "loss",
            f"{loss.function or 'InfoNCE, ' + ', '.join(loss.directions)}"
            + (f", with {loss.distillation}" if loss.distillation else "")
            + (f", dims {', '.join(map(str, dims))}" if dims else ""),
        ),
        (
            "batch",
            f"{shape.pairs_of_all:,} pairs, {shape.pairs} a rank; negatives a query: {shape.pairs_of_all - 1:,}{hard}",
        ),
        (
            "mini-batches",
            f"{_mini_batches(pages, 'page')} and {_mini_batches(queries, 'query', 'queries')} a rank"
            f"{_auto(forecast)}; {shape.together} at once in pass one; graphs of {forecast.keep_graphs:.0%} kept",
        ),
    ]


def _lists(forecast: Forecast) -> list[tuple[str, str]]:
    """What a reranker's step is made of."""
    reranker, shape = forecast.config.reranker, forecast.shape
    lists = shape.lists
    assert reranker is not None and lists is not None
    entries = forecast.sides["pair"]
    pages = forecast.sides.get("document")
    seen = f"{_mini_batches(pages, 'page')} through the tower and " if pages else ""
    passes = "whole lists, one pass" if lists.are_whole else "no list fits into one, two passes"
    return [
        ("loss", f"{reranker.loss} over lists of {lists.longest:,}"),
        (
            "batch",
            f"{shape.pairs_of_all:,} lists, {shape.pairs} a rank; a list: its positive, {lists.hard:.3g} hard "
            f"negatives and {lists.in_batch} of the batch; {entries.inputs:,} pairs of {shape.documents:,} pages "
            "a rank",
        ),
        (
            "mini-batches",
            f"{seen}{_mini_batches(entries, 'pair')} a rank: {passes}; graphs of {forecast.keep_graphs:.0%} kept",
        ),
    ]


def _mini_batches(side: Side, one: str, several: str | None = None) -> str:
    return f"{side.mini_batches} of {counted(side.mini_batch, one, several)} ({side.tokens} tokens)"


def _set_keys(config: RunConfig) -> Iterator[str]:
    """What the run file and the command line set; all else is as `farnear.sections` has it."""
    words = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in _flat(config.model_dump(mode="json", exclude_unset=True))
    ]
    # A value with spaces stays on one line.
    text = " ".join(word.replace(" ", "\0") for word in words)
    lines = _wrapped("set", text)
    yield from (line.replace("\0", " ") for line in lines)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            # Intervals are numbers of steps or shares of all.
            yield prefix + key, int(value) if isinstance(value, float) and value.is_integer() else value


def _auto(forecast: Forecast) -> str:
    is_auto = "auto" in forecast.config.training.mini_batch_num_tokens_of.values()
    return ", the least: a run measures what auto is" if is_auto else ""


def _data(forecast: Forecast) -> str:
    data, training = forecast.data, forecast.config.training
    if data.steps is None:
        return "not known here: steps and epochs are left out"
    if data.pairs is None:
        return f"{counted(data.steps, 'step')}, as training.max_steps says"
    text = f"{data.pairs:,} pairs, {counted(data.steps, 'step')}"
    if training.max_steps > 0:
        text += " by training.max_steps"
    if data.steps_of_epoch:
        text += f", {data.steps_of_epoch:,} an epoch ({_epochs(data.steps / data.steps_of_epoch)})"
    if data.shards is not None and data.shards_of_step is not None:
        text += f"; a batch touches {data.shards_of_step:.1f} of {counted(data.shards, 'shard')}"
    return text


def _epochs(number: float) -> str:
    return "1 epoch" if number == 1 else f"{number:.3g} epochs"


def _memory(forecast: Forecast) -> Iterator[str]:
    memory, machine = forecast.chosen.memory, forecast.machine
    table = memory.by_moment()
    yield f"{'memory of a rank, ' + forecast.chosen.name:<28}" + "".join(f"{moment:>11}" for moment in MOMENTS)
    for name, of_moment in table.items():
        if any(of_moment.values()):
            yield f"  {name:<26}" + "".join(f"{_size(size) if size else '-':>11}" for size in of_moment.values())
    totals = [sum(of_moment[moment] for of_moment in table.values()) for moment in MOMENTS]
    yield f"  {'together':<26}" + "".join(f"{_size(size):>11}" for size in totals)
    if machine.gpu is None:
        yield f"  peak: {_size(memory.total_bytes)}: on a CPU little of what one moment gives back serves the next"
    else:
        usable = f"{USABLE_SHARE:.0%} of the {_size(machine.gpu.memory_bytes)} of {machine.gpu.name}"
        yield f"  peak: {_size(memory.total_bytes)}, in {memory.moment}; {usable} can be used"
    if memory.host:
        ranks = machine.ranks_of_node
        parts = ", ".join(f"{part.name} {_size(part.bytes)}" for part in memory.host if part.bytes >= 5e5)
        node = _size(ranks * memory.host_bytes)
        yield f"  host memory of a rank: {_size(memory.host_bytes)} ({parts}); of a node: {node}"


def _strategies(forecast: Forecast) -> Iterator[str]:
    on_gpu = forecast.machine.gpu is not None
    most = f"{'largest mini-batch':>20}" if on_gpu else ""
    rate = "lists/s" if forecast.shape.lists else "pairs/s"
    yield f"{'strategy':<15}{'memory':>10}{most}{'sent a step':>14}{'s a step':>10}{rate:>10}"
    cheapest = forecast.cheapest
    for one in forecast.strategies:
        marks = [
            *(["chosen"] if one is forecast.chosen else []),
            *([_cheapest(one, forecast)] if one is cheapest else []),
        ]
        yield _row(one, forecast) + (f"  <- {', '.join(marks)}" if marks else "")
    if on_gpu:
        told = "cheapest: the shortest step of those that fit"
        if any(one.largest_mini_batch == forecast.sides[forecast.shape.main].inputs for one in forecast.strategies):
            told += f". all: the batch has no more {'pairs' if forecast.shape.lists else 'pages'} for a rank"
        yield told
    sent = forecast.chosen.network.sent
    if sent:
        parts = ", ".join(f"{name.replace('_', ' ')} {_size(size)}" for name, size in sent.items())
        yield f"a rank sends in a step under {forecast.chosen.name}: {parts} (as metrics.jsonl counts)"


def _cheapest(one: StrategyForecast, forecast: Forecast) -> str:
    smaller = "" if forecast.fits(one) else f", with mini-batches of {one.largest_mini_batch}"
    return f"cheapest that fits{smaller}"


def _row(one: StrategyForecast, forecast: Forecast) -> str:
    most = ""
    if one.largest_mini_batch is not None:
        number, inputs = one.largest_mini_batch, forecast.sides[forecast.shape.main].inputs
        words = "none fits" if number == 0 else f"{number} (all)" if number == inputs else str(number)
        most = f"{words:>20}"
    pairs = forecast.shape.pairs_of_all / one.time.total
    sent = _size(sum(one.network.sent.values()))
    return f"{one.name:<15}{_size(one.memory.total_bytes):>10}{most}{sent:>14}{one.time.total:>10.2f}{pairs:>10.1f}"


def _time(forecast: Forecast) -> list[tuple[str, str]]:
    time, machine = forecast.chosen.time, forecast.machine
    training = forecast.config.training
    half = training.precision != "fp32"
    if machine.gpu is None:
        model = (
            f"{CPU_FLOPS_OF_A_CORE / 1e9:.0f} GFLOP/s a core, memory {CPU_MEMORY_BANDWIDTH / 1e9:.0f} GB/s, between "
            f"processes {CPU_LINK / 1e9:.0f} GB/s, all assumed"
        )
    else:
        peak = machine.gpu.bf16_flops * (1.0 if half else FP32_SHARE)
        link = f"{machine.gpu.link} {machine.gpu.link_bandwidth / 1e9:.0f} GB/s"
        if machine.nodes > 1:
            between = machine.ranks_of_node * machine.node_bandwidth / 1e9
            link += f", {between:.0f} GB/s a node to others (--node-bandwidth)"
        model = (
            f"{UTILISATION:.0%} of {peak / 1e12:.0f} TFLOP/s assumed, memory {machine.gpu.memory_bandwidth / 1e12:.2f} "
            f"TB/s, {LINK_SHARE:.0%} of {link} assumed; parts one after the other, none hidden"
        )
    lines = [
        (
            "step",
            f"{time.total:.2f} s: compute {time.compute:.2f} ({forecast.work.flops / 1e12:.1f} TFLOP a rank), "
            f"optimizer {time.optimizer:.3f}, network {time.network:.3f}",
        ),
        ("by", model),
    ]
    if forecast.data.steps is not None:
        seconds = forecast.data.steps * time.total
        takes = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
        lines.append(("run", f"{counted(forecast.data.steps, 'step')}: {takes}, without evaluations and saves"))
    lines.append(
        (
            "checkpoint",
            f"{_size(forecast.saved_bytes)} on the disk, {forecast.save_seconds:.0f} s until it is published at an "
            f"assumed {DISK_BANDWIDTH / 1e9:.0f} GB/s",
        )
    )
    return lines


def _size(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}" if unit == "GB" else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"
