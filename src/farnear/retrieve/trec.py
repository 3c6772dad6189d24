"""TREC's files, which every tool for retrieval reads: what was found (a run), and what answers what (qrels).

    run     QUERY Q0 DOCUMENT RANK SCORE TAG     a line for each page found
    qrels   QUERY 0 DOCUMENT 1                   a line for each page that answers a query

Tools sort a run by its scores and place equal ones as they like, trec_eval by the name of the document. So that they
all see the order that was measured, a score is written a little lower where it is not below the one before it: by one
step of fp32, in which trec_eval may read it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from farnear.errors import UserError
from farnear.files import published, replace_text


def trec_id(name: str) -> str:
    """A name without what TREC's files part words by; two names stay two."""
    return re.sub(r"\s|%(?=[0-9A-Fa-f]{2})", lambda found: "".join(f"%{b:02X}" for b in found[0].encode()), name)


def write_run(
    path: Path,
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    score_Qk: npt.NDArray[np.float32],
    page_Qk: npt.NDArray[np.int64],
    tag: str,
) -> None:
    """Write what was found, best first, as rows of ``document_ids``."""
    falling_Qk = score_Qk.astype(np.float32)
    for rank in range(1, falling_Qk.shape[1]):
        below_Q = np.nextafter(falling_Qk[:, rank - 1], np.float32(-np.inf))
        falling_Qk[:, rank] = np.minimum(falling_Qk[:, rank], below_Q)
    tag = trec_id(tag)
    with published(path) as file:
        for query, page_k, score_k in zip(query_ids, page_Qk.tolist(), falling_Qk.tolist(), strict=True):
            lines = [
                f"{query} Q0 {document_ids[page]} {rank} {score:.9g} {tag}\n"
                for rank, (page, score) in enumerate(zip(page_k, score_k, strict=True), 1)
            ]
            file.write("".join(lines).encode())


def write_qrels(
    path: Path, query_ids: Sequence[str], document_ids: Sequence[str], relevant: Sequence[frozenset[int]]
) -> None:
    """Write which pages, rows of ``document_ids``, answer each query."""
    lines = [
        f"{query} 0 {document_ids[page]} 1\n"
        for query, pages in zip(query_ids, relevant, strict=True)
        for page in sorted(pages)
    ]
    replace_text(path, "".join(lines))


def read_qrels(path: Path) -> dict[str, set[str]]:
    """The documents that answer each query: those whose relevance is above 0.

    Raises:
        UserError: A line is not of that form.
    """
    answers: dict[str, set[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            query, _, document, relevance = line.split()
            is_relevant = int(relevance) > 0
        except ValueError:
            raise UserError(
                f"{path} line {number} is not `QUERY 0 DOCUMENT RELEVANCE`, so what answers what is not known; mend it"
            ) from None
        if is_relevant:
            answers.setdefault(query, set()).add(document)
    return answers
