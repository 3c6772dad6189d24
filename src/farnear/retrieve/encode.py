"""Embed many queries or documents with all ranks, through the strategy that trains the model.

Each rank embeds a share of every modality. Ranks agree on the number of batches of each modality; where a forward is a
collective (ZeRO-3), a rank that is done early repeats its last one. `encode` brings the embeddings to every rank's CPU;
`encode_parts` leaves each part, embedded in the same batches whoever does it, with the rank that has it.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.data.budget import PageTokens, input_cost
from farnear.data.index import Index, modality_name
from farnear.data.loader import load_features
from farnear.data.read import InputReader
from farnear.data.shard_store import ShardStore
from farnear.data.workers import Job, Workers
from farnear.errors import RunStoppedError
from farnear.model.embedder import to_device
from farnear.parallel.collectives import agree_on_max, exchange_ints, gather_together
from farnear.retrieve.inference import Inference

COUNTED = {"query": "queries", "document": "pages"}
"""What is counted of each side."""


@torch.no_grad()
def encode(by: Inference, index: Index, store: ShardStore, side: str, rows: npt.NDArray[np.int64]) -> Tensor:
    """Embeddings of queries or documents, by input row. A collective.

    Args:
        side: "query" or "document".
        rows: n input rows of the index; the same on every rank.

    Returns:
        float32 [n, D] on the CPU, in the order of ``rows``, on every rank.

    Raises:
        RunStoppedError: On every rank, when an embedding is not finite.
    """
    world, modality_n, what = by.world, index.input_modality_I[rows], COUNTED[side]
    parts, places = [], []
    done = 0
    for modality in np.unique(modality_n):
        of_modality = np.flatnonzero(modality_n == modality)
        own = np.array_split(of_modality, world.world_size)[world.rank]
        # A rank without a share still takes part in collective forwards; what it embeds is cut off again.
        share = own if len(own) else of_modality[:1]
        batches = -(-len(share) // by.batch_size)
        turns = agree_on_max([batches], world.device)[0]
        features: dict[str, Any] = {}
        batch_of_all = by.batch_size * world.world_size
        loaded = load_features(
            index,
            store,
            by.preprocess,
            side,
            rows[share],
            batch_size=by.batch_size,
            page_tokens=by.page_tokens,
            num_workers=by.num_workers,
        )
        for turn, (positions, features) in enumerate(loaded):
            by.turn(what, done + min(turn * batch_of_all, len(of_modality)), len(rows))
            e_nD = by.forward(to_device(features, world.device)).float()
            parts.append(e_nD[: len(own)])
            places.append(torch.from_numpy(share[positions][: len(own)]).to(world.device))
        for turn in range(batches, turns):
            by.turn(what, done + min(turn * batch_of_all, len(of_modality)), len(rows))
            if by.model.forward_is_collective:
                by.forward(to_device(features, world.device))
        done += len(of_modality)
    e_nD, place_n = torch.cat(parts), torch.cat(places)
    rows_W = [(n, n) for (n,) in exchange_ints([len(e_nD)], world.device)]
    e_ND, place_N = gather_together([e_nD, place_n], rows_W)
    _refuse_not_finite(int((~e_ND.isfinite().all(dim=1)).sum()), len(e_ND), side)
    return e_ND[place_N.argsort()].cpu()


@torch.no_grad()
def encode_parts(
    by: Inference,
    index: Index,
    store: ShardStore,
    side: str,
    parts: Sequence[npt.NDArray[np.int64]],
    *,
    needed: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number, embeddings) of this rank's parts: every ``world_size``-th, in rounds. A collective to its end.

    A part's batches are its own, so its embeddings do not depend on the number of ranks. Arguments as in `encode`.

    Args:
        parts: Input rows of each part, the same on every rank.
        needed: Whether an input that cannot be used is an error; else its embedding is zero.

    Yields:
        float32 [n, D] on the CPU, in the order of the part's rows.

    Raises:
        RunStoppedError: On every rank, when an embedding is not finite.
    """
    world = by.world
    rounds = [parts[first : first + world.world_size] for first in range(0, len(parts), world.world_size)]
    turns = [list(_turns(index, by.page_tokens, of_round, world.rank, by.batch_size)) for of_round in rounds]
    is_collective = by.model.forward_is_collective
    own = [turn for of_round in turns for turn in of_round if turn.is_own or is_collective]
    jobs = [Job(side, turn.modality, turn.rows, needed) for turn in own]
    workers = Workers(InputReader(index, store), by.preprocess, min(by.num_workers, len(jobs)), 2, False)
    total, done = sum(map(len, parts)), 0
    with closing(workers.run(iter(jobs))) as results:
        for number, of_round in enumerate(turns):
            embedded, places = [], []
            rows_of_round = sum(map(len, rounds[number]))
            for place, turn in enumerate(of_round):
                by.turn(COUNTED[side], done + rows_of_round * place // len(of_round), total)
                if not turn.is_own and not is_collective:
                    continue
                features, bad = next(results)
                e_nD = by.forward(to_device(features, world.device)).float()
                if turn.is_own:
                    e_nD[[one for one, _ in bad]] = 0.0
                    embedded.append(e_nD.cpu())
                    places.append(torch.from_numpy(turn.places))
            e_nD = torch.cat(embedded)[torch.cat(places).argsort()] if embedded else torch.zeros(0, 0)
            not_finite = agree_on_max([int((~e_nD.isfinite().all(dim=1)).sum())], world.device)[0]
            _refuse_not_finite(not_finite, rows_of_round, side)
            done += rows_of_round
            if embedded:
                yield number * world.world_size + world.rank, e_nD


@dataclass(frozen=True)
class _Turn:
    """A batch of this rank's part, or one of another rank's inputs where this rank has none left of the modality."""

    modality: str
    places: npt.NDArray[np.int64]  # in the part
    rows: npt.NDArray[np.int64]
    is_own: bool


def _turns(
    index: Index, page_tokens: PageTokens, parts_W: Sequence[npt.NDArray[np.int64]], rank: int, batch_size: int
) -> Generator[_Turn, None, None]:
    """A rank's turns of a round, in which every rank has equally many of each modality, and in the same order."""
    all_rows = np.concatenate(parts_W)
    own = parts_W[rank] if rank < len(parts_W) else all_rows[:0]
    for modality in np.unique(index.input_modality_I[all_rows]):
        counts = [int((index.input_modality_I[rows] == modality).sum()) for rows in parts_W]
        places = np.flatnonzero(index.input_modality_I[own] == modality)
        # Inputs of like cost share a batch, so that little of it is padding.
        places = places[np.argsort(-input_cost(index, own[places], page_tokens), kind="stable")]
        other = all_rows[index.input_modality_I[all_rows] == modality][:1]
        for start in range(0, -(-max(counts) // batch_size) * batch_size, batch_size):
            batch = places[start : start + batch_size]
            is_own = len(batch) > 0
            yield _Turn(modality_name(int(modality)), batch, own[batch] if is_own else other, is_own)


def _refuse_not_finite(bad: int, count: int, side: str) -> None:
    if bad:
        raise RunStoppedError(
            f"{bad} of {count} embeddings ({side}) are not finite, so nothing can be ranked: the weights have gone "
            "wrong; lower training.learning_rate and continue from the checkpoint before"
        )
