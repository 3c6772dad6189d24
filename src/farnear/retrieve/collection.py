"""A collection: the embeddings of pages, and of queries that ask for them, as files that need nothing else.

    FOLDER/manifest.json       the model, its weights, the shards; dimension and precision; what embedding took
    FOLDER/document-ids.txt    a line for each page, in the order of the rows
    FOLDER/documents.npy       [P, d] float32, int8 codes, or [P, d / 8] of eight signs each (`farnear.retrieve.codes`)
    FOLDER/ranges.npy          for int8: [2, d], the least and the largest value of each component
    FOLDER/query-ids.txt       where the shards hold queries
    FOLDER/queries.npy         [Q, d] float32
    FOLDER/queries.jsonl       {"id": ..., "text": ...}
    FOLDER/qrels.txt           what answers what, as TREC has it

`farnear encode` writes one (`farnear.retrieve.collection_writing`), any library reads it, and another tool may make
one: the manifest may be missing. Rows have length 1. Pages of one content are one page; queries alike by their words
are one query. An id is a page's key in its corpus shard or the place of its first copy, so it is the same whichever
model has embedded it.

Shapes: Q queries, P pages, d components.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from farnear.errors import UserError
from farnear.retrieve.codes import BinaryRows, Float32, Int8Rows, Precision
from farnear.retrieve.search import Rows
from farnear.retrieve.trec import read_qrels

FORMAT = "farnear collection 1"
MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class Collection:
    """What a folder holds.

    Attributes:
        facts: The manifest; empty where another tool has made the folder.
        documents: Pages [P, d], as `top_k` searches them.
        queries: Float32 [Q, d].
        relevant: For each query the rows of the pages that answer it.
    """

    folder: Path
    facts: Mapping[str, Any]
    precision: Precision
    document_ids: list[str]
    documents: Rows
    query_ids: list[str]
    queries: Float32
    relevant: tuple[frozenset[int], ...]

    @property
    def dim(self) -> int:
        """Components of an embedding."""
        return self.documents.shape[1]

    @cached_property
    def texts(self) -> dict[str, str]:
        """What each query asks, by its id; its id where nobody has written it down."""
        path = self.folder / "queries.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        texts = {record["id"]: record["text"] for record in map(json.loads, lines)}
        return {query: texts.get(query, query) for query in self.query_ids}


def is_collection(folder: Path) -> bool:
    """Whether a folder holds embeddings of pages."""
    return (folder / "documents.npy").is_file() and (folder / "document-ids.txt").is_file()


def refuse_dim(dim: int, full: int, precision: Precision) -> None:
    """Raise UserError for a dimension that embeddings of ``full`` components cannot be cut to."""
    if dim > full:
        raise UserError(f"embeddings of {full} components cannot be cut to {dim}; ask for {full} or fewer")
    if precision == "binary" and dim % 8:
        raise UserError(f"binary embeddings have eight components in a byte, and {dim} is no multiple of 8")


def open_collection(folder: Path) -> Collection:
    """Map the files of a folder.

    Raises:
        UserError: It holds no collection, or its files do not fit each other.
    """
    if not is_collection(folder):
        raise UserError(
            f"{folder} holds no embeddings (documents.npy and document-ids.txt); make them with `farnear encode`"
        )
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) if (folder / MANIFEST).exists() else {}
        document_ids = _read_ids(folder / "document-ids.txt")
        stored = np.load(folder / "documents.npy", mmap_mode="r")
        has_queries = (folder / "queries.npy").exists()
        query_ids = _read_ids(folder / "query-ids.txt") if has_queries else []
        queries = np.load(folder / "queries.npy").astype(np.float32) if has_queries else None
        precision, documents = _rows(folder, stored, None if queries is None else queries.shape[1])
        answers = read_qrels(folder / "qrels.txt") if has_queries else {}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the embeddings in {folder} cannot be read ({error}); make them again") from None
    if queries is None:
        queries = np.zeros((0, documents.shape[1]), np.float32)
    for what, ids, rows in (("document", document_ids, len(documents)), ("query", query_ids, len(queries))):
        if len(ids) != rows:
            raise UserError(f"{folder} has {len(ids)} ids and {rows} rows ({what}), so no row is known; make it again")
        if len(set(ids)) < len(ids):
            raise UserError(f"{folder} has a {what} id twice, so rows are not known apart; make it again")
    if queries.shape[1] != documents.shape[1]:
        raise UserError(
            f"{folder} has queries of {queries.shape[1]} components and documents of {documents.shape[1]}, so nothing "
            "can be compared; make it again"
        )
    row_of = {document: row for row, document in enumerate(document_ids)}
    relevant = tuple(frozenset(_row(row_of, one, folder) for one in answers.get(query, ())) for query in query_ids)
    return Collection(folder, facts, precision, document_ids, documents, query_ids, queries, relevant)


def _row(row_of: Mapping[str, int], document: str, folder: Path) -> int:
    if document not in row_of:
        raise UserError(
            f"{folder / 'qrels.txt'} names document {document}, which is not among document-ids.txt, so it could never "
            "be found; add its embedding, or take the line out"
        )
    return row_of[document]


def _rows(folder: Path, stored: npt.NDArray[Any], query_dim: int | None) -> tuple[Precision, Rows]:
    """Pages as `top_k` searches them, by the type and width that they are stored in."""
    if stored.ndim != 2:
        raise ValueError("documents.npy is not [documents, components]")
    if (folder / "ranges.npy").exists():
        return "int8", Int8Rows(stored, np.load(folder / "ranges.npy"))
    if stored.dtype == np.int8:
        return "binary", BinaryRows(stored, query_dim or 8 * stored.shape[1])
    if stored.dtype not in (np.float16, np.float32):
        raise ValueError(f"documents.npy is of type {stored.dtype}, not float32, float16 or int8")
    return "float32", cast(Rows, stored)


def _read_ids(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
