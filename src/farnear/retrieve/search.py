"""Exact nearest pages by cosine similarity.

Evaluation must not depend on an approximate index, on how many rows were scored at once or on how a sort happens to
place equal scores: two runs that produce the same embeddings have to report the same nDCG. So every query is scored
against every page in fp32, block by block, and the ranking is a total order: higher score first, then the lower page.

``torch.topk`` leaves the order of equal scores open. Each score is therefore packed with its page into one int64 key
whose order is exactly that total order: the bits of the score, mapped so that they grow with it, above the page counted
downwards. Keys are all different, so the k largest are unique; they also merge from one block of pages to the next, and
both the score and the page can be read back from them without loss. Only scores that can still be among a query's best
get a key, which are few, so a search costs little more than the bare matrix product (`benchmarks/mining.py`).

Matryoshka truncation means what it means in sentence-transformers: keep the first ``dim`` components, then normalise
what is left.

Shapes: Q queries, P pages, D components of an embedding, d kept ones, k results; q queries and p pages of a tile, r
runs of its columns, h runs that are looked into, n scores that pass, c candidates for a query's k.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farnear.errors import UserError

LOW_BITS = 0xFFFF_FFFF
NO_KEY = -(2**63)
"""Below the key of any score."""
ROWS_OF_A_KERNEL = 64
RUN = 32
"""Columns of a tile that are looked at by their largest; tiles are whole runs."""
SHARE_LOOKED_INTO = 0.5
"""Most of a tile's runs that are looked into: where more pass, all of it takes no more time and memory."""


