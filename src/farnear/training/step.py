"""What every training step has, whatever it trains: its figures, the seeds of its forwards, the time of its phases."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from farnear.parallel.strategy import Strategy


class NonFiniteLossError(ArithmeticError):
    """The loss of the global batch is inf or nan. Raised on every rank alike."""


@dataclass
class StepFigures:
    """What one step tells about itself; counts are of all ranks.

    Attributes:
        loss: Mean over the valid rows (a reranker's lists) of the global batch, with what distillation adds.
        distillation: Mean over the lists with a teacher's scores, before its weight; None where there is no such term.
        distilled: How many those lists are.
        pairs: Valid rows of the global batch.
        scored: Entries of a reranker's lists.
        masked: Places of the score matrix, or hard negatives of lists, that were left out as false negatives.
        beyond_margin: Places left out by loss.margin.
        tokens: In the mini-batches, image placeholders included and padding left out.
        padding: Tokens of padding.
        quarantined: Pairs that could not be used.
        scale: On the cosine similarities, where it is trained or fixed.
        seconds: Of this rank, by phase.
        longest_rank: Pass one on the rank where it took longest, over the mean.
        kept_graphs: Mini-batches of this rank that went through the model once only.
        frozen_bytes: Outputs of frozen parts that this rank kept.
        model_flops: Of this rank: a forward, and a backward as far as there is something to train. What a gradient
            cache computes twice counts once, as is usual where the utilisation of a device is told.
    """

    loss: float = float("nan")
    distillation: float | None = None
    distilled: int = 0
    pairs: int = 0
    scored: int = 0
    masked: int = 0
    beyond_margin: int = 0
    tokens: int = 0
    padding: int = 0
    quarantined: int = 0
    scale: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    longest_rank: float = 1.0
    kept_graphs: int = 0
    frozen_bytes: int = 0
    model_flops: float = 0.0


def turn_seed(*scope: int) -> int:
    """A 63-bit seed that is a pure function of the integers it is for."""
    digest = hashlib.blake2b(repr(scope).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def backward_of(strategy: Strategy, surrogate: Tensor) -> None:
    """A mini-batch's backward, in the types of its forward: autocast would lower what the forward did in fp32."""
    with torch.autocast(surrogate.device.type, enabled=False):
        strategy.backward(surrogate)


def longest_over_mean(seconds_W: Sequence[float]) -> float:
    """How much longer than the mean the slowest rank takes."""
    return max(seconds_W) * len(seconds_W) / max(sum(seconds_W), 1e-9)


def count_tokens(features_m: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Tokens in the features of some mini-batches, and how many of padding beside them."""
    tokens = places = 0
    for features in features_m:
        # Without padding, as under flash attention for text alone, there is no mask.
        mask, ids = (features.get(name) for name in ("attention_mask", "input_ids"))
        if mask is not None:
            tokens, places = tokens + int(mask.sum()), places + mask.numel()
        elif ids is not None:
            tokens, places = tokens + ids.numel(), places + ids.numel()
    return tokens, places - tokens


@contextmanager
def timed(figures: StepFigures, phase: str) -> Iterator[None]:
    """Add to the seconds of a phase."""
    started = perf_counter()
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        figures.seconds[phase] = figures.seconds.get(phase, 0.0) + perf_counter() - started
