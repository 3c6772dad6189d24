"""What follows from the run file, the data and the machine, said before step 0."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from sentence_transformers.sentence_transformer.modules import Pooling

from farnear.config import RunConfig
from farnear.data.faults import pairs_lost
from farnear.data.index import modality_name
from farnear.data.negatives import Negatives
from farnear.data.scan_rows import MODALITY_BITS
from farnear.data.summary import ignored_members
from farnear.model.heads import head_of
from farnear.model.pixels import ProportionalTokens, page_tokens
from farnear.model.towers import is_router, modalities_of, readers_of_pages
from farnear.reranker_section import RerankerConfig
from farnear.sections import LossConfig
from farnear.training.engine import BuiltModel
from farnear.training.loop import Parts
from farnear.training.optim import warmup_steps
from farnear.training.shards import RunData
from farnear.wording import counted


def derived_numbers(parts: Parts, data: RunData, built: BuiltModel) -> str:
    """The numbers as lines of text."""
    config, training, world = parts.config, parts.config.training, parts.world
    model, preprocess = built.model, built.preprocess
    plan, index = parts.loader.order.plan(0), data.train
    # The first batch is as full as any; ranks differ by one pair at most.
    batch = len(parts.loader.order.global_batch(0))
    pairs_per_rank = -(-batch // world.world_size)
    precision = "bf16 weights" if training.pure_bf16 else f"fp32 weights, {training.precision} compute"
    prompts = ", ".join(f"{name}: {text!r}" for name, text in model.prompts.items() if text) or "none"
    hard = int(data.negatives.counts(config.data.num_negatives).sum())
    of_files = f" of {data.negatives.origin}" if data.negatives.origin != Negatives.origin else ""
    all_there_are = f" (all there are, training.global_batch_size is {training.global_batch_size})"
    lines = [
        ("model", f"{config.model.title}: {parameters_in_words(model)}, {precision}"),
        ("reads", f"{modalities_of(model)}; {_head(config, model)}; prompts {prompts}"),
        (
            "pages",
            ("travel as uint8" if preprocess.pages_as_uint8 else f"travel as floats: {preprocess.why_floats}")
            + _one_size(config, model),
        ),
        (
            "trains",
            f"on {counted(world.world_size, 'rank')} ({world.device.type}), "
            f"strategy {config.strategy}, seed {config.seed}",
        ),
        (
            "pairs",
            f"{len(index):,} in {counted(len(set(index.pair_shard_N.tolist())), 'shard')}, "
            f"{counted(hard, 'hard negative')}{of_files}, {ignored_members(index)} ignored, "
            f"{pairs_lost(index.faults)} lost to faults, {index.excluded} excluded",
        ),
        ("inputs", _inputs(data)),
        (
            "batch",
            f"{batch} pairs{all_there_are if batch < training.global_batch_size else ''}, {pairs_per_rank} a rank; "
            f"negatives a query: {config.reranker.num_negatives if config.reranker else batch - 1}"
            f"{' and the hard ones' if hard else ''}",
        ),
        ("cache", _cache(parts, built) if config.reranker is None else _turns(parts)),
        ("loss", loss_in_words(config)),
        (
            "duplicates",
            f"first epoch: {plan.moved} pairs moved to another batch, {plan.masked} masked where they could not be",
        ),
        ("order", _order(parts, data)),
        (
            "steps",
            f"{parts.total_steps} in all, {len(plan.rows_SG)} in the first epoch, "
            f"{warmup_steps(training, parts.total_steps)} of warm-up, then {training.lr_scheduler_type}",
        ),
        ("saves", _saves(parts)),
        ("evaluates", _evaluation(parts, data)),
        *([("mines", f"again {_refresh(parts)}")] if parts.refresh_steps else []),
    ]
    return "\n".join(f"{name:>10}  {text}" for name, text in lines)


def _head(config: RunConfig, model: Any) -> str:
    """What makes an embedding or a score of the last layer's tokens."""
    if config.reranker is not None:
        return f"head {head_of(model)}"
    routes = model[0].sub_modules.items() if is_router(model[0]) else [("", model)]
    return ", ".join(f"{f'{name} ' if name else ''}pooling {_pooling_in(modules)}" for name, modules in routes)


