"""What a card says, line by line, of what a model was made of: base, data, loss, settings, versions.

A card is made to be published, so it names no path of this machine: what is local goes by its last part.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from farnear.config import RunConfig
from farnear.model.card_facts import BaseFacts, CardFacts, DataFacts
from farnear.wording import counted

_HF_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@[^/]*)?/")


def training_words(config: RunConfig, facts: CardFacts, step: int) -> Iterator[tuple[str, str]]:
    """What it was made of and how, each with its name."""
    training = config.training
    of_all = f" of {facts.total_steps:,}" if facts.total_steps else ""
    yield "Base model" if len(facts.bases) == 1 else "Base models", "; ".join(map(_named, facts.bases))
    if facts.parameters:
        yield "Size", facts.parameters
    if config.model.lora is not None:
        yield "LoRA", f"{', '.join(f'{key} {value}' for key, value in config.model.lora.items())}; merged here"
    if config.model.freeze:
        yield "Frozen", ", ".join(config.model.freeze)
    yield from _data(config, facts.data)
    yield "Loss", facts.loss
    others = "each a negative for the others, duplicates left out"
    if config.reranker is not None:
        others = f"{config.reranker.num_negatives} other pages of the batch as negatives of each"
    yield "Batch", f"{training.global_batch_size} pairs, {others}"
    yield "Steps", f"{step:,}{of_all}"
    warmup = f" after {counted(facts.warmup_steps, 'step')} of warm-up" if facts.warmup_steps else ""
    yield "Learning rate", f"{training.learning_rate:g}, {training.lr_scheduler_type}{warmup}"
    clipping = f"gradients clipped at norm {training.max_grad_norm:g}" if training.max_grad_norm else "no clipping"
    betas = f"betas {training.adam_beta1:g}, {training.adam_beta2:g}"
    yield "Optimizer", f"{training.optim}, {betas}, weight decay {training.weight_decay:g}, {clipping}"
    precision = "bf16 weights" if training.pure_bf16 else f"fp32 weights, {training.precision} compute"
    yield "Precision", precision
    on = f", {facts.device}" if facts.device else ""
    yield "Strategy", f"{config.strategy} on {counted(facts.ranks, 'rank')}{on}; seed {config.seed}"
    yield "Versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())


def _data(config: RunConfig, data: DataFacts | None) -> Iterator[tuple[str, str]]:
    sources = {name: source.train for name, source in config.data.sources.items()} or {"": config.data.train}
    weights = {name: source.weight for name, source in config.data.sources.items()}
    shards = "; ".join(
        f"{name + ': ' if name else ''}{', '.join(f'`{shard_pattern(one)}`' for one in patterns)}"
        f"{f' (weight {weights[name]:g})' if weights.get(name) else ''}"
        for name, patterns in sources.items()
    )
    if data is None:
        yield "Data", shards
        return
    negatives = counted(data.negatives, "hard negative")
    if config.data.negatives:
        negatives += f" of {', '.join(f'`{Path(one).name}`' for one in config.data.negatives)}"
    if config.mining.refresh_every is not None:
        negatives += ", mined again on the way"
    yield (
        "Data",
        f"{counted(data.pairs, 'pair')}, {counted(data.pages, 'different page')}, {negatives}, in "
        f"{counted(data.shards, 'shard')} ({shards}); fingerprint `{data.fingerprint}`",
    )
    if data.eval_fingerprint is not None:
        yield (
            "Evaluation data",
            f"{counted(data.eval_queries or 0, 'query', 'queries')}, {counted(data.eval_pages or 0, 'page')} "
            f"({eval_names(config)}); fingerprint `{data.eval_fingerprint}`",
        )


def linked(base: BaseFacts) -> str:
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.is_on_hub else f"`{base.name}`"


def _named(base: BaseFacts) -> str:
    if base.is_on_hub:
        revision = f" (revision `{base.revision}`)" if base.revision not in (None, base.commit) else ""
        return f"{linked(base)}{f' at commit `{base.commit}`' if base.commit else ''}{revision}"
    made_from = f", itself made from {', '.join(base.made_from)}" if base.made_from else ""
    return f"the local folder {linked(base)}{made_from}"


def shard_pattern(shards: str) -> str:
    """Shards on the hub as a run file names them; of others the last part."""
    return shards if shards.startswith("hf://") else shards.partition("?")[0].rstrip("/").rpartition("/")[2]


def eval_names(config: RunConfig) -> str:
    return ", ".join(f"`{shard_pattern(one)}`" for one in (*config.data.eval, *config.data.eval_corpus))


def hf_names(patterns: Sequence[str]) -> Iterator[str]:
    yield from (found[1] for one in patterns if (found := _HF_DATA.match(one)))


def data_sets(config: RunConfig) -> dict[str, None]:
    """Names on the hub, each once."""
    of_sources = [one for source in config.data.sources.values() for one in source.train]
    return dict.fromkeys([*config.card.datasets, *hf_names([*config.data.train, *of_sources])])
