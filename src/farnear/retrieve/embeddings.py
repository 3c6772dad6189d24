"""Embeddings of all training queries and documents on disk: made by all ranks in parts, read as if they were one array.

    FOLDER/manifest.json              what they are of: model, weights, shards, prompts; and how many
    FOLDER/query-hashes.npy           int64, rising: of each distinct query, as `Index.query_hash_N` has it
    FOLDER/document-hashes.npy        the same of each distinct document's content
    FOLDER/queries-00000.npy ...      float32 [rows of a part, D], in the order of the hashes
    FOLDER/documents-00000.npy ...

Each part appears whole or not at all. A run that was killed is gone on with by any number of ranks, which make the
parts that are missing; how many rows a part has depends on the number of all alone, and so do the batches in it. Where
the manifest tells of other weights or other shards, everything is made anew.

Shapes: Q distinct queries, P distinct documents, D components, n any rows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.data.index import Index
from farnear.data.lists import Similarity
from farnear.data.shard_store import ShardStore
from farnear.errors import UserError
from farnear.files import published, remove_drafts, replace_text
from farnear.parallel.world import on_main_rank
from farnear.retrieve.encode import encode_parts
from farnear.retrieve.inference import Inference

FORMAT = "farnear embeddings 1"
SIDES = {"query": "queries", "document": "documents"}
_WHOLE = 4000
_MOST_ROWS_OF_A_PART, _FEWEST_ROWS_OF_A_PART, _PARTS = 1024, 32, 64

_AGAIN = "remove the folder, and run the same command again"

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class StoredRows:
    """Parts on disk as one array [n, D]: rows by a slice or by their numbers, read when they are asked for."""

    ndim = 2

    def __init__(self, paths: list[Path]) -> None:
        self._parts = [np.load(path, mmap_mode="r") for path in paths]
        self._start = np.cumsum([0, *map(len, self._parts)])
        self.shape = (int(self._start[-1]), self._parts[0].shape[1] if self._parts else 0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int64) -> Float32:
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        found = np.empty((len(numbers), self.shape[1]), np.float32)
        part_n = np.searchsorted(self._start, numbers, side="right") - 1
        for part in np.unique(part_n):
            is_there_n = part_n == part
            found[is_there_n] = self._parts[part][numbers[is_there_n] - self._start[part]]
        return found


@dataclass(frozen=True)
class Embeddings:
    """What a folder holds.

    Attributes:
        facts: The manifest.
        query_hash_Q, document_hash_P: Rising.
        queries, documents: Float32 [Q, D] and [P, D], in that order.
    """

    facts: Mapping[str, Any]
    query_hash_Q: Int64
    document_hash_P: Int64
    queries: StoredRows
    documents: StoredRows

    @classmethod
    def open(cls, folder: Path) -> "Embeddings":
        """Map the files of a folder.

        Raises:
            UserError: It holds no embeddings, or not all of them.
        """
        facts = _manifest(folder)
        if facts is None:
            raise UserError(
                f"{folder} holds no embeddings (manifest.json is missing or of another version); name the folder "
                "`embeddings` of what `farnear mine` has written"
            )
        needed = [folder / f"{side}-hashes.npy" for side in SIDES]
        needed += [path for side in SIDES for path in _paths(folder, side, facts)]
        if missing := [path.name for path in needed if not path.exists()]:
            raise UserError(
                f"the embeddings in {folder} are not complete ({missing[0]} is missing); run the same command "
                "again, which goes on where it stopped"
            )
        try:
            hashes = [np.load(path, mmap_mode="r") for path in needed[: len(SIDES)]]
            rows = [StoredRows(_paths(folder, side, facts)) for side in SIDES]
        except (ValueError, EOFError) as error:
            raise UserError(f"the embeddings in {folder} are damaged ({error}); {_AGAIN}") from None
        widths = {one.shape[1] for one in rows if len(one)}
        if [len(one) for one in rows] != [len(one) for one in hashes] or len(widths) > 1:
            raise UserError(f"the embeddings in {folder} are damaged (their files do not fit each other); {_AGAIN}")
        return cls(facts, hashes[0], hashes[1], *rows)

    def query(self, hash_n: Int64) -> Float32:
        """Embeddings of queries by `Index.query_hash_N`. Raises ``UserError`` where one is not there."""
        return self.queries[_places(self.query_hash_Q, hash_n, "query")]

    def document(self, hash_n: Int64) -> Float32:
        """Embeddings of documents by `Index.input_hash_I`. Raises ``UserError`` where one is not there."""
        return self.documents[_places(self.document_hash_P, hash_n, "document")]

    def similarity_in(self, index: Index) -> Similarity:
        """Cosines of an index's queries and documents, as `farnear.data.lists` wants them: whole numbers.

        A matrix product rounds otherwise for other shapes, threads or processors, and ranks would take other negatives.
        Unit vectors in whole numbers of 1/4000 have products, and sums of these, that float32 holds exactly (below
        2**24 up to D = 36,000); it costs 1e-4 of the cosine.

        Raises:
            UserError: A query or a positive of the index is not there.
        """
        _places(self.query_hash_Q, np.unique(index.query_hash_N), "query")
        _places(self.document_hash_P, np.unique(index.input_hash_I[index.positives]), "document")

        def similarity(pair_n: Int64, document_m: Int64) -> Float32:
            query_nD = _in_whole_numbers(self.query(index.query_hash_N[pair_n]))
            document_mD = _in_whole_numbers(self.document(index.input_hash_I[document_m]))
            found: Float32 = (query_nD @ document_mD.T).numpy()
            if not np.isfinite(found).all():
                raise UserError(f"the embeddings that were made of {self.facts.get('model')} are not finite; {_AGAIN}")
            return found

        return similarity


def distinct_inputs(index: Index) -> dict[str, tuple[Int64, Int64]]:
    """(hashes, rising, and an input row of each) of all distinct queries, and of all distinct documents."""
    query_hash_Q, pair_Q = np.unique(index.query_hash_N, return_index=True)
    documents = index.documents()
    document_hash_P, first_P = np.unique(index.input_hash_I[documents], return_index=True)
    return {"query": (query_hash_Q, index.query_N[pair_Q]), "document": (document_hash_P, documents[first_P])}


def encode_all(
    by: Inference, index: Index, store: ShardStore, folder: Path, facts: Mapping[str, Any], *, needed: bool = True
) -> Embeddings:
    """Embed every distinct query and document of an index, as far as a folder does not hold them. A collective.

    Leaves a strategy in training mode.

    Args:
        folder: Of all ranks.
        facts: What the embeddings are of beside the index, the weights above all; in words and numbers for JSON.
        needed: As in `farnear.retrieve.encode.encode_parts`.
    """
    inputs = distinct_inputs(index)
    counts = {SIDES[side]: len(rows) for side, (_, rows) in inputs.items()}
    manifest = {"format": FORMAT, **facts, "index": index.fingerprint, **counts}
    world = by.world
    on_main_rank(world, lambda: _prepare(folder, manifest, inputs))
    by.model.train(False)
    try:
        for side, (_, rows) in inputs.items():
            paths = _paths(folder, side, manifest)
            parts = np.array_split(rows, np.arange(1, len(paths)) * rows_of_a_part(len(rows)))
            absent: list[int] = on_main_rank(world, partial(_absent, paths))
            missing = [parts[place] for place in absent]
            for number, e_nD in encode_parts(by, index, store, side, missing, needed=needed):
                with published(paths[absent[number]]) as file:
                    np.save(file, e_nD.numpy())
    finally:
        by.model.train(True)
    on_main_rank(world, lambda: None)  # the last parts are there
    return Embeddings.open(folder)


def _in_whole_numbers(e_nD: Float32) -> Tensor:
    """Unit vectors in whole numbers of 1/4000. The norm in float64, so that none is rounded otherwise elsewhere."""
    x_nD = torch.from_numpy(e_nD)
    norm_n = torch.linalg.vector_norm(x_nD, dim=1, dtype=torch.float64).clamp(min=1e-12)
    return (x_nD * (_WHOLE / norm_n).float()[:, None]).round()


def empty_rows(rows: StoredRows) -> Int64:
    """Which are zero: of inputs that could not be used."""
    starts = range(0, len(rows), _MOST_ROWS_OF_A_PART)
    found = [start + np.flatnonzero(~rows[start : start + _MOST_ROWS_OF_A_PART].any(axis=1)) for start in starts]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def rows_of_a_part(rows: int) -> int:
    """As few that all ranks of a node have something to do, and not so few that a disk is filled with small files."""
    return min(_MOST_ROWS_OF_A_PART, max(_FEWEST_ROWS_OF_A_PART, -(-rows // _PARTS)))


def _prepare(folder: Path, manifest: Mapping[str, Any], inputs: Mapping[str, tuple[Int64, Int64]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)
    if _manifest(folder) == json.loads(json.dumps(manifest)):
        return
    (folder / "manifest.json").unlink(missing_ok=True)
    for name in ("queries-*.npy", "documents-*.npy"):
        for path in folder.glob(name):
            path.unlink()
    for side, (hashes, _) in inputs.items():
        with published(folder / f"{side}-hashes.npy") as file:
            np.save(file, hashes)
    replace_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        return None
    return facts if all(isinstance(facts.get(name), int) for name in SIDES.values()) else None


def _paths(folder: Path, side: str, facts: Mapping[str, Any]) -> list[Path]:
    rows = int(facts[SIDES[side]])
    return [folder / f"{SIDES[side]}-{number:05d}.npy" for number in range(-(-rows // rows_of_a_part(rows)))]


def _absent(paths: list[Path]) -> list[int]:
    return [number for number, path in enumerate(paths) if not path.exists()]


def _places(hashes: Int64, hash_n: Int64, what: str) -> Int64:
    place_n: Int64 = np.searchsorted(hashes, hash_n).clip(max=max(len(hashes) - 1, 0))
    is_other_n = hashes[place_n] != hash_n if len(hashes) else np.ones(len(hash_n), np.bool_)
    if is_other_n.any():
        raise UserError(
            f"{int(is_other_n.sum())} of {len(hash_n)} {what} embeddings that are asked for are not stored, for they "
            "were made of other shards; run `farnear mine` with this run file's shards"
        )
    return place_n
