"""How a rank's part of a batch goes through the model: mini-batches, what they take, and what all of them come to.

A side is traced with the run file's mini-batch, and the documents, whose number decides what fits, with twice as many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from farnear.config import RunConfig
from farnear.launching.run_data import RunData
from farnear.model.blueprint import TOKENS_OF_TEMPLATE, Blueprint
from farnear.model.hollow import CannotTraceError, Trace

SIDES = ("document", "query")


@dataclass(frozen=True)
class Side:
    """One side of a rank's step.

    Attributes:
        inputs: In a step.
        mini_batch: Inputs of a mini-batch, by the largest.
        tokens: Of the largest input.
        mean_share: Mean tokens over those of the largest.
        first, second: Traces of ``mini_batch`` inputs and of twice as many; None where there is one only.
    """

    inputs: int
    mini_batch: int
    tokens: int
    mean_share: float
    first: Trace
    second: Trace | None

    @property
    def mini_batches(self) -> int:
        return -(-self.inputs // self.mini_batch)

    def backward_bytes(self, inputs: int) -> int:
        """Of a mini-batch of so many inputs, on the line through the two that are known."""
        first = self.first.backward_bytes
        if self.second is None:
            return first * inputs // self.mini_batch
        slope = (self.second.backward_bytes - first) / self.mini_batch
        return max(0, round(first + slope * (inputs - self.mini_batch)))

    def forward_bytes(self, inputs: int) -> int:
        """Of so many without a graph: all that lives belongs to them."""
        return self.first.forward_bytes * min(inputs, self.inputs) // self.mini_batch


def sides_of(config: RunConfig, model: Blueprint, data: RunData, inputs: dict[str, int]) -> tuple[dict[str, Side], str]:
    """Both sides of a rank's step, and why the model could not be traced, empty if it was.

    Args:
        inputs: Of each side in a step.
    """
    sides: dict[str, Side] = {}
    estimated = ""
    for side in SIDES:
        tokens = data.page if side == "document" else data.query
        visual = tokens.largest - TOKENS_OF_TEMPLATE if side == "document" else 0
        text = tokens.largest - visual
        size = _mini_batch(config, side, inputs[side], tokens.largest)
        try:
            if not model.pages.is_known and visual:
                raise CannotTraceError("its config does not say how a page becomes tokens")
            first = model.trace(size, text_tokens=text, visual_tokens=visual, together=size)
            # The larger side decides what fits, and only its second trace is worth its time.
            second = model.trace(2 * size, text_tokens=text, visual_tokens=visual) if side == "document" else None
        except CannotTraceError as error:
            estimated = str(error)
            first, second = _estimated(model, size, tokens.largest), None
        sides[side] = Side(inputs[side], size, tokens.largest, tokens.mean / tokens.largest, first, second)
    return sides, estimated


def _estimated(model: Blueprint, inputs: int, tokens: int) -> Trace:
    """By the number of parameters alone, where a model cannot be traced.

    FLOPs are 2 a parameter and token forwards and 4 backwards. A layer that is fed a number of h elements a token saves
    about 17 such numbers with flash attention (Korthikanti et al. 2022, arXiv:2205.05198: 34 bytes in half precision)
    for its 12 h**2 parameters.
    """
    *blocks, _ = model.units
    element_bytes = 2 if model.autocast is not None else model.element_bytes
    hidden = [math.sqrt(block / 12) for block in blocks] or [math.sqrt(model.parameters_in_all / 12)]
    graph = round(17 * element_bytes * sum(hidden) * inputs * tokens)
    flops = 2 * model.parameters_in_all * inputs * tokens
    casts = 2 * model.parameters_in_all if model.autocast is not None else 0
    working = round(10 * element_bytes * max(hidden) * inputs * tokens)
    largest = model.element_bytes * model.largest_trained
    return Trace(graph, casts, working, graph + largest, flops, 2 * flops, model.parameters_in_all)


def _mini_batch(config: RunConfig, side: str, inputs: int, tokens: int) -> int:
    """Inputs of a mini-batch that holds the largest; under auto one, from which the plan goes on."""
    size = config.training.mini_batch_size_of[side]
    bound = config.training.mini_batch_num_tokens_of[side]
    most = inputs if size is None else min(size, inputs)
    if bound == "auto":
        return 1
    return max(1, most if bound is None else min(most, bound // tokens))


def kept_bytes(sides: dict[str, Side], share: float) -> int:
    """Of the graphs that a share of the mini-batches keeps."""
    return sum(int(share * side.mini_batches) * side.first.graph_bytes for side in sides.values())


def flops_of_step(sides: dict[str, Side], keep_graphs: float) -> float:
    """Of both passes over a rank's inputs of mean size."""
    flops = 0.0
    for side in sides.values():
        scale = side.inputs / side.mini_batch * side.mean_share
        flops += scale * (side.first.forward_flops * (2 - keep_graphs) + side.first.backward_flops)
    return flops


def elements_of_passes(
    sides: dict[str, Side], together: int, keep_graphs: float, of_a_pass: Callable[[Side], int]
) -> int:
    """Of all forwards and backwards together."""
    elements = 0
    for side in sides.values():
        kept = int(keep_graphs * side.mini_batches)
        twice = side.mini_batches - kept
        elements += (-(-twice // together) + 2 * twice + 2 * kept) * of_a_pass(side)
    return elements
