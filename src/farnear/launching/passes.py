"""A side of a rank's step as it goes through the model: mini-batches, what they take, and what all of them come to.

A side is traced with the run file's mini-batch, and the one whose number decides what fits with twice as many.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from farnear.config import RunConfig
from farnear.model.blueprint import Blueprint
from farnear.model.hollow import Trace


@dataclass(frozen=True)
class Side:
    """One side of a rank's step.

    Attributes:
        inputs: In a step.
        mini_batch: Inputs of a mini-batch, by the largest.
        tokens: Of the largest input.
        mean_share: Mean tokens over those of the largest.
        first, second: Traces of ``mini_batch`` inputs and of twice as many; None where there is one only.
        in_pass_one: Whether it goes through the model without a graph before it does with one, or never does.
    """

    inputs: int
    mini_batch: int
    tokens: int
    mean_share: float
    first: Trace
    second: Trace | None
    in_pass_one: bool = True

    @property
    def mini_batches(self) -> int:
        return -(-self.inputs // self.mini_batch)

    @property
    def in_pass_two(self) -> bool:
        return self.first.trains

    def kept(self, share: float) -> int:
        """Mini-batches that keep their graph from pass one for pass two."""
        return int(share * self.mini_batches) if self.in_pass_one and self.in_pass_two else 0

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


def estimated(model: Blueprint, units: tuple[int, ...], inputs: int, tokens: int) -> Trace:
    """By the number of parameters alone, where a model cannot be traced.

    Args:
        units: Of what the inputs go through, as in `Blueprint.units`.

    FLOPs are 2 a parameter and token forwards and 4 backwards. A layer that is fed a number of h elements a token saves
    about 17 such numbers with flash attention (Korthikanti et al. 2022, arXiv:2205.05198: 34 bytes in half precision)
    for its 12 h**2 parameters.
    """
    *blocks, _ = units
    parameters = sum(units)
    element_bytes = 2 if model.autocast is not None else model.element_bytes
    hidden = [math.sqrt(block / 12) for block in blocks] or [math.sqrt(parameters / 12)]
    graph = round(17 * element_bytes * sum(hidden) * inputs * tokens)
    flops = 2 * parameters * inputs * tokens
    casts = 2 * parameters if model.autocast is not None else 0
    working = round(10 * element_bytes * max(hidden) * inputs * tokens)
    largest = model.element_bytes * model.largest_trained
    return Trace(graph, casts, working, graph + largest, flops, 2 * flops, parameters)


def mini_batch(config: RunConfig, side: str, inputs: int, tokens: int) -> int:
    """Inputs of a mini-batch that holds the largest; under auto one, from which the plan goes on."""
    size = config.training.mini_batch_size_of[side]
    bound = config.training.mini_batch_num_tokens_of[side]
    most = inputs if size is None else min(size, inputs)
    if bound == "auto":
        return 1
    return max(1, most if bound is None else min(most, bound // tokens))


def kept_bytes(sides: Mapping[str, Side], share: float) -> int:
    """Of the graphs that a share of the mini-batches keeps."""
    return sum(side.kept(share) * side.first.graph_bytes for side in sides.values())


def flops_of_step(sides: Mapping[str, Side], share: float) -> float:
    """Of both passes over a rank's inputs of mean size."""
    flops = 0.0
    for side in sides.values():
        of_graphs = side.first.forward_flops + side.first.backward_flops
        again = (1 - share if side.in_pass_two else 1) * side.first.forward_flops if side.in_pass_one else 0.0
        scale = side.inputs / side.mini_batch * side.mean_share
        flops += scale * ((of_graphs if side.in_pass_two else 0.0) + again)
    return flops


def elements_of_passes(sides: Mapping[str, Side], together: int, share: float, of_a_pass: Callable[[Side], int]) -> int:
    """Of all forwards and backwards together."""
    elements = 0
    for side in sides.values():
        alone = side.mini_batches - side.kept(share)
        first = -(-alone // together) if side.in_pass_one else 0
        elements += (first + (2 * side.mini_batches if side.in_pass_two else 0)) * of_a_pass(side)
    return elements
