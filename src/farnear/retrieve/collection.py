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
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from farnear.errors import UserError
from farnear.retrieve.codes import BLOCK, BinaryRows, Float32, Int8Rows, Precision
from farnear.retrieve.search import Rows
from farnear.retrieve.trec import read_qrels
from farnear.run_folder import DONE, RunFolder
from farnear.wording import writable

FORMAT = "farnear collection 1"
MANIFEST = "manifest.json"
OF_QUERIES = ("query-ids.txt", "queries.npy", "queries.jsonl", "qrels.txt")
_LONGEST = 1e18
"""Length of a row whose square fp32 still holds."""


@dataclass(frozen=True, eq=False)
class Collection:
    """What a folder holds.

    Attributes:
        facts: The manifest; empty where another tool has made the folder.
        documents: Pages [P, d], as `top_k` searches them.
        queries: Float32 [Q, d].
        relevant: For each query the rows of the pages that answer it.
        texts: What each query asks, by its id; its id where nobody has written it down.
    """

    folder: Path
    facts: Mapping[str, Any]
    precision: Precision
    document_ids: list[str]
    documents: Rows
    query_ids: list[str]
    queries: Float32
    relevant: tuple[frozenset[int], ...]
    texts: Mapping[str, str]

    @property
    def dim(self) -> int:
        """Components of an embedding."""
        return self.documents.shape[1]


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
    """Map the files of a folder, which may come from anywhere: each is looked at, and told where it cannot be.

    Raises:
        UserError: It holds no collection, or its files do not fit each other.
    """
    if not is_collection(folder):
        raise UserError(
            f"{folder} holds no embeddings (documents.npy and document-ids.txt); make them with `farnear encode`"
        )
    if RunFolder(folder).lock.exists() and not (folder / DONE).exists():
        raise UserError(
            f"the embeddings in {folder} are not all there: making them has been broken off, or goes on; run the same "
            "`farnear encode` again"
        )
    stored = _array(folder / "documents.npy")
    document_ids = _read_ids(folder / "document-ids.txt", "document", len(stored))
    if (folder / "queries.npy").exists():
        queries = _float_rows(folder / "queries.npy", _array(folder / "queries.npy"))[:].astype(np.float32)
        query_ids = _read_ids(folder / "query-ids.txt", "query", len(queries))
        answers = _answers(folder / "qrels.txt")
        precision, documents = _rows(folder, stored, queries.shape[1])
    else:
        query_ids, answers = [], {}
        precision, documents = _rows(folder, stored, None)
        queries = np.zeros((0, documents.shape[1]), np.float32)
    if queries.shape[1] != documents.shape[1]:
        raise UserError(
            f"{folder} has queries of {queries.shape[1]} components and documents of {documents.shape[1]}, so nothing "
            "can be compared; make it again"
        )
    row_of = {document: row for row, document in enumerate(document_ids)}
    relevant = tuple(frozenset(_row(row_of, one, folder) for one in answers.get(query, ())) for query in query_ids)
    texts = _texts(folder / "queries.jsonl")
    return Collection(
        folder=folder,
        facts=_facts(folder / MANIFEST),
        precision=precision,
        document_ids=document_ids,
        documents=documents,
        query_ids=query_ids,
        queries=queries,
        relevant=relevant,
        texts={query: texts.get(query, query) for query in query_ids},
    )


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); make it again") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or not found.shape[1]:
        raise UserError(f"{path} is not one array of [rows, components], as np.save writes it; make it again")
    return found


