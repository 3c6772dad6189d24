"""Section `mining` of a run file: which pages become a query's hard negatives.

`farnear mine` reads it, and a training that mines again on its way (`refresh_every`). Names are those of
sentence-transformers' ``mine_hard_negatives``.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from farnear.sections import Section, Strategy, interval


def strategy_of_mining(strategy: Strategy) -> Strategy:
    """What a run's model is mined under: with ZeRO-1 and 2 its weights are whole on every rank anyway, as under ddp."""
    return "ddp" if strategy in ("zero1", "zero2") else strategy


class MiningConfig(Section):
    """What is looked for among the pages nearest to a query, its positives left out."""

    num_negatives: int = Field(default=4, ge=1)
    """Negatives that are kept of each pair; fewer where no more pass."""
    range_min: int = Field(default=0, ge=0)
    """Nearest pages, positives not counted, that are passed over."""
    range_max: int = Field(default=100, ge=1)
    """How far down the ranking is looked, positives not counted."""
    max_score: float | None = Field(default=None, ge=-1, le=1)
    """Most similar (cosine) that a negative may be; unset: no bound."""
    min_score: float | None = Field(default=None, ge=-1, le=1)
    """Least similar that a negative may be; unset: no bound."""
    absolute_margin: float | None = Field(default=None, ge=0, le=2)
    """A negative must be this much less similar than the positive; unset: no bound."""
    relative_margin: float | None = Field(default=None, ge=0, le=1)
    """A negative must be less similar than this share below the positive: 0.05 is 95 % of it; unset: no bound."""
    sampling_strategy: Literal["top", "random"] = "top"
    """Which are kept of those that pass: the nearest, or any."""
    use_faiss: bool = False
    """Whether FAISS, if installed, searches in place of the exact blocked product; its index is exact too."""
    reranker: str | None = None
    """A cross-encoder that scores what passes and its positives: a teacher for distillation, and a veto."""
    reranker_margin: float | None = Field(default=0.0)
    """A negative must score this much below the positive by the reranker, in its raw scores; null: no veto."""
    refresh_every: float | None = Field(default=None, gt=0)
    """Steps after which an embedder's training mines again with its weights; below 1 a share of all; unset: never."""

    @field_validator("refresh_every")
    @classmethod
    def _whole_or_a_share(cls, value: float | None) -> float | None:
        steps: float | None = interval(value)
        return steps

    @model_validator(mode="after")
    def _leaves_something(self) -> "MiningConfig":
        if self.range_min >= self.range_max:
            raise ValueError(f"range_min {self.range_min} is not below range_max {self.range_max}")
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(f"min_score {self.min_score:g} is above max_score {self.max_score:g}")
        if self.range_max - self.range_min < self.num_negatives:
            raise ValueError(
                f"num_negatives {self.num_negatives} cannot be found in ranks {self.range_min} to {self.range_max}"
            )
        return self
