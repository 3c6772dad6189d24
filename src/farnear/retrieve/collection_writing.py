"""Write a collection, as `farnear.retrieve.collection` describes it, of the embeddings that all ranks have made.

Rows are read block by block, so that there may be more of them than memory holds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from farnear.data.document_names import DocumentNames
from farnear.data.index import Index
from farnear.data.read import InputReader, text_of
from farnear.data.shard_store import ShardStore
from farnear.files import published, replace_text
from farnear.retrieve.codes import BLOCK, Precision, binary_codes, int8_codes, unit_prefix, value_ranges
from farnear.retrieve.collection import FORMAT, MANIFEST, OF_QUERIES, refuse_dim
from farnear.retrieve.embeddings import Embeddings, StoredRows, distinct_inputs
from farnear.retrieve.evaluate import RetrievalTask, build_task
from farnear.retrieve.trec import trec_id, write_qrels
from farnear.wording import writable


def write_collection(
    folder: Path,
    embeddings: Embeddings,
    index: Index,
    store: ShardStore,
    facts: Mapping[str, Any],
    *,
    dim: int | None,
    precision: Precision,
) -> None:
    """Make a collection of the embeddings of an index.

    Args:
        dim: Components to keep; None for all.

    Raises:
        UserError: The model has fewer components than asked for.
    """
    full = embeddings.documents.shape[1]
    dim = dim or full
    refuse_dim(dim, full, precision)
    task = build_task(index, store)
    names = DocumentNames(index)
    document_ids = [trec_id(name) for name in names.names(distinct_inputs(index)["document"][1])]
    _write_ids(folder / "document-ids.txt", document_ids)
    _write_documents(folder, embeddings.documents, dim, precision)
    queries = len(task.query_pair_Q)
    if queries:
        _write_queries(folder, embeddings.queries, task, dim, document_ids)
    else:
        for name in OF_QUERIES:
            (folder / name).unlink(missing_ok=True)
    about = {"format": FORMAT, **facts, "dim": dim, "full_dim": full, "precision": precision}
    about |= {"queries": queries, "documents": len(document_ids), "task": task.fingerprint}
    replace_text(folder / MANIFEST, json.dumps(about, indent=1) + "\n")


def _write_documents(folder: Path, rows: StoredRows, dim: int, precision: Precision) -> None:
    ranges = None
    if precision == "int8":
        ranges = value_ranges(rows, dim)
        with published(folder / "ranges.npy") as file:
            np.save(file, ranges)
    else:
        (folder / "ranges.npy").unlink(missing_ok=True)
    width, kind = (dim // 8, np.int8) if precision == "binary" else (dim, np.int8 if ranges is not None else np.float32)
    with published(folder / "documents.npy") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(rows), width)})
        for start in range(0, len(rows), BLOCK):
            unit_nd = unit_prefix(rows[start : start + BLOCK], dim)
            code_nd = unit_nd if precision == "float32" else binary_codes(unit_nd)
            file.write((code_nd if ranges is None else int8_codes(unit_nd, ranges)).tobytes())


def _write_queries(folder: Path, rows: StoredRows, task: RetrievalTask, dim: int, document_ids: Sequence[str]) -> None:
    query_ids = [trec_id(task.index.pair_id(int(pair))) for pair in task.query_pair_Q]
    _write_ids(folder / "query-ids.txt", query_ids)
    with published(folder / "queries.npy") as file:
        np.save(file, unit_prefix(rows[:], dim))
    reader = InputReader(task.index, task.store)
    texts = [writable(text_of(reader[int(row)])) for row in task.index.query_N[task.query_pair_Q]]
    lines = [
        json.dumps({"id": one, "text": text}, ensure_ascii=False) for one, text in zip(query_ids, texts, strict=True)
    ]
    replace_text(folder / "queries.jsonl", "".join(f"{line}\n" for line in lines))
    write_qrels(folder / "qrels.txt", query_ids, document_ids, task.relevant)


def _write_ids(path: Path, ids: Sequence[str]) -> None:
    replace_text(path, "".join(f"{one}\n" for one in ids))