def _pooling_in(modules: Iterable[Any]) -> str:
    return next((str(module.pooling_mode) for module in modules if isinstance(module, Pooling)), "its own")


def _turns(parts: Parts) -> str:
    """How the lists go through the model."""
    training = parts.config.training
    sizes = []
    for side, name in (("pair", "pairs"), ("document", "pages")):
        size, tokens = training.mini_batch_size_of[side], training.mini_batch_num_tokens_of[side]
        bounds = [f"{size}" if size else "", f"{tokens:,} tokens" if tokens else ""]
        sizes.append(f"{name} {' or '.join(filter(None, bounds))}")
    return (
        f"mini-batches of up to {', '.join(sizes)}; lists that fit are run backward at once, graphs kept of "
        f"{parts.choices.keep_graphs:.0%} of the others"
    )


def loss_in_words(config: RunConfig) -> str:
    """What the objective is."""
    return _loss(config.loss) if config.reranker is None else _list_loss(config.reranker)


def _list_loss(reranker: RerankerConfig) -> str:
    if reranker.loss == "listwise":
        return f"listwise softmax, scale {reranker.scale:g}, activation {reranker.activation_fn}"
    if reranker.loss == "listwise_distillation":
        return f"listwise distillation, temperature {reranker.distillation_temperature:g}"
    return reranker.loss


def _cache(parts: Parts, built: BuiltModel) -> str:
    """How the batch goes through the model."""
    training, choices = parts.config.training, parts.choices
    sizes = []
    for side, name in (("query", "queries"), ("document", "pages")):
        size, tokens = training.mini_batch_size_of[side], choices.mini_batch_num_tokens[side]
        bounds = [f"{size}" if size else "", f"{tokens:,} tokens" if tokens else ""]
        sizes.append(f"{name} {' or '.join(filter(None, bounds))}")
    text = f"mini-batches of up to {', '.join(sizes)}"
    if choices.keep_graphs < 1:
        text += f"; {counted(choices.together, 'mini-batch', 'mini-batches')} at once without graph"
    text += f"; graphs kept of {choices.keep_graphs:.0%} of them"
    if (frozen := built.frozen) and frozen.names and frozen.budget_bytes:
        names, gigabytes = ", ".join(sorted(frozen.names)), frozen.budget_bytes / 1e9
        text += f"; outputs of {names} kept in up to {gigabytes:.1f} GB a rank if no gradient passes there"
    return text


def _loss(loss: LossConfig) -> str:
    dims = f", summed over dims {', '.join(map(str, loss.matryoshka_dims))}" if loss.matryoshka_dims else ""
    if loss.function:
        return f"{loss.function} on the embeddings of {'all ranks' if loss.gather else 'each rank'}{dims}"
    scale = f"scale {loss.scale:g}, {'trained up to ' + format(loss.max_scale, 'g') if loss.learn_scale else 'fixed'}"
    softmax = "" if len(loss.directions) == 1 else f" in {loss.partition_mode} softmax"
    hardness = f", {loss.hardness_mode} by {loss.hardness_strength:g}" if loss.hardness_mode else ""
    margin = f", without what is within {loss.margin:g} ({loss.margin_strategy})" if loss.margin is not None else ""
    infonce = f"InfoNCE, {', '.join(loss.directions)}{softmax}, {scale}{hardness}{margin}{dims}"
    if loss.distillation is None:
        return infonce
    temperature = f" at {loss.distillation_temperature:g}" if loss.distillation == "listwise_distillation" else ""
    distillation = f"{loss.distillation_weight:g} of {loss.distillation}{temperature}, from a teacher's scores"
    if loss.contrastive_weight == 0:
        return f"{distillation}, {scale}{dims}"
    return f"{loss.contrastive_weight:g} of {infonce}; and {distillation}"


