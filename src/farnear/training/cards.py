"""The card of a run's models: what is noted for it at the start, and its text whenever a model is exported.

What a card says of base and data stands in `card.json` of the run folder, so that a model can be exported later, from a
checkpoint, where neither the shards nor the run's process are.
"""

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import ValidationError

from farnear.config import RunConfig
from farnear.files import readable_lines
from farnear.model.base import bases_facts
from farnear.model.card import card_text
from farnear.model.card_facts import UNKNOWN, CardFacts, DataFacts, Evaluations, base_license_of
from farnear.model.router import width_of
from farnear.parallel.world import World
from farnear.run_folder import RunFolder
from farnear.training.checkpoint import Checkpoint
from farnear.training.describe import loss_in_words, parameters_in_words
from farnear.training.engine import BuiltModel
from farnear.training.optim import warmup_steps
from farnear.training.resume import commits_of
from farnear.training.shards import RunData


def facts_of_run(
    config: RunConfig,
    data: RunData,
    built: BuiltModel,
    world: World,
    *,
    total_steps: int,
    commits: Mapping[str, str],
    versions: dict[str, str],
) -> CardFacts:
    """What a run notes at its start.

    Args:
        commits: Of the base models on the hub, by the key that names each.
        versions: Of the packages that train.
    """
    model = built.model
    return CardFacts(
        bases=bases_facts(config.model, commits),
        data=_data(config, data),
        parameters=parameters_in_words(model),
        dimension=width_of(model) if config.reranker is None else None,
        prompts=dict(model.prompts),
        ranks=world.world_size,
        device="CPU" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device),
        total_steps=total_steps,
        warmup_steps=warmup_steps(config.training, total_steps),
        loss=loss_in_words(config),
        versions=versions,
    )


def facts_of_checkpoint(config: RunConfig, folder: RunFolder, checkpoint: Checkpoint) -> CardFacts:
    """What a run has noted, or where that is lost, what its run file and a checkpoint know."""
    try:
        return CardFacts.model_validate_json(folder.card.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        manifest = checkpoint.manifest
        return CardFacts(
            bases=bases_facts(config.model, commits_of(manifest.progress.bases)),
            ranks=manifest.world_size,
            total_steps=manifest.progress.total_steps,
            loss=loss_in_words(config),
            versions=manifest.versions,
        )


def run_card(config: RunConfig, folder: RunFolder, facts: CardFacts, step: int, *, name: str, after: bool) -> str:
    """The README.md of a run's model.

    Args:
        step: That its weights are of.
        name: Of the folder that it is exported to.
        after: Whether the evaluation after the training, if there is one, was of these weights.
    """
    records = readable_lines(folder.evaluations)
    before = [record for record in records if record["kind"] == "before"]
    # That after the training is told with the last step, whatever step the weights are of.
    now = [record for record in records if record["kind"] == "after" and after] or [
        record for record in records if record["kind"] == "during" and record["step"] <= step
    ]
    evaluations = Evaluations(before[-1] if before else None, now[-1] if now else None)
    return card_text(config, facts, step, evaluations, name)


def licences_in_words(config: RunConfig, facts: CardFacts) -> str:
    """What a run says before its first step about the licence that its models' card will name."""
    base = f"base {base_license_of(config, facts.bases)}, data {config.card.data_license or UNKNOWN}"
    if config.card.license is not None:
        return f"{config.card.license}; {base}"
    return (
        f"unknown: the model's card says so, and farnear push refuses it; set card.license, such as "
        f"card.license=apache-2.0 ({base})"
    )


def _data(config: RunConfig, data: RunData) -> DataFacts:
    index, whole = data.train, data.whole
    documents = np.unique(np.concatenate([index.positives, data.negatives.rows]))
    return DataFacts(
        pairs=len(index),
        pages=len(np.unique(index.input_hash_I[documents])),
        negatives=int(data.negatives.counts(config.data.num_negatives).sum()),
        shards=len(set(index.pair_shard_N.tolist())),
        fingerprint=index.fingerprint,
        eval_queries=len(whole.relevant) if whole else None,
        eval_pages=whole.pages if whole else None,
        eval_fingerprint=whole.index.fingerprint if whole else None,
    )
