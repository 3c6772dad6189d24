"""InfoNCE over the global batch with its gradient, tile by tile: all Matryoshka dimensions, all directions.

For a query i with positive page p(i), over the pages k of the whole batch (positives of all pairs and hard negatives):

    loss_i = -log( exp(scale * cos(q_i, k_p(i))) / sum_k exp(scale * cos(q_i, k)) )

This is sentence-transformers' MultipleNegativesRankingLoss inside its MatryoshkaLoss (van den Oord et al. 2018,
arXiv:1807.03748; Kusupati et al. 2022, arXiv:2205.13147), its options under its names. `directions` puts further scores
beside those of the query against all pages: of the query against queries, of its page against queries or pages.
`partition_mode` says whether one softmax runs over all of them (joint) or one over each, averaged. `hardness_mode`
lifts negatives by ``hardness_strength`` times their cosine, which takes no gradient (Lan et al. 2025,
arXiv:2503.04812). Beyond them, false negatives are left out: those known by their content
(`farnear.loss.false_negatives`), and with `margin` those that score nearly as well as the positive, each dimension
judging for itself (the rule of Solatorio 2024, arXiv:2402.16829, with the trained model as its own guide).

The gradient is written out rather than left to autograd, for three reasons.

The score matrix never stands whole. A tile is some rows against all columns; when it is done, its part of the gradient
is added to that of rows and columns, and its buffers are used again.

All dimensions share one matrix product. The dot product of two prefixes is the sum of the products of their blocks, so
a tile of raw dot products grows block by block, and after each block the softmax of that dimension is taken. Backwards
it is the same: what a block receives is the sum over the dimensions that hold it,

    U_d = U_(d-1) + X_d Y_d^T        dX_d = (sum over e >= d of H_e) Y_d        H_e = dloss / dU_e

with X_d, Y_d the columns between two dimensions. Seven dimensions cost the products of one.

Normalising is not a pass over the embeddings but a factor on rows and columns of U, 1 / (|x| |y|) of that prefix, whose
gradient needs the row and column sums of H * U alone. The gradient of log(scale) is the sum of all those.

The functions see one rank's rows against all ranks' columns and know no ranks. Everything is fp32.

Shapes: b pairs (queries) of this rank, B pairs and N documents of all ranks, D embedding width, t rows of a tile,
M columns of all directions together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farnear.loss.false_negatives import BatchFacts, Places, false_negatives, own_hard_negatives
from farnear.sections import LossConfig

TILE_BYTES = 256 * 1024 * 1024
"""Memory of a tile's buffers. What decides is the products of narrow blocks, which few rows make slow, on a CPU too."""

_SMALLEST_NORM = 1e-12  # that of torch.nn.functional.normalize
# A dot product that stands for minus infinity: its softmax is 0, and 0 times it is 0, not nan.
_VOID = -1e30


@dataclass(frozen=True)
class LossGradient:
    """What the rows of one rank say.

    Attributes:
        loss_b: float32, each row's loss, whatever its weight.
        dq_bD: Of the weighted sum of the rows' losses with respect to their queries.
        dk_ND: With respect to all documents.
        dq_BD: With respect to all queries as columns; None where no direction has queries as columns.
        dlog_scale: float32 scalar, with respect to log(scale).
        masked: int64 scalar, places that were left out as false negatives by their content, in rows that count.
        beyond_margin: int64 scalar, places left out by the margin at the largest dimension.
    """

    loss_b: Tensor
    dq_bD: Tensor
    dk_ND: Tensor
    dq_BD: Tensor | None
    dlog_scale: Tensor
    masked: Tensor
    beyond_margin: Tensor


def needs_all_queries(loss: LossConfig) -> bool:
    """Whether a direction has the queries of all ranks as columns."""
    return any(direction.endswith("_to_query") for direction in loss.directions)


