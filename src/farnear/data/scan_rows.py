"""What the scan of one shard found, as columns of numbers and texts.

Shapes: M parts, I inputs (queries and documents), C documents of a corpus shard, N pairs, L positives and K negatives
of all pairs.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from farnear.data.columns import ArrowStrings, Column
from farnear.data.faults import Fault
from farnear.data.sample import MODALITIES, hash_parts
from farnear.data.tarwalk import Member

MODALITY_BITS = {"text": 1, "image": 2, "audio": 4, "video": 8, "message": 16}


@dataclass(frozen=True)
class ShardScan:
    """What one shard holds; rows count from 0 within the shard.

    Attributes:
        corpus: Whether it was scanned for documents only.
        columns: ``part_*`` [M], ``input_*`` [I], ``corpus_key`` [C], ``pair_*`` and ``query_hash`` [N], and the lists
            ``positive*`` [L] and ``negative*`` [K], whose items are an input's row, or -1 and the key of a page in a
            corpus shard. Document c of a corpus shard is input c.
        digest: Of the columns, hex.
    """

    shard: str
    corpus: bool
    size: int
    columns: dict[str, Column]
    faults: tuple[Fault, ...]
    ignored_members: int
    ignored_examples: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Part:
    """A member that is part of an input; ``kind`` as in ``farnear.data.sample``, width and height in pixels."""

    kind: int
    member: Member
    hash: int
    width: int = 0
    height: int = 0

    @property
    def modality(self) -> str:
        return MODALITIES.get(self.kind, "message")


class Rows:
    """The columns while they grow."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, ...]] = []
        self._part_name: list[str] = []
        self._inputs: list[tuple[int, int, int]] = []
        self._corpus_key: list[str] = []
        self._pairs: list[tuple[int, ...]] = []
        self._pair_key: list[str] = []
        self._references: dict[str, tuple[list[int], list[str]]] = {"positive": ([], []), "negative": ([], [])}

    def add_input(self, parts: Iterable[Part], entry: int = -1) -> int:
        """Append one input made of ``parts``, of which ``entry`` is the place in a JSON list; returns its row."""
        ordered = sorted(parts, key=lambda part: (part.kind, part.member.name))
        for part in ordered:
            member = part.member
            self._parts.append((member.offset, member.size, part.hash, part.kind, entry, part.width, part.height))
            self._part_name.append(member.name)
        modality = 0
        for part in ordered:
            modality |= MODALITY_BITS[part.modality]
        self._inputs.append((len(ordered), hash_parts([part.hash for part in ordered]), modality))
        return len(self._inputs) - 1

    def add_document(self, key: str, parts: Iterable[Part]) -> None:
        """Append a document of a corpus shard."""
        self.add_input(parts)
        self._corpus_key.append(key)

    def add_pair(
        self,
        key: str,
        query: int,
        query_hash: int,
        positives: tuple[Sequence[int], Sequence[str]],
        negatives: tuple[Sequence[int], Sequence[str]],
    ) -> None:
        """Append a pair. ``positives`` and ``negatives`` are (input rows, keys of pages in corpus shards)."""
        self._pair_key.append(key)
        self._pairs.append(
            (query, query_hash, self._refer("positive", *positives), self._refer("negative", *negatives))
        )

    def _refer(self, which: str, rows: Sequence[int], keys: Sequence[str]) -> int:
        row_column, key_column = self._references[which]
        row_column += [*rows, *([-1] * len(keys))]
        key_column += [*([""] * len(rows)), *keys]
        return len(rows) + len(keys)

    def columns(self) -> dict[str, Column]:
        """The columns of a ``ShardScan``."""
        parts = np.array(self._parts, np.int64).reshape(-1, 7)
        inputs = np.array(self._inputs, np.int64).reshape(-1, 3)
        pairs = np.array(self._pairs, np.int64).reshape(-1, 4)
        columns: dict[str, Column] = {
            "part_offset": parts[:, 0].copy(),
            "part_size": parts[:, 1].copy(),
            "part_hash": parts[:, 2].copy(),
            "part_kind": parts[:, 3].astype(np.uint8),
            "part_entry": parts[:, 4].astype(np.int32),
            "part_width": parts[:, 5].astype(np.int32),
            "part_height": parts[:, 6].astype(np.int32),
            "part_name": ArrowStrings.of(self._part_name),
            "input_parts": inputs[:, 0].astype(np.int32),
            "input_hash": inputs[:, 1].copy(),
            "input_modality": inputs[:, 2].astype(np.uint8),
            "corpus_key": ArrowStrings.of(self._corpus_key),
            "pair_key": ArrowStrings.of(self._pair_key),
            "pair_query": pairs[:, 0].copy(),
            "query_hash": pairs[:, 1].copy(),
            "pair_positives": pairs[:, 2].astype(np.int32),
            "pair_negatives": pairs[:, 3].astype(np.int32),
        }
        for which, (rows, keys) in self._references.items():
            columns[which] = np.array(rows, np.int64)
            columns[f"{which}_key"] = ArrowStrings.of(keys)
        return columns


def digest_of(columns: dict[str, Column]) -> str:
    """A digest of names, lengths and content, hex."""
    digest = hashlib.blake2b(digest_size=16)
    for name, column in columns.items():
        digest.update(f"\n{name}:{len(column)}\n".encode())
        for array in column.arrays() if isinstance(column, ArrowStrings) else (column,):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