def parameters_in_words(model: Any) -> str:
    """How many there are, and how many of them are trained."""
    # Under ZeRO-3 a parameter has another shape than its own.
    elements = [(getattr(p, "ds_shape", p.shape).numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(count for count, _ in elements), sum(count for count, is_trained in elements if is_trained)
    return f"{total:,} parameters" + (f", {trained:,} of them trained" if trained < total else "")


def _one_size(config: RunConfig, model: Any) -> str:
    """Of a model that makes all pages one size: that it does, and which keys of the run file it does not read."""
    tokens = page_tokens(model)
    is_one = isinstance(tokens, ProportionalTokens) and tokens.min_pixels == tokens.max_pixels
    if not is_one or not readers_of_pages(model):
        return ""
    limits = config.model.pixel_limits
    return "; all become one size" + (f", whatever {' and '.join(limits)} says" if limits else "")


def _inputs(data: RunData) -> str:
    """How many documents of which kind, and how large their pages are."""
    index = data.train
    documents = np.unique(np.concatenate([index.positives, data.negatives.rows]))
    kinds, counts = np.unique(index.input_modality_I[documents], return_counts=True)
    by_kind = ", ".join(f"{count:,} {modality_name(int(kind))}" for kind, count in zip(kinds, counts, strict=True))
    pages = documents[index.input_modality_I[documents] == MODALITY_BITS["image"]]
    if len(pages) == 0:
        return f"documents: {by_kind}"
    part = index.part_start_I1[pages]
    pixels = index.part_width_M[part].astype(np.int64) * index.part_height_M[part]
    low, middle, high = (int(value) for value in np.percentile(pixels, (5, 50, 95)))
    spread = f"{middle:,} ({low:,} to {high:,} of most)" if low < high else f"{middle:,}"
    return f"documents: {by_kind}; pixels of a stored page {spread}"


def _order(parts: Parts, data: RunData) -> str:
    data_config, plan = parts.config.data, parts.loader.order.plan(0)
    window = f"windows of {counted(data_config.shards_per_window, 'shard')}" if data_config.shards_per_window else "all"
    seen = ", ".join(f"{name} {passes:.2f}" for name, passes in zip(data.train.sources, plan.passes, strict=True))
    sources = f"; passes an epoch: {seen} (mixed {data_config.mixing})" if len(data.train.sources) > 1 else ""
    left_out = f", {plan.left_out} left out of an epoch" if plan.left_out else ""
    shown = parts.total_steps * parts.config.training.global_batch_size
    if data_config.tail == "carry" and len(data.train.sources) == 1 and (rest := -shown % len(data.train)):
        left_out = f", the last pass ends {counted(rest, 'pair')} short"
    return f"shuffled over {window}, tail {data_config.tail}{left_out}{sources}"


def _saves(parts: Parts) -> str:
    when = f"every {counted(parts.save_steps, 'step')} and at the end" if parts.save_steps else "at the end"
    return f"{when}; the best of the evaluations is kept too" if parts.eval_steps else when


def _refresh(parts: Parts) -> str:
    mining = parts.config.mining
    return (
        f"every {counted(parts.refresh_steps or 0, 'step')}, {counted(mining.num_negatives, 'negative')} a pair of "
        f"ranks {mining.range_min} to {mining.range_max}, of which {parts.config.negatives_of_refresh} are used"
    )


def _evaluation(parts: Parts, data: RunData) -> str:
    if data.whole is None or data.sample is None:
        return "nothing: data.eval names no shards"
    when = f"every {counted(parts.eval_steps, 'step')}" if parts.eval_steps else "not in between"
    ends = "at start and end" if parts.config.evaluation.eval_on_start else "at the end"
    return f"{len(data.whole.relevant)} queries on {data.whole.pages} pages {ends}; {when}" + (
        f", on {len(data.sample.relevant)} queries and {data.sample.pages} pages" if parts.eval_steps else ""
    )
