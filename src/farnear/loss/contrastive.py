"""InfoNCE over the global batch, with duplicates masked, summed over Matryoshka dimensions.

For a query i with positive page p(i), over the pages k of the whole batch (positives of all pairs and hard negatives):

    loss_i = -log( exp(scale * cos(q_i, k_p(i))) / sum_k exp(scale * cos(q_i, k)) )

This is sentence-transformers' MultipleNegativesRankingLoss inside its MatryoshkaLoss (van den Oord et al. 2018,
arXiv:1807.03748; Kusupati et al. 2022, arXiv:2205.13147): the loss of every prefix of the embedding, weighted and
summed. Beyond it, columns that would be false negatives are left out of the sum: a page with the content of the
positive, another page that answers the query, and places that hold no pair at all.

The functions see one rank's rows against all ranks' columns. Where the rank's rows begin among the columns comes in as
an ``offset``; summing and dividing over ranks is the caller's business.

Shapes: b rows (queries) of this rank, N columns (pages) of all ranks, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Columns:
    """What is known of each column beside its embedding.

    Attributes:
        page_hash_N: int64, content of the page.
        query_hash_N: int64, the query whose positive the page is.
        is_positive_N: bool; False for hard negatives, whose query_hash says nothing.
        valid_N: bool; False where the place holds no pair.
    """

    page_hash_N: Tensor
    query_hash_N: Tensor
    is_positive_N: Tensor
    valid_N: Tensor


def false_negatives(columns: Columns, rows: slice, answers_bm: Tensor) -> Tensor:
    """Which columns must not count as negatives of which row.

    Args:
        columns: Of the whole batch.
        rows: Where the rank's b positives stand among the columns, in the order of its queries.
        answers_bm: int64, content of up to m pages that answer each query, wherever they may stand: as another query's
            positive or as a hard negative. Rows with fewer repeat one of them.

    Returns:
        bool [b, N]; never True at a row's own positive.
    """
    same_page_bN = columns.page_hash_N[rows, None] == columns.page_hash_N[None, :]
    for answer_b in answers_bm.unbind(1):  # [b, m, N] at once would be large
        same_page_bN |= answer_b[:, None] == columns.page_hash_N[None, :]
    same_query_bN = columns.query_hash_N[rows, None] == columns.query_hash_N[None, :]
    mask_bN = same_page_bN | (same_query_bN & columns.is_positive_N[None, :]) | ~columns.valid_N[None, :]
    own_b = torch.arange(rows.start, rows.stop, device=mask_bN.device)
    return mask_bN.scatter(1, own_b[:, None], False)


def contrastive_loss(
    q_bD: Tensor,
    k_ND: Tensor,
    mask_bN: Tensor,
    offset: int,
    *,
    scale: float,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
) -> Tensor:
    """The loss of each row, summed over Matryoshka dims.

    Args:
        q_bD: Queries of this rank; any float dtype, computed in fp32.
        k_ND: Pages of all ranks.
        mask_bN: bool; True leaves a column out of a row's sum.
        offset: Column of the first row's positive; row i's is ``offset + i``.
        scale: Factor on the cosine similarities.
        dims: Prefixes of D; None means D alone.
        dim_weights: One a dim; None means 1 each.

    Returns:
        float32 [b].
    """
    dims = dims or (q_bD.shape[1],)
    dim_weights = dim_weights or (1.0,) * len(dims)
    label_b = torch.arange(offset, offset + q_bD.shape[0], device=q_bD.device)
    loss_b = q_bD.new_zeros(q_bD.shape[0], dtype=torch.float32)
    for dim, weight in zip(dims, dim_weights, strict=True):
        q_bd = functional.normalize(q_bD[:, :dim].float(), dim=1)
        k_Nd = functional.normalize(k_ND[:, :dim].float(), dim=1)
        score_bN = (scale * q_bd @ k_Nd.T).masked_fill(mask_bN, -torch.inf)
        loss_b = loss_b + weight * functional.cross_entropy(score_bN, label_b, reduction="none")
    return loss_b
