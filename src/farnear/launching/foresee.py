"""What would go wrong with a planned run, told before it waits in a queue; and what is not known on this machine."""

import importlib.util
import os

from farnear.config import RunConfig
from farnear.errors import UserError
from farnear.launching.forecast import USABLE_SHARE, Forecast, StrategyForecast
from farnear.launching.memory import Memory
from farnear.launching.run_data import QUERY_TOKENS_ASSUMED
from farnear.model.blueprint import EmbedderBlueprint
from farnear.tracking import refuse_missing_trackers

_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def foreseen(forecast: Forecast) -> tuple[list[str], list[str]]:
    """(errors, notes), a line each."""
    errors = [*forecast.data.faults, *_batch(forecast), *_model(forecast), *_memory(forecast)]
    notes = []
    if forecast.data.pages is None:
        notes.append(f"{forecast.data.known_by}, so {_unknown(forecast)}")
    attention = _attention(forecast.config)
    if attention and forecast.machine.is_this:
        errors.append(f"{attention}; set sdpa or varlen")
    elif attention:
        notes.append(f"{attention}, which says nothing of the machine that is planned for")
    if (tracker := _tracker(forecast.config)) and forecast.machine.is_this:
        errors.append(tracker)
    elif tracker:
        notes.append(f"{tracker}; that says nothing of the machine that is planned for")
    if forecast.shape.estimated:
        notes.append(
            f"the model's code could not be followed without numbers ({forecast.shape.estimated}), so activations and "
            "FLOPs are estimated from the sizes of its layers"
        )
    if (limits := forecast.config.model.pixel_limits) and forecast.model.pages.is_one_size:
        notes.append(f"the model makes all pages one size, whatever {' and '.join(limits)} says")
    if forecast.machine.gpu is None:
        notes.append("a CPU's speed differs more than a GPU's: a step may well take three times as long")
        ranks, cores = forecast.machine.ranks_of_node, len(os.sched_getaffinity(0))
        if forecast.machine.is_this and ranks > cores:
            notes.append(f"{ranks} processes would share {cores} cores, and are planned as if each had one")
    return errors, notes


def _unknown(forecast: Forecast) -> str:
    left_out = "shards a step are left out"
    if forecast.data.steps is None:
        left_out = "steps, epochs and shards a step are left out (--pairs N gives the steps)"
    assumed = f"pages are as large as may be and queries {QUERY_TOKENS_ASSUMED} tokens long"
    if forecast.config.data.negatives and forecast.config.data.num_negatives is None:
        assumed += f", with {forecast.data.most_negatives} hard negatives each"
    return f"{left_out}, {assumed}"


def _batch(forecast: Forecast) -> list[str]:
    batch, ranks = forecast.config.training.global_batch_size, forecast.machine.ranks
    if ranks > batch:
        return [
            f"{ranks} ranks are more than the {batch} pairs of training.global_batch_size, so some would have none and "
            f"no figure above holds; take {batch} ranks at most, or raise it"
        ]
    single = forecast.config.strategy == "single" and ranks > 1
    return [f"strategy single is one process, and {ranks} are planned; set strategy=ddp"] if single else []


def _model(forecast: Forecast) -> list[str]:
    errors, model, config = [], forecast.model, forecast.config
    width = model.width if isinstance(model, EmbedderBlueprint) else 0
    if above := [dim for dim in config.loss.matryoshka_dims or () if dim > width]:
        errors.append(
            f"loss.matryoshka_dims names {', '.join(map(str, above))}, but the embeddings of "
            f"{config.model.title} have {width} dimensions; take out what is above"
        )
    side = model.pages.patch_pixels * model.pages.merge
    if model.pages.max_pixels < side**2:
        errors.append(
            f"model.max_pixels is {model.pages.max_pixels}, less than the {side} x {side} pixels of one token, and no "
            f"page can be made so small; set it to {side**2} at least"
        )
    if model.pages.min_pixels > model.pages.max_pixels:
        errors.append(
            f"pages have {model.pages.min_pixels} pixels at least by the model's processor and "
            f"{model.pages.max_pixels} at most by model.max_pixels; raise that, or set model.min_pixels too"
        )
    return errors


def _memory(forecast: Forecast) -> list[str]:
    chosen, budget, gpu = forecast.chosen, forecast.budget_bytes, forecast.machine.gpu
    if budget is None or gpu is None or forecast.fits(chosen):
        return []
    needed = (
        f"{_gigabytes(chosen.memory)} GB a rank, above the {budget / 1e9:.1f} GB ({USABLE_SHARE:.0%}) of {gpu.name}"
    )
    if chosen.largest_mini_batch:
        return [f"strategy {chosen.name} needs {needed}, with these mini-batches; set {_sizes(forecast, chosen)}"]
    best = forecast.cheapest
    advice = "no strategy fits: take more GPUs, lora, or a smaller model"
    if best:
        smaller = "" if forecast.fits(best) else f" and {_sizes(forecast, best)}"
        advice = f"set strategy={best.name}{smaller}, which fits"
    return [f"strategy {chosen.name} needs {needed}, whatever the mini-batch, and would run out of memory; {advice}"]


def _sizes(forecast: Forecast, of: StrategyForecast) -> str:
    """The largest mini-batches with which a strategy fits, as the run file has them."""
    sizes = forecast.shape.mini_batches_of(of.largest_mini_batch)
    least = {side: min(size, forecast.sides[side].mini_batch) for side, size in sizes.items()}
    return f"training.mini_batch_size={{{', '.join(f'{side}: {size}' for side, size in least.items())}}}"


def _tracker(config: RunConfig) -> str | None:
    try:
        refuse_missing_trackers(config.training.report_to)
    except UserError as error:
        return str(error)
    return None


def _gigabytes(memory: Memory) -> str:
    return f"{memory.total_bytes / 1e9:.1f}"


def _attention(config: RunConfig) -> str | None:
    package = _PACKAGES.get(config.model.attn_implementation or "")
    if package is None or importlib.util.find_spec(package) is not None or config.model.allow_kernel_download:
        return None
    return f"model.attn_implementation: {config.model.attn_implementation} is not installed on this machine"