def _rows(folder: Path, stored: npt.NDArray[Any], query_dim: int | None) -> tuple[Precision, Rows]:
    """Pages as `top_k` searches them, by the type and width that they are stored in."""
    path, ranges = folder / "documents.npy", folder / "ranges.npy"
    if ranges.exists():
        return "int8", Int8Rows(stored, _ranges(ranges, stored))
    if stored.dtype == np.int8:
        dim = 8 * stored.shape[1]
        if query_dim not in (None, dim):
            raise UserError(
                f"{path} holds int8, which are codes by the ranges.npy that is not there, or the signs of {dim} "
                f"components, and queries have {query_dim}; add ranges.npy, or make it again"
            )
        return "binary", BinaryRows(stored, dim)
    return "float32", cast(Rows, _float_rows(path, stored))


def _ranges(path: Path, stored: npt.NDArray[Any]) -> Float32:
    ranges = _array(path)
    if stored.dtype != np.int8:
        raise UserError(f"{path} is of int8 codes, and documents.npy is {stored.dtype}; take one of them out")
    if ranges.shape != (2, stored.shape[1]) or not np.issubdtype(ranges.dtype, np.floating):
        raise UserError(
            f"{path} is {ranges.dtype} {list(ranges.shape)}, not the least and the largest value of each of the "
            f"{stored.shape[1]} components; make it again"
        )
    return _float_rows(path, ranges)[:].astype(np.float32)


def _float_rows(path: Path, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Refuse what has no cosine: rows that are not finite, or so large that their length is not."""
    if not np.issubdtype(rows.dtype, np.floating):
        raise UserError(f"{path} is of type {rows.dtype}, not float32, float16 or int8; make it again")
    for start in range(0, len(rows), BLOCK):
        length_n = np.linalg.norm(rows[start : start + BLOCK].astype(np.float64), axis=1)
        if not (length_n < _LONGEST).all():
            row = start + int((~(length_n < _LONGEST)).argmax())
            raise UserError(f"{path} row {row} is not finite, or longer than fp32 can square; make it again")
    return rows


def _read_ids(path: Path, what: str, rows: int) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); make it again") from None
    ids = text.removesuffix("\n").split("\n") if text else []
    if len(ids) != rows:
        raise UserError(f"{path.parent} has {len(ids)} ids and {rows} rows ({what}), so no row is known; make it again")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path.parent} has a {what} id twice, so rows are not known apart; make it again")
    for number, one in enumerate(ids, 1):
        if not one or re.search(r"\s", one):
            raise UserError(
                f"{path} line {number} is {one!r}, and TREC's files part words by blanks; write them %20, as `farnear "
                "encode` does"
            )
    return ids


def _answers(path: Path) -> dict[str, set[str]]:
    try:
        return read_qrels(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}), so what answers what is not known; make it again") from None


def _row(row_of: Mapping[str, int], document: str, folder: Path) -> int:
    if document not in row_of:
        raise UserError(
            f"{folder / 'qrels.txt'} names document {document}, which is not among document-ids.txt, so it could never "
            "be found; add its embedding, or take the line out"
        )
    return row_of[document]


def _texts(path: Path) -> dict[str, str]:
    """What queries ask, by their ids; of none where nobody has written it down."""
    texts: dict[str, str] = {}
    if not path.exists():
        return texts
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            query, text = record["id"], record["text"]
            texts[query] = writable(text)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f'{path} line {number} is not {{"id": ..., "text": ...}}; mend it, or take the file out, and queries '
                "are called by their ids"
            ) from None
    return texts


def _facts(path: Path) -> dict[str, Any]:
    """The manifest; what is read of it is looked at."""
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); take it out, or make it again") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path} is not a JSON object; take it out, or make it again")
    dims = facts.get("matryoshka_dims") or []
    fits = {
        "matryoshka_dims": isinstance(dims, list) and all(type(dim) is int and dim > 0 for dim in dims),
        **{key: isinstance(facts.get(key, 0.0), int | float) for key in ("seconds_per_query", "seconds_per_document")},
    }
    if wrong := [key for key, is_right in fits.items() if not is_right]:
        raise UserError(f"{path}: {wrong[0]} is {facts[wrong[0]]!r}, which it cannot be; take it out")
    return facts
