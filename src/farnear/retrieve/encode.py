"""Embed many queries or documents with all ranks, through the strategy that trains the model.

Each rank embeds a share of every modality. Ranks agree on the number of batches of each modality; where a forward is a
collective (ZeRO-3), a rank that is done early repeats its last one. The embeddings meet on every rank's CPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.data.budget import PageTokens
from farnear.data.index import Index
from farnear.data.loader import load_features
from farnear.data.shard_store import ShardStore
from farnear.data.workers import Preprocess
from farnear.errors import RunStoppedError
from farnear.model.embedder import to_device
from farnear.parallel.collectives import agree_on_max, exchange_ints, gather_together
from farnear.parallel.strategy import Strategy
from farnear.parallel.world import World


@torch.no_grad()
def encode(
    strategy: Strategy,
    world: World,
    index: Index,
    store: ShardStore,
    preprocess: Preprocess,
    page_tokens: PageTokens,
    side: str,
    rows: npt.NDArray[np.int64],
    *,
    batch_size: int,
    num_workers: int,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Embeddings of queries or documents, by input row. A collective.

    Args:
        page_tokens: What a page costs, by its size.
        side: "query" or "document".
        rows: n input rows of the index; the same on every rank.
        batch_size: Inputs that go through the model at once on one rank.
        num_workers: Worker processes that read, decode and preprocess.
        between: Called before every batch, equally often on every rank, so that it may be a collective.

    Returns:
        float32 [n, D] on the CPU, in the order of ``rows``, on every rank.

    Raises:
        RunStoppedError: On every rank, when an embedding is not finite.
    """
    modality_n = index.input_modality_I[rows]
    parts, places = [], []
    for modality in np.unique(modality_n):
        of_modality = np.flatnonzero(modality_n == modality)
        own = np.array_split(of_modality, world.world_size)[world.rank]
        # A rank without a share still takes part in collective forwards; what it embeds is cut off again.
        share = own if len(own) else of_modality[:1]
        batches = -(-len(share) // batch_size)
        turns = agree_on_max([batches], world.device)[0]
        features: dict[str, Any] = {}
        for positions, features in load_features(
            index,
            store,
            preprocess,
            side,
            rows[share],
            batch_size=batch_size,
            page_tokens=page_tokens,
            num_workers=num_workers,
        ):
            between()
            e_nD = strategy.forward(to_device(features, world.device)).float()
            parts.append(e_nD[: len(own)])
            places.append(torch.from_numpy(share[positions][: len(own)]).to(world.device))
        for _ in range(turns - batches):
            between()
            if strategy.forward_is_collective:
                strategy.forward(to_device(features, world.device))
    e_nD, place_n = torch.cat(parts), torch.cat(places)
    rows_W = [(n, n) for (n,) in exchange_ints([len(e_nD)], world.device)]
    e_ND, place_N = gather_together([e_nD, place_n], rows_W)
    if bad := int((~e_ND.isfinite().all(dim=1)).sum()):
        raise RunStoppedError(
            f"{bad} of {len(e_ND)} embeddings ({side}) are not finite, so nothing can be ranked: the weights have gone "
            "wrong; lower training.learning_rate and continue from the checkpoint before"
        )
    return e_ND[place_N.argsort()].cpu()
