"""What a step is given: one rank's part of a global batch of pairs, with its mini-batches preprocessed.

An input that cannot be used keeps its place, for the shape of a batch must not depend on it: a worker puts a stand-in
there, and the pair (or, for a hard negative, the document) is marked as not valid, which the loss heeds on every rank.

Shapes: b pairs of this rank in a step, p its documents (b positives, then hard negatives), m other positives of a pair.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from farnear.data.index import Index
from farnear.data.remote import shown

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MiniBatch:
    """What goes through the model at once: the features of some of the rank's queries or documents.

    ``rows`` are positions in RankBatch.pairs_b ("query") or RankBatch.page_hash_p ("document"), none where the
    mini-batch was borrowed: then it is there for other ranks, whose forwards need this one's, and counts for nothing.
    """

    side: str  # "query" or "document"
    modality: str  # "image", "text", "image+text", ...: a mini-batch holds inputs of one kind
    rows: Int64
    features: dict[str, Any]
    inputs: int  # in the features, those that count for nothing among them


@dataclass(frozen=True)
class Quarantined:
    """A pair with an input that could not be used: named by ``shard``, a path or URL, and ``key``."""

    shard: str
    key: str
    input: str
    reason: str


def quarantined_pair(index: Index, pair: int, row: int, reason: str) -> Quarantined:
    """A pair of which the input ``row`` could not be used."""
    shard = index.shards[index.pair_shard_N[pair]]
    return Quarantined(shown(shard), index.pair_key[pair], index.input_id(row), reason)


@dataclass(frozen=True, eq=False)
class RankBatch:
    """One rank's part of the global batch of ``step`` (an optimizer step, counted over all epochs)."""

    step: int
    epoch: int
    pairs_b: Int64  # index rows of this rank's pairs
    valid_b: Bool  # False for a pair that must not count in the loss
    query_hash_b: Int64
    page_hash_p: Int64  # the b positives in the order of the pairs, then all hard negatives
    owner_p: Int64  # position in pairs_b of each document's pair
    page_valid_p: Bool  # False for a document that must not count in the loss
    teacher_p: Float32  # a teacher's scores of the documents for their pair's query, nan where there is none
    answers_bm: Int64  # hashes of the batch's documents that answer each query, filled up with the row's own positive
    mini_batches: tuple[MiniBatch, ...]  # the document ones first
    quarantined: tuple[Quarantined, ...]
    seconds_waited: float  # for the workers