class Rows(Protocol):
    """What is searched: a tensor, a numpy array, or arrays on disk that look like one."""

    @property
    def ndim(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Any: ...


Search = Callable[[npt.NDArray[np.float32], int], tuple[Tensor, Tensor]]
"""(queries [Q, D], k) -> scores and pages, as `top_k` gives them."""


def top_k(
    query_QD: Tensor | npt.NDArray[Any],
    page_PD: Tensor | Rows,
    k: int,
    *,
    dim: int | None = None,
    normalize: bool = True,
    tile: tuple[int, int] = (256, 25600),
    moved: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` pages nearest to each query by cosine similarity: ``scores_Qk`` (fp32) and ``pages_Qk`` (int64).

    Best page first, equal scores by the lower page. ``k`` is clipped to P. Inputs may have any floating dtype and need
    not be normalised; a zero vector scores 0 everywhere. They may be numpy arrays mapped from a disk: pages are read
    once, block by block, so there may be more of them than memory holds; the queries are held. ``dim`` keeps that many
    leading components. Without ``normalize`` rows are taken as they are, and scored by their inner products. ``tile``
    is how many queries and pages are scored at once (about, see `_even_tile`): it bounds the memory for scores, and
    never changes the order of equal ones. ``moved`` is called for every block of pages, by which a watchdog knows that
    a long search goes on. The search runs where the queries are.

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
    queries_per_tile, pages_per_tile = _even_tile(queries, tile[0]), _even_tile(pages, tile[1])
    device = query_QD.device if isinstance(query_QD, Tensor) else torch.device("cpu")
    with torch.no_grad(), _full_fp32(device.type):
        unit_query_Qd = _prefix(query_QD, dim, "queries", normalize)
        best_Qk = torch.full((queries, min(k, pages)), NO_KEY, device=device)
        score_qp = torch.empty((queries_per_tile, pages_per_tile), device=device)
        for first_page in range(0, pages, pages_per_tile):
            moved()
            unit_page_pd = _prefix(page_PD[first_page : first_page + pages_per_tile], dim, "pages", normalize).to(
                device
            )
            pages_here = len(unit_page_pd)
            unit_page_pd = _padded(unit_page_pd, pages_per_tile)
            for first_query in range(0, queries, queries_per_tile):
                block = slice(first_query, first_query + queries_per_tile)
                torch.mm(_padded(unit_query_Qd[block], queries_per_tile), unit_page_pd.T, out=score_qp)
                score_qp[:, pages_here:] = -torch.inf
                _improve(best_Qk[block], score_qp[: len(best_Qk[block])], first_page)
    return _scores_of(best_Qk), LOW_BITS - (best_Qk & LOW_BITS)


def faiss_search(page_PD: Rows, block: int = 16384) -> Search:
    """The same search by FAISS's IndexFlatIP, which is exact too, and holds all pages in memory.

    Raises:
        UserError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError(
            "mining.use_faiss is set, but FAISS cannot be imported, so nothing would be found; install faiss-cpu, or "
            "take it out: the search without it is exact and fast"
        ) from None
    index = faiss.IndexFlatIP(page_PD.shape[1])
    for first_page in range(0, len(page_PD), block):
        index.add(_prefix(page_PD[first_page : first_page + block], None, "pages").numpy())

    def search(query_QD: npt.NDArray[np.float32], k: int) -> tuple[Tensor, Tensor]:
        found = index.search(_prefix(query_QD, None, "queries").numpy(), min(k, len(page_PD)))
        score_Qk, page_Qk = map(torch.from_numpy, found)
        # FAISS leaves the order of equal scores open.
        key_Qk = _key(score_Qk, page_Qk).sort(dim=1, descending=True).values
        return _scores_of(key_Qk), LOW_BITS - (key_Qk & LOW_BITS)

    return search


def _improve(best_qk: Tensor, score_qp: Tensor, first_page: int) -> None:
    """Bring the keys of the best pages so far, in falling order, up to date with a tile of scores.

    Nearly all of a tile lies below what a query has already. So it is read once, for the largest score of every run of
    ``RUN`` columns; only the runs whose largest passes the query's k-th best are looked into.
    """
    k = best_qk.shape[1]
    score_qrc = score_qp.view(len(score_qp), -1, RUN)
    largest_qr = score_qrc.amax(dim=2)
    is_short_q = best_qk[:, -1] == NO_KEY
    # A later page with just the k-th score comes too late, for the lower page comes first.
    threshold_q = torch.where(is_short_q, -torch.inf, _scores_of(best_qk[:, -1]))
    runs = largest_qr.shape[1]
    if runs >= k and bool(is_short_q.any()):
        # k runs reach this, and so do k scores; what equals it must pass, so the bound is the number below it.
        kth_q = largest_qr.kthvalue(runs - k + 1, dim=1).values
        threshold_q = threshold_q.maximum(_just_below(kth_q))
    row_h, run_h = (largest_qr > threshold_q[:, None]).nonzero(as_tuple=True)
    if len(row_h) == 0:
        return
    if len(row_h) > SHARE_LOOKED_INTO * largest_qr.numel():
        # Few pages for so many results: the k-th score itself is the bound.
        kth_q = score_qp.topk(min(k, score_qp.shape[1]), dim=1, sorted=False).values.amin(dim=1)
        threshold_q = threshold_q.maximum(_just_below(kth_q))
        place_n = (score_qp > threshold_q[:, None]).view(-1).nonzero().view(-1)
        row_n, page_n = place_n // score_qp.shape[1], first_page + place_n % score_qp.shape[1]
        score_n = score_qp.view(-1)[place_n]
    else:
        score_hc = score_qrc[row_h, run_h]
        place_n = (score_hc > threshold_q[row_h, None]).view(-1).nonzero().view(-1)
        hit_n = place_n // RUN
        row_n, page_n = row_h[hit_n], first_page + run_h[hit_n] * RUN + place_n % RUN
        score_n = score_hc.view(-1)[place_n]
    # As many columns as the query with most candidates needs; they come query by query, so each knows its place.
    count_q = torch.bincount(row_n, minlength=len(best_qk))
    column_n = torch.arange(len(row_n), device=row_n.device) - (count_q.cumsum(0) - count_q)[row_n]
    candidate_qc = best_qk.new_full((len(best_qk), int(count_q.max())), NO_KEY)
    candidate_qc[row_n, column_n] = _key(score_n, page_n)
    best_qk.copy_(torch.cat([best_qk, candidate_qc], dim=1).topk(k, dim=1, sorted=True).values)


def _even_tile(rows: int, largest: int) -> int:
    """Rows in every block: at most about ``largest``, alike for all blocks, a multiple of ``ROWS_OF_A_KERNEL``.

    A matrix product takes other instructions, which round otherwise, for what is left over at its edges. One page
    stored twice would then score differently by 1e-7 depending on where it lies, and its tie would be decided by that.
    """
    blocks = max(1, -(-rows // largest))
    return -(-rows // (blocks * ROWS_OF_A_KERNEL)) * ROWS_OF_A_KERNEL or ROWS_OF_A_KERNEL


def _prefix(embedding_nD: Tensor | npt.NDArray[Any], dim: int | None, what: str, normalize: bool = True) -> Tensor:
    """The first ``dim`` components in fp32, scaled to length 1 if they are to be."""
    # Copied, for torch takes no array that cannot be written to.
    prefix = embedding_nD[:, :dim] if isinstance(embedding_nD, Tensor) else np.array(embedding_nD[:, :dim])
    prefix_nd = torch.as_tensor(prefix).float()
    length_n1 = torch.linalg.vector_norm(prefix_nd, dim=1, keepdim=True)
    if bad := int((~length_n1.isfinite()).sum()):
        raise ValueError(f"{bad} embeddings of {what} hold NaN or infinity, so they cannot be ranked")
    return prefix_nd / length_n1.clamp_min(1e-12) if normalize else prefix_nd


def _padded(rows_nd: Tensor, n: int) -> Tensor:
    """Zeros below, to ``n`` rows."""
    return rows_nd if len(rows_nd) == n else torch.nn.functional.pad(rows_nd, (0, 0, 0, n - len(rows_nd)))


def _just_below(score_q: Tensor) -> Tensor:
    return score_q.nextafter(torch.full_like(score_q, -torch.inf))


def _key(score: Tensor, page: Tensor) -> Tensor:
    """int64 keys that order by score, then by the lower page. Adding 0.0 turns -0.0 into 0.0: they are equal scores."""
    bits = (score + 0.0).view(torch.int32)
    # The bits of a non-negative fp32 grow with it; those of a negative one shrink, so all but its sign are flipped.
    ordered = torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits).long()
    return (ordered << 32) | (LOW_BITS - page)


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
