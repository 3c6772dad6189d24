"""Embed many queries or pages with all ranks, through the strategy that trains the model.

Each rank embeds a contiguous share. Where a forward is a collective (ZeRO-3), ranks agree on the number of batches and
a rank that is done early repeats its last one. The embeddings meet on every rank's CPU.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.data.loader import Preprocess, load_features
from farnear.data.read import PairReader
from farnear.errors import RunStoppedError
from farnear.model.embedder import to_device
from farnear.parallel.collectives import agree_on_max, gather_rows
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World


@torch.no_grad()
def encode(
    strategy: Strategy,
    world: World,
    reader: PairReader,
    preprocess: Preprocess,
    side: str,
    rows: npt.NDArray[np.int64],
    *,
    batch_size: int,
    num_workers: int,
) -> Tensor:
    """Embeddings of queries (by pair row) or pages (by page row). A collective.

    Args:
        side: "query" or "document".
        rows: n row numbers of the reader's index; the same on every rank.
        batch_size: Inputs that go through the model at once on one rank.
        num_workers: Worker processes that read, decode and preprocess.

    Returns:
        float32 [n, D] on the CPU, in the order of ``rows``, on every rank.

    Raises:
        RunStoppedError: On every rank, when an embedding is not finite.
    """
    share = np.array_split(rows, world.world_size)[world.rank]
    # A rank without a share still takes part in collective forwards; what it embeds is cut off again.
    own = len(share)
    share = share if own else rows[:1]
    batches = -(-len(share) // batch_size)
    turns = agree_on_max([batches], world.device)[0] if strategy.forward_is_collective else batches
    parts = []
    features: dict[str, Any] = {}
    for _, features in load_features(reader, preprocess, side, share.tolist(), batch_size, num_workers):
        parts.append(strategy.embed(to_device(features, world.device)).float())
    for _ in range(turns - batches):
        strategy.embed(to_device(features, world.device))
    e_ND, _ = gather_rows(torch.cat(parts)[:own])
    if bad := int((~e_ND.isfinite().all(dim=1)).sum()):
        raise RunStoppedError(
            f"{bad} of {len(e_ND)} embeddings ({side}) are not finite, so nothing can be ranked: the weights have gone "
            "wrong; lower training.learning_rate and continue from the checkpoint before"
        )
    return e_ND.cpu()
