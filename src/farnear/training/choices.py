"""What a run chooses by the memory and the model that it finds, rather than by the run file.

    mini-batches    `mini_batch_num_tokens: auto`: grown until their graph takes its share of memory, or until larger
                    ones are no faster
    kept graphs     `keep_graphs: auto`: as many as fit beside them
    frozen parts    `frozen_cache_gb: auto`: a quarter of the free host memory
    pass one        how many mini-batches go through it together: as many as the run file says, where the model has no
                    dropout to be replayed and gives the same embeddings for them together as apart

All of it is tried with the model itself, on blank pages as large as the largest of the index and texts as long as its
longest, before anything is read. A graph is measured by what autograd saves for the backward pass. Ranks take the worst
of what they measured, so that they choose alike, and a checkpoint holds the choice: a resumed run does as before, and
rounds as before.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from PIL import Image
from torch import Tensor, nn

from farnear.data.budget import PageTokens, input_cost
from farnear.data.dealing import SIDES
from farnear.data.index import MODALITY_BITS, Index, modality_name
from farnear.data.sample import AUDIO, IMAGE, VIDEO
from farnear.data.workers import Preprocess, preparation_fault, stand_in
from farnear.model.embedder import to_device
from farnear.model.features import CannotMergeError, FeatureMerger
from farnear.parallel.collectives import exchange_ints
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World
from farnear.sections import TrainingConfig

Int64 = npt.NDArray[np.int64]

# Of the free device memory: what graphs may take in all, and what one mini-batch may.
_SHARE_OF_GRAPHS = 0.6
_SHARE_OF_A_MINI_BATCH = 0.25
# A mini-batch twice as large is worth its memory if a token takes at least this much less time.
_WORTHWHILE_GAIN = 0.05
_MOST_INPUTS = 256
# Of the embeddings' length, in fp32 and in half precision.
_SAME_EMBEDDING, _SAME_IN_HALF = 1e-4, 3e-2


@dataclass(frozen=True)
class Choices:
    """What was chosen. A checkpoint keeps it.

    Attributes:
        mini_batch_num_tokens: Of each side; None for no bound.
        keep_graphs: Share of a step's mini-batches.
        together: Mini-batches in pass one.
        frozen_bytes: Host memory of each rank for outputs of frozen parts.
        asked: What they were chosen for: a run that asks for something else chooses anew what depends on it.
    """

    mini_batch_num_tokens: Mapping[str, int | None]
    keep_graphs: float
    together: int
    frozen_bytes: int
    asked: Mapping[str, Any] = field(default_factory=dict)


def choose(
    training: TrainingConfig,
    saved: Mapping[str, Any] | None,
    strategy: Strategy,
    preprocess: Preprocess,
    merger: FeatureMerger,
    index: Index,
    documents: Int64,
    page_tokens: PageTokens,
    world: World,
    *,
    inputs_per_rank: Mapping[str, int],
    has_dropout: bool,
    has_frozen_parts: bool,
) -> Choices:
    """What the run file says, and what it leaves open as measured or as ``saved`` in a checkpoint. A collective.

    Args:
        documents: Input rows of all that a step may hold.
        inputs_per_rank: Of each side, about the most in a step.
        has_dropout: Whether the model draws random numbers when it trains.
        has_frozen_parts: Whether there is anything to keep outputs of.
    """
    saved = saved or {}
    asked = {
        "tokens": dict(training.mini_batch_num_tokens_of),
        "size": dict(training.mini_batch_size_of),
        "keep_graphs": training.keep_graphs,
        "together": training.no_grad_mini_batch_factor,
        "frozen": training.frozen_cache_gb,
        "has_dropout": has_dropout,
    }

    def before(name: str, *keys: str) -> Any:
        """The saved choice, if what it was made for is still asked."""
        saved_asked = saved.get("asked", {})
        return saved[name] if all(key in saved_asked and saved_asked[key] == asked[key] for key in keys) else None

    trial = _Trial(strategy, preprocess, index, documents, page_tokens, world)
    num_tokens: dict[str, int | None] = {}
    for side in SIDES:
        wanted = training.mini_batch_num_tokens_of[side]
        if wanted != "auto":
            num_tokens[side] = wanted
        elif (chosen := before("mini_batch_num_tokens", "tokens")) is not None:
            num_tokens[side] = chosen[side]
        else:
            num_tokens[side] = trial.grown(side, inputs_per_rank[side])
    keep_graphs = training.keep_graphs
    if keep_graphs == "auto":
        chosen = before("keep_graphs", "tokens", "size", "keep_graphs")
        keep_graphs = chosen if chosen is not None else trial.graphs_that_fit(training, num_tokens, inputs_per_rank)
    together = training.no_grad_mini_batch_factor
    if has_dropout or keep_graphs == 1.0:
        together = 1
    elif (chosen := before("together", "keep_graphs", "together", "has_dropout")) is not None:
        together = chosen
    elif together > 1 and not trial.same_together(
        merger, _SAME_IN_HALF if training.bf16 or training.fp16 else _SAME_EMBEDDING
    ):
        together = 1
    frozen_bytes = 0
    if has_frozen_parts:
        limit = training.frozen_cache_gb
        host = psutil.virtual_memory().available // (4 * _ranks_of_node())
        frozen_bytes = int(host if limit == "auto" else limit * 1e9)
        frozen_bytes = min(of_rank for (of_rank,) in exchange_ints([frozen_bytes], world.device))
        chosen = before("frozen_bytes", "frozen")
        frozen_bytes = chosen if chosen is not None else frozen_bytes
    return Choices(num_tokens, float(keep_graphs), together, frozen_bytes, asked)


class _Trial:
    """Forwards with graph of made-up inputs, as large as the largest of the index. Every method is a collective."""

    def __init__(
        self,
        strategy: Strategy,
        preprocess: Preprocess,
        index: Index,
        documents: Int64,
        page_tokens: PageTokens,
        world: World,
    ) -> None:
        self._strategy, self._preprocess, self._world = strategy, preprocess, world
        self._index, self._documents, self._page_tokens = index, documents, page_tokens
        self._largest_of: dict[tuple[str, str], tuple[Any, int]] = {}

    def _rows(self, side: str) -> Int64:
        """Of all inputs of a side."""
        return np.unique(self._index.query_N if side == "query" else self._documents)

    def _modalities(self, side: str) -> list[str]:
        """What a side's inputs are; a Router sends each to another tower."""
        return [modality_name(int(bits)) for bits in np.unique(self._index.input_modality_I[self._rows(side)])]

    def _largest(self, side: str, modality: str) -> tuple[Any, int]:
        """An input like the most expensive one that the model's processor takes, and its cost.

        What it refuses, as a page that is too long for its width, goes to quarantine when its batch comes. Looked for
        when it is needed: a run that chooses nothing, or goes on with what was chosen, needs none.
        """
        if (side, modality) not in self._largest_of:
            self._largest_of[side, modality] = self._look_for_largest(side, modality)
        return self._largest_of[side, modality]

    def _look_for_largest(self, side: str, modality: str) -> tuple[Any, int]:
        index, rows = self._index, self._rows(side)
        bits = sum(MODALITY_BITS[part] for part in modality.split("+"))
        rows = rows[index.input_modality_I[rows] == bits]
        cost_n = input_cost(index, rows, self._page_tokens)
        for place in np.argsort(-cost_n, kind="stable"):
            blank = _blank_like(index, int(rows[place]))
            if preparation_fault(self._preprocess, blank, side) is None:
                return blank, int(cost_n[place])
            # Where a plain input fails too, it is a defect.
            self._preprocess([stand_in(modality)], side)
        return stand_in(modality), int(cost_n.max())

    def grown(self, side: str, most_inputs: int) -> int:
        """Tokens of a mini-batch: doubled while its graph has the memory and a larger one is worth it."""
        return min(self._grown(side, modality, most_inputs) for modality in self._modalities(side))

    def _grown(self, side: str, modality: str, most_inputs: int) -> int:
        limit_bytes = self._free_memory() * _SHARE_OF_A_MINI_BATCH
        inputs = 1
        size, seconds_each = self._measure(side, modality, inputs)
        while 2 * inputs <= min(most_inputs, _MOST_INPUTS) and 2 * size <= limit_bytes:
            next_size, next_seconds_each = self._measure(side, modality, 2 * inputs)
            if next_size > limit_bytes or next_seconds_each > (1.0 - _WORTHWHILE_GAIN) * seconds_each:
                break
            inputs, size, seconds_each = 2 * inputs, next_size, next_seconds_each
        return inputs * self._largest(side, modality)[1]

    def graphs_that_fit(
        self, training: TrainingConfig, num_tokens: Mapping[str, int | None], inputs_per_rank: Mapping[str, int]
    ) -> float:
        """Share of a step's mini-batches whose graphs fit into memory beside the one that is computed."""
        whole = largest = 0
        for side in SIDES:
            # As if all inputs were of the modality whose graphs are largest.
            of_side, size = max(
                self._graphs(side, modality, training, num_tokens[side], inputs_per_rank[side])
                for modality in self._modalities(side)
            )
            whole += of_side
            largest = max(largest, size)
        free = self._free_memory() * _SHARE_OF_GRAPHS - largest
        # In steps of a sixteenth: a choice that can be read, and that the next run makes too.
        return max(0, min(16, int(16 * free / max(whole, 1)))) / 16

    def _graphs(
        self, side: str, modality: str, training: TrainingConfig, tokens: int | None, inputs_of_side: int
    ) -> tuple[int, int]:
        """Bytes of the graphs of all mini-batches of a side, and of one."""
        inputs = training.mini_batch_size_of[side] or _MOST_INPUTS
        if tokens is not None:
            inputs = max(1, min(inputs, tokens // self._largest(side, modality)[1]))
        inputs = min(inputs, inputs_of_side)
        size, _ = self._measure(side, modality, inputs)
        return size * -(-inputs_of_side // inputs), size

    def same_together(self, merger: FeatureMerger, tolerance: float) -> bool:
        """Whether mini-batches of different lengths have the same embeddings together as apart, on every rank."""
        return all(
            self._same_together(side, modality, merger, tolerance)
            for side in SIDES
            for modality in self._modalities(side)
        )

    def _same_together(self, side: str, modality: str, merger: FeatureMerger, tolerance: float) -> bool:
        largest, small = self._largest(side, modality)[0], stand_in(modality)
        apart = [self._preprocess(inputs, side) for inputs in ([largest], [small, small])]
        try:
            together = merger(apart)
        except CannotMergeError:
            together = None
        # Every rank has made the same inputs with the same processor, so every rank came here alike.
        if together is None:
            return False
        with torch.no_grad():
            e_apart = torch.cat([self._embed(features) for features in apart]).float()
            e_together = self._embed(together).float()
        difference = float((e_apart - e_together).norm() / e_apart.norm())
        return max(number for (number,) in exchange_ints([int(difference > tolerance)], self._world.device)) == 0

    def _measure(self, side: str, modality: str, inputs: int) -> tuple[int, float]:
        """(bytes of the graph, seconds an input), the worst of all ranks."""
        features = self._preprocess([self._largest(side, modality)[0]] * inputs, side)
        self._embed(features)  # what is set up at the first forward of a shape is not of interest
        started = perf_counter()
        with _saved_for_backward() as saved:
            self._embed(features)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = perf_counter() - started
        of_rank = exchange_ints([sum(saved.values()), round(seconds * 1e6)], self._world.device)
        size, microseconds = (max(values) for values in zip(*of_rank, strict=True))
        return size, microseconds / 1e6 / inputs

    def _embed(self, features: dict[str, Any]) -> Tensor:
        return self._strategy.forward(to_device(features, self._world.device))

    def _free_memory(self) -> int:
        """Bytes for graphs on the rank that has least, when gradients and the optimizer's state have theirs."""
        held = self._strategy.slices(owned=False)  # which makes the optimizer's state
        gradients = sum(piece.weight_n.nbytes for piece in held)
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self._world.device)
        else:
            free = psutil.virtual_memory().available // (2 * _ranks_of_node())
        return min(number for (number,) in exchange_ints([max(0, free - gradients)], self._world.device))


@contextmanager
def _saved_for_backward() -> Iterator[dict[int, int]]:
    """Bytes of each piece of memory that a graph holds on to; weights, which are there anyway, left out."""
    held: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if not isinstance(x if x._base is None else x._base, nn.Parameter):
            storage = x.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield held


def _blank_like(index: Index, row: int) -> Any:
    """An input of the same kind and size, without its content."""
    modality = modality_name(int(index.input_modality_I[row]))
    # Of other media no more is known than their bytes.
    blank = stand_in(modality)
    for part in index.parts(row):
        kind = int(index.part_kind_M[part])
        name: str = "text"
        value: Any = "word " * max(1, int(index.part_size_M[part]) // 5)
        if kind == IMAGE:
            name, value = "image", Image.new("RGB", (int(index.part_width_M[part]), int(index.part_height_M[part])))
        elif kind in (AUDIO, VIDEO):
            continue
        if modality == name:
            return value
        place = blank if isinstance(blank, dict) else next(p for p in blank[0]["content"] if p["type"] == name)
        place[name] = value
    return blank


def _ranks_of_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
