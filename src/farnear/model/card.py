"""The README.md of an export: what the model is, what it was made of, how good it is and how it is used.

Metadata that the hub reads (`huggingface_hub.ModelCardData`) stand above words for people (card.md.jinja beside this
file). All of it follows from the run file, from what the run has noted of itself (`CardFacts`) and from its
evaluations.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from farnear.config import RunConfig
from farnear.model.card_facts import UNKNOWN, CardFacts, Evaluations, base_license_of, license_of
from farnear.model.card_words import data_sets, eval_names, hf_names, linked, shard_pattern, training_words
from farnear.wording import counted

MEASURES = {"ndcg@10": "nDCG@10", "recall@10": "recall@10", "mrr@10": "MRR@10"}
"""What a card shows of an evaluation, and what it calls it."""

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_CITATIONS = Path(__file__).with_name("citations.bib")
_LOADED = re.compile(r'\b(SentenceTransformer|CrossEncoder)\("[^"]*"')


def card_text(config: RunConfig, facts: CardFacts, step: int, evaluations: Evaluations, folder_name: str) -> str:
    """The whole README.md of a model after ``step`` steps.

    Args:
        folder_name: Of the export, which the code in the card loads unless the run file names a place on the hub.
    """
    card = config.card
    title = (
        card.model_name or f"{' + '.join(base.name for base in facts.bases)} fine-tuned for visual document retrieval"
    )
    full = facts.dimension
    short_dims = sorted({dim for dim in config.loss.matryoshka_dims or () if dim != full}, reverse=True)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    words = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        is_reranker=config.reranker is not None,
        base=" and ".join(map(linked, facts.bases)),
        dimension=full,
        short_dims=short_dims,
        short_dim=short_dims[len(short_dims) // 2] if short_dims else None,
        model_id=card.model_id or folder_name,
        trust=", trust_remote_code=True" if config.model.trust_remote_code else "",
        prompts={name: text for name, text in facts.prompts.items() if text},
        pixels=_pixels(config),
        results=_results(config, evaluations),
        training=[*training_words(config, facts, step)],
        license=license_of(config),
        base_license=base_license_of(config, facts.bases),
        data_license=card.data_license or UNKNOWN,
        citations=_citations(config),
    )
    return f"---\n{_metadata(config, facts, evaluations, title).to_yaml()}\n---\n\n{words.strip()}\n"


def with_model_id(card: str, model_id: str) -> str:
    """A card whose code loads the model by its name on the hub."""
    return _LOADED.sub(rf'\1("{model_id}"', card)


def _metadata(config: RunConfig, facts: CardFacts, evaluations: Evaluations, title: str) -> ModelCardData:
    card, is_reranker = config.card, config.reranker is not None
    kind = ["cross-encoder", "reranker", "text-ranking"] if is_reranker else ["feature-extraction"]
    results = list(_eval_results(config, evaluations))
    from_hub = [name for base in facts.bases for name in ([base.name] if base.is_on_hub else base.made_from)]
    about_base: dict[str, Any] = {"base_model_relation": "finetune"} if from_hub else {}
    if commits := [base.commit for base in facts.bases if base.commit]:
        about_base["base_model_revision"] = _one_or_list(commits)
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="text-ranking" if is_reranker else "feature-extraction",
        tags=["sentence-transformers", "visual-document-retrieval", *kind, "farnear"],
        language=_one_or_list(card.language),
        license=license_of(config),
        base_model=_one_or_list(from_hub),
        datasets=list(data_sets(config)) or None,
        model_name=title,
        eval_results=results or None,
        **about_base,
    )


def _one_or_list(values: Sequence[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else list(values) or None


def _eval_results(config: RunConfig, evaluations: Evaluations) -> Iterator[EvalResult]:
    now = evaluations.now
    if now is None:
        return
    shared: dict[str, Any] = {
        "task_type": "information-retrieval",
        "task_name": "Visual document retrieval",
        "dataset_type": next(iter(hf_names(config.data.eval)), UNKNOWN),
        "dataset_name": ", ".join(map(shard_pattern, config.data.eval)),
        "dataset_args": {"queries": now["queries"], "pages": now["pages"]},
    }
    for dim, measures in now["metrics"].items():
        of_dim = "" if config.reranker is not None else f", {dim} dimensions"
        for measure, name in MEASURES.items():
            yield EvalResult(
                **shared,
                metric_type=measure.replace("@", "_at_"),
                metric_name=f"{name}{of_dim}",
                metric_value=round(measures[measure], 4),
            )


def _results(config: RunConfig, evaluations: Evaluations) -> dict[str, Any] | None:
    """The table, and the sentence above it."""
    before, now = evaluations.before, evaluations.now
    if now is None:
        return None
    told = (
        f"{counted(now['queries'], 'query', 'queries')} against {counted(now['pages'], 'page')} of {eval_names(config)}"
    )
    if now["kind"] == "during":
        told = f"Measured at step {now['step']}, on a sample: {told}"
        if before is not None:
            size = f"{counted(before['queries'], 'query', 'queries')} against {counted(before['pages'], 'page')}"
            told += f". The base model was measured on all, {size}, so the two do not compare"
    else:
        told = f"Measured on {told}"
    if config.reranker is not None:
        return {"told": f"{told}.", **_by_stage(before, now)}
    columns = [(name, measure) for measure, name in MEASURES.items()]
    stages = [("before", before), ("after", now)] if before is not None else [("after", now)]
    head = ["dimensions", *(f"{name} {stage}" for name, _ in columns for stage, _ in stages)]
    rows = [
        [dim, *(_figure(record["metrics"].get(dim), measure) for _, measure in columns for _, record in stages)]
        for dim in now["metrics"]
    ]
    return {"told": f"{told}.", "head": head, "rows": rows}


def _by_stage(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """A reranker has no dimensions, but an embedder before it."""
    stages: list[tuple[str, Mapping[str, float] | None]] = [
        (f"first {now['rerank_k']} of the embedder, in its order", now.get("embedder")),
        ("reranked before training", before and before["metrics"]["1"]),
        ("reranked by this model", now["metrics"]["1"]),
    ]
    rows = [[name, *(_figure(found, one) for one in MEASURES)] for name, found in stages if found is not None]
    return {"head": ["", *MEASURES.values()], "rows": rows}


def _figure(measures: Mapping[str, float] | None, name: str) -> str:
    return "" if measures is None else f"{measures[name]:.4f}"


def _pixels(config: RunConfig) -> str | None:
    low, high = config.model.min_pixels, config.model.max_pixels
    return " and ".join([*([f"at least {low:,}"] if low else []), *([f"at most {high:,}"] if high else [])]) or None


def _citations(config: RunConfig) -> list[str]:
    """Of the methods that the run uses."""
    entries = _CITATIONS.read_text(encoding="utf-8").strip().split("\n\n")
    by_key = {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}
    loss, reranker = config.loss, config.reranker
    wanted = {
        "reimers-2019-sentence-bert": True,
        "gao2021scaling": reranker is None,
        "oord2018representation": reranker is None and loss.function is None and loss.contrastive_weight > 0,
        "kusupati2022matryoshka": reranker is None and loss.matryoshka_dims is not None,
        "hofstatter2020improving": "margin_mse" in (reranker.loss if reranker else None, loss.distillation),
        "cao2007learning": reranker is not None and reranker.loss.startswith("listwise"),
        "hu2021lora": config.model.lora is not None,
    }
    return [by_key[key] for key, is_used in wanted.items() if is_used]
