"""What a run notes of itself for its cards, and the licences in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from farnear.config import RunConfig

UNKNOWN = "unknown"
"""Licence of a model whose run file names none; the hub knows the word."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseFacts(_Facts):
    """A base model as a card names it.

    Attributes:
        name: On the hub, or that of its folder.
        is_on_hub: Whether the name is one on the hub.
        revision: As the run file says.
        commit: There; None of a folder.
        license: As its own card says.
        made_from: What its own card calls its base, by names on the hub.
    """

    name: str
    is_on_hub: bool
    license: str | None
    revision: str | None = None
    commit: str | None = None
    made_from: tuple[str, ...] = ()


class DataFacts(_Facts):
    """The shards of a run: what they hold, and what they are known by.

    Attributes:
        pages: Different documents, hard negatives among them.
        negatives: Hard ones, of all pairs together.
        eval_queries, eval_pages, eval_fingerprint: Of all that is evaluated; None where nothing is.
    """

    pairs: int
    pages: int
    negatives: int
    shards: int
    fingerprint: str
    eval_queries: int | None = None
    eval_pages: int | None = None
    eval_fingerprint: str | None = None


class CardFacts(_Facts):
    """What a run notes of itself for its cards, as its run file does not say it.

    Attributes:
        bases: The base model, or those that are joined.
        data: None where nobody knows any more.
        parameters: How many the model has and how many are trained, in words.
        dimension: Of its embeddings; None of a reranker.
        prompts: By name.
        device: What it is trained on.
        loss: In words.
        versions: Of packages, by their names.
    """

    bases: tuple[BaseFacts, ...]
    data: DataFacts | None = None
    parameters: str | None = None
    dimension: int | None = None
    prompts: dict[str, str] = {}
    ranks: int
    device: str | None = None
    total_steps: int | None = None
    warmup_steps: int | None = None
    loss: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Evaluations:
    """Records of eval.jsonl: that of the base, and the newest of what is exported; None where there is none."""

    before: Mapping[str, Any] | None = None
    now: Mapping[str, Any] | None = None


def license_of(config: RunConfig) -> str:
    """Of the trained model, as the hub writes it."""
    return (config.card.license or UNKNOWN).lower()


def base_license_of(config: RunConfig, bases: Sequence[BaseFacts]) -> str:
    """Of the base model, or those that are joined: as the run file says, else as their own cards do."""
    return config.card.base_license or ", ".join(dict.fromkeys(base.license or UNKNOWN for base in bases))
