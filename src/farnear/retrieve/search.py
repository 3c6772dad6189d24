"""Exact nearest pages by cosine similarity.

Evaluation must not depend on an approximate index, on how many rows were scored at once or on how a sort happens to
place equal scores: two runs that produce the same embeddings have to report the same nDCG. So every query is scored
against every page in fp32, block by block, and the ranking is a total order: higher score first, then the lower page.

``torch.topk`` leaves the order of equal scores open. Each score is therefore packed with its page into one int64 key
whose order is exactly that total order: the bits of the score, mapped so that they grow with it, above the page counted
downwards. Keys are all different, so the k largest are unique; they also merge from one block of pages to the next, and
both the score and the page can be read back from them without loss.

Matryoshka truncation means what it means in sentence-transformers: keep the first ``dim`` components, then normalise
what is left.

Shapes: Q queries, P pages, D components of an embedding, d kept ones, k results; q queries and p pages of a block, c
candidates for a query's k.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LOW_BITS = 0xFFFF_FFFF
COLUMNS_OF_A_KERNEL = 64


def top_k(
    query_QD: Tensor,
    page_PD: Tensor,
    k: int,
    *,
    dim: int | None = None,
    tile: tuple[int, int] = (256, 8192),
    moved: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` pages nearest to each query by cosine similarity: ``scores_Qk`` (fp32) and ``pages_Qk`` (int64).

    Best page first, equal scores by the lower page. ``k`` is clipped to P. Inputs may have any floating dtype and need
    not be normalised; a zero vector scores 0 everywhere. ``dim`` keeps that many leading components. ``tile`` is how
    many queries and pages are scored at once (pages rounded up to a multiple of 64): it bounds memory, about 30 bytes a
    score, and never changes the order of equal scores. Queries times pages are never held at once. ``moved`` is called
    for every block of pages, by which a watchdog knows that a long search goes on.

    Raises ValueError for shapes that do not fit, ``k`` or ``dim`` out of range, and embeddings that are not finite
    (a ranking of NaN would look like any other).
    """
    if query_QD.ndim != 2 or page_PD.ndim != 2 or query_QD.shape[1] != page_PD.shape[1]:
        raise ValueError(f"queries {tuple(query_QD.shape)} and pages {tuple(page_PD.shape)} are not [Q, D] and [P, D]")
    if k < 1:
        raise ValueError(f"k is {k}, but at least one page must be asked for")
    if dim is not None and not 1 <= dim <= query_QD.shape[1]:
        raise ValueError(f"dim is {dim}, but the embeddings have {query_QD.shape[1]} components")
    queries, pages = len(query_QD), len(page_PD)
    queries_per_tile = tile[0]
    pages_per_tile = _even_tile(pages, tile[1])
    with torch.no_grad(), _full_fp32(query_QD.device.type):
        unit_query_Qd = _unit_prefix(query_QD, dim, "queries")
        best_Qk = query_QD.new_empty((queries, 0), dtype=torch.int64)
        for first_page in range(0, pages, pages_per_tile):
            moved()
            unit_page_pd = _unit_prefix(page_PD[first_page : first_page + pages_per_tile], dim, "pages")
            pages_here = len(unit_page_pd)
            unit_page_pd = torch.nn.functional.pad(unit_page_pd, (0, 0, 0, pages_per_tile - pages_here))
            blocks = [best_Qk.new_empty((0, min(k, first_page + pages_here)))]
            for first_query in range(0, queries, queries_per_tile):
                block = slice(first_query, first_query + queries_per_tile)
                key_qp = _keys((unit_query_Qd[block] @ unit_page_pd.T)[:, :pages_here], first_page)
                candidate_qc = torch.cat([best_Qk[block], key_qp], dim=1)
                blocks.append(candidate_qc.topk(min(k, candidate_qc.shape[1]), dim=1, sorted=True).values)
            best_Qk = torch.cat(blocks)
    return _scores_of(best_Qk), LOW_BITS - (best_Qk & LOW_BITS)


def _even_tile(pages: int, largest: int) -> int:
    """Pages in every block: at most about ``largest``, alike for all blocks, a multiple of ``COLUMNS_OF_A_KERNEL``.

    A matrix product takes other instructions, which round otherwise, for the columns left over at its edge. One page
    stored twice would then score differently by 1e-7 depending on where it lies, and its tie would be decided by that.
    """
    blocks = max(1, -(-pages // largest))
    return -(-pages // (blocks * COLUMNS_OF_A_KERNEL)) * COLUMNS_OF_A_KERNEL or COLUMNS_OF_A_KERNEL


def _unit_prefix(embedding_nD: Tensor, dim: int | None, what: str) -> Tensor:
    """The first ``dim`` components in fp32, scaled to length 1."""
    unit_nd = torch.nn.functional.normalize(embedding_nD[:, :dim].float(), dim=1)
    if not bool(unit_nd.isfinite().all()):
        bad = int((~unit_nd.isfinite().all(dim=1)).sum())
        raise ValueError(f"{bad} embeddings of {what} hold NaN or infinity, so they cannot be ranked")
    return unit_nd


def _keys(score_qp: Tensor, first_page: int) -> Tensor:
    """int64 keys that order by score, then by the lower page. Adding 0.0 turns -0.0 into 0.0: they are equal scores."""
    bits_qp = (score_qp + 0.0).view(torch.int32)
    # The bits of a non-negative fp32 grow with it; those of a negative one shrink, so all but its sign are flipped.
    ordered_qp = torch.where(bits_qp < 0, bits_qp ^ 0x7FFF_FFFF, bits_qp).long()
    page_p = torch.arange(first_page, first_page + score_qp.shape[1], device=score_qp.device)
    return (ordered_qp << 32) | (LOW_BITS - page_p)


def _scores_of(key_Qk: Tensor) -> Tensor:
    ordered_Qk = (key_Qk >> 32).int()
    return torch.where(ordered_Qk < 0, ordered_Qk ^ 0x7FFF_FFFF, ordered_Qk).view(torch.float32)


@contextmanager
def _full_fp32(device_type: str) -> Iterator[None]:
    """Score in fp32 even where the caller trains under autocast or lets matrix products run in TF32 or bf16.

    Set for each backend by its own name: torch refuses ``get_float32_matmul_precision`` once a caller has done so.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision = cpu.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before