def dims_and_weights(loss: LossConfig, width: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The prefixes of embeddings of some width, smallest first, whatever order the run file has, and their weights."""
    dims = loss.matryoshka_dims or (width,)
    weights = loss.matryoshka_weights or (1.0,) * len(dims)
    dims, weights = zip(*sorted(zip(dims, weights, strict=True)), strict=True)
    return dims, weights


def tile_rows(loss: LossConfig, documents: int, pairs: int, tile_bytes: int = TILE_BYTES) -> int:
    """Rows of a tile: its buffers are the dot products, one product, and a gradient for each dimension."""
    columns = sum(pairs if direction.endswith("_to_query") else documents for direction in loss.directions)
    return max(1, tile_bytes // (4 * columns * (len(loss.matryoshka_dims or (0,)) + 2)))


def contrastive_gradient(
    q_bD: Tensor,
    k_ND: Tensor,
    q_BD: Tensor | None,
    facts: BatchFacts,
    rows: slice,
    weight_b: Tensor,
    loss: LossConfig,
    *,
    scale: float,
    tile_bytes: int = TILE_BYTES,
) -> LossGradient:
    """The loss of each row and the gradient of their weighted sum.

    Args:
        q_bD: Queries of this rank, float32.
        k_ND: Documents of all ranks, float32.
        q_BD: Queries of all ranks, float32; needed where `needs_all_queries`.
        facts: Of the whole batch.
        rows: Where this rank's pairs stand in the batch.
        weight_b: float32; 0 takes a row out.
        loss: The objective; its own scale is not read.
        scale: Factor on the cosine similarities.
        tile_bytes: Bound of a tile's buffers; one row is taken at least.
    """
    dims, weights = dims_and_weights(loss, q_bD.shape[1])
    spans = list(zip((0, *dims[:-1]), dims, strict=True))
    own_b = facts.positive_B[rows]
    query, document = _Side(q_bD, spans), _Side(k_ND, spans)
    every_query = None if q_BD is None else _Side(q_BD, spans)
    positive = _Side(k_ND[own_b], spans) if any(d.startswith("doc_to") for d in loss.directions) else None
    blocks: list[_Block] = []
    for direction in sorted(loss.directions, key=lambda name: name != "query_to_doc"):
        row = query if direction.startswith("query_to") else positive
        column = every_query if direction.endswith("_to_query") else document
        if row is None or column is None:
            raise ValueError(f"direction {direction} needs q_BD, the queries of all ranks")
        void_c = ~(facts.pair_valid_B if column is every_query else facts.page_valid_N)
        reached = blocks[-1].span.stop if blocks else 0
        span = slice(reached, reached + len(column.x_nD))
        blocks.append(_Block(row, column, span, void_c, false_negatives(direction, facts, rows)))

    size = min(len(q_bD), tile_rows(loss, len(k_ND), len(facts.query_hash_B), tile_bytes))
    buffers_stM = k_ND.new_empty((len(dims) + 2, size, blocks[-1].span.stop))
    hard = own_hard_negatives(facts, rows) if loss.hardness_mode else None
    outcome = [
        _add_tile(
            slice(start, min(start + size, len(q_bD))), blocks, buffers_stM, own_b, hard, weight_b, weights, loss, scale
        )
        for start in range(0, len(q_bD), size)
    ]
    loss_b, masked, beyond_margin = (list(part) for part in zip(*outcome, strict=True))
    rows_of_blocks = [query] if positive is None else [query, positive]
    dlog_scale = torch.stack([side.pull_dn.sum() for side in rows_of_blocks]).sum()
    dk_ND = document.finish()
    if positive is not None:
        dk_ND.index_add_(0, own_b, positive.finish())
    return LossGradient(
        loss_b=torch.cat(loss_b),
        dq_bD=query.finish(),
        dk_ND=dk_ND,
        dq_BD=None if every_query is None else every_query.finish(),
        dlog_scale=dlog_scale,
        masked=torch.stack(masked).sum(),
        beyond_margin=torch.stack(beyond_margin).sum(),
    )


class _Side:
    """Embeddings that stand in rows or columns, and what adds up for them over the tiles.

    Attributes:
        x_nD: float32.
        inverse_dn: 1 / norm of each prefix.
        gradient_nD: Of the dot products alone, until `finish`.
        pull_dn: Sums of H * U, from which the gradient through the norms follows.
    """

    def __init__(self, x_nD: Tensor, spans: Sequence[tuple[int, int]]) -> None:
        self.x_nD = x_nD
        self.spans = spans
        of_blocks = [torch.linalg.vector_norm(x_nD[:, start:stop], dim=1).square_() for start, stop in spans]
        self.inverse_dn = torch.stack(of_blocks).cumsum_(0).sqrt_().clamp_min_(_SMALLEST_NORM).reciprocal_()
        self.gradient_nD = torch.zeros_like(x_nD)
        self.pull_dn = torch.zeros_like(self.inverse_dn)

    def finish(self) -> Tensor:
        """The whole gradient."""
        # A norm below the smallest is a constant.
        moves_dn = self.inverse_dn < 1.0 / _SMALLEST_NORM
        through_norm_dn = torch.where(moves_dn, self.pull_dn * self.inverse_dn.square(), 0.0)
        # Of each block: the prefixes that hold it.
        of_block_dn = through_norm_dn.flip(0).cumsum(0).flip(0)
        for (start, stop), factor_n in zip(self.spans, of_block_dn, strict=True):
            self.gradient_nD[:, start:stop].addcmul_(self.x_nD[:, start:stop], factor_n[:, None], value=-1.0)
        return self.gradient_nD


@dataclass(frozen=True)
class _Block:
    """One direction: its rows, its columns, where these stand among the M of a tile, and which are no negatives."""

    row: _Side
    column: _Side
    span: slice
    void_c: Tensor
    masked: Places


def _add_tile(
    tile: slice,
    blocks: Sequence[_Block],
    buffers_stM: Tensor,
    own_b: Tensor,
    hard: Places | None,
    weight_b: Tensor,
    dim_weights: Sequence[float],
    loss: LossConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a tile's gradients to the sides; (loss of its rows, masked places, places beyond the margin)."""
    # Writing into buffers that stand already is what makes this fast: fresh ones cost more than what is done to them.
    dot_tM, product_tM, *score_dtM = buffers_stM[:, : tile.stop - tile.start]
    weight_t, own_t1 = weight_b[tile], own_b[tile, None]
    masked = _mask(dot_tM, blocks, tile, weight_t)
    beyond_margin = torch.zeros_like(masked)
    loss_t = torch.zeros_like(weight_t)
    last = len(score_dtM) - 1
    for d, (score_tM, dim_weight) in enumerate(zip(score_dtM, dim_weights, strict=True)):
        for block in blocks:
            span, dot_tc = slice(*block.row.spans[d]), dot_tM[:, block.span]
            dot_tc.addmm_(block.row.x_nD[tile, span], block.column.x_nD[:, span].T)
            score_tc = torch.mul(dot_tc, block.column.inverse_dn[d], out=score_tM[:, block.span])
            score_tc.mul_(scale * block.row.inverse_dn[d, tile, None])
        if loss.margin is not None:
            count = _leave_out_beyond_margin(score_tM, blocks, tile, own_t1, weight_t, loss, scale)
            beyond_margin += count if d == last else 0
        if hard is not None:
            _lift(score_tM[:, blocks[0].span], hard.of_rows(tile), own_t1, loss, scale)
        loss_t += dim_weight * _probabilities(score_tM, blocks, own_t1, loss)
        # From here on H: the gradient with respect to the dot products.
        for block in blocks:
            score_tc = score_tM[:, block.span]
            score_tc.mul_((dim_weight * scale * weight_t * block.row.inverse_dn[d, tile])[:, None])
            score_tc.mul_(block.column.inverse_dn[d])
            product_tc = torch.mul(score_tc, dot_tM[:, block.span], out=product_tM[:, block.span])
            block.row.pull_dn[d, tile] += product_tc.sum(1)
            block.column.pull_dn[d] += product_tc.sum(0)
    for d in range(last, -1, -1):
        if d < last:
            score_dtM[d].add_(score_dtM[d + 1])
        for block in blocks:
            span, h_tc = slice(*block.row.spans[d]), score_dtM[d][:, block.span]
            block.row.gradient_nD[tile, span].addmm_(h_tc, block.column.x_nD[:, span])
            block.column.gradient_nD[:, span].addmm_(h_tc.T, block.row.x_nD[tile, span])
    return loss_t, masked, beyond_margin


def _mask(dot_tM: Tensor, blocks: Sequence[_Block], tile: slice, weight_t: Tensor) -> Tensor:
    """Set a tile's dot products to nothing, or to what counts as no negative; how many are false negatives."""
    dot_tM.zero_()
    masked = torch.zeros((), dtype=torch.int64, device=dot_tM.device)
    for block in blocks:
        dot_tc = dot_tM[:, block.span]
        dot_tc[:, block.void_c] = _VOID
        row_n, column_n = block.masked.of_rows(tile)
        dot_tc[row_n, column_n] = _VOID
        if block.masked.own_column_b is not None:
            # Of an invalid pair too: a row must have something to take the softmax of.
            dot_tc.scatter_(1, block.masked.own_column_b[tile, None], 0.0)
        counts_n = (weight_t[row_n] > 0) & ~block.void_c[column_n]
        masked += torch.unique((row_n * dot_tc.shape[1] + column_n)[counts_n]).numel()
    return masked


def _lift(score_tN: Tensor, hard: tuple[Tensor, Tensor], own_t1: Tensor, loss: LossConfig, scale: float) -> None:
    """Add ``hardness_strength`` times the cosine to the scores of the negatives that ``hardness_mode`` names."""
    # The cosine is the score over the scale, so this is a factor; the gradient goes by the dot product without it.
    factor = 1.0 + loss.hardness_strength / scale
    if loss.hardness_mode == "hard_negatives":
        score_tN[hard] *= factor
        return
    score_tN.mul_(factor)
    score_tN.scatter_(1, own_t1, score_tN.gather(1, own_t1) / factor)
    if loss.hardness_mode == "in_batch_negatives":
        score_tN[hard] /= factor


def _leave_out_beyond_margin(
    score_tM: Tensor,
    blocks: Sequence[_Block],
    tile: slice,
    own_t1: Tensor,
    weight_t: Tensor,
    loss: LossConfig,
    scale: float,
) -> Tensor:
    """Leave out scores above the positive's less the margin; how many in rows that count."""
    assert loss.margin is not None
    positive_t1 = score_tM.gather(1, own_t1)
    if loss.margin_strategy == "absolute":
        limit_t1 = positive_t1 - scale * loss.margin
    else:
        limit_t1 = positive_t1 * (1.0 - loss.margin)
    beyond_tM = score_tM > limit_t1
    for block in blocks:
        if block.masked.own_column_b is not None:
            beyond_tM[:, block.span].scatter_(1, block.masked.own_column_b[tile, None], False)
    score_tM.masked_fill_(beyond_tM, _VOID)
    return beyond_tM[weight_t > 0].sum()


def _probabilities(score_tM: Tensor, blocks: Sequence[_Block], own_t1: Tensor, loss: LossConfig) -> Tensor:
    """Turn scores into the gradient of the loss with respect to them, in place; the loss of each row."""
    positive_t = score_tM.gather(1, own_t1)[:, 0]
    parts = [score_tM] if loss.partition_mode == "joint" else [score_tM[:, block.span] for block in blocks]
    log_partition_t = torch.zeros_like(positive_t)
    for score_tc in parts:
        top_t = score_tc.amax(1)
        # Faster by far than exp in place. The largest probability is 1/c at least, so its logarithm is safe, and
        # with the largest score it gives the log-partition.
        torch.softmax(score_tc, 1, out=score_tc)
        log_partition_t += (top_t - score_tc.amax(1).log()) / len(parts)
        if len(parts) > 1:
            score_tc.mul_(1.0 / len(parts))
    score_tM.scatter_add_(1, own_t1, torch.full_like(own_t1, -1.0, dtype=score_tM.dtype))
    return log_partition_t - positive_t
