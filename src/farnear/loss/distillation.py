"""What a teacher adds to the contrastive loss: a pair's own documents should score as a reranker says.

A pair's list is its positive and its hard negatives. The student scores them as the contrastive loss does, by the
cosine of each Matryoshka prefix times the scale; the teacher's are the raw scores of a reranker, which stand in the
file of the negatives. `farnear.loss.listwise` says what a list costs:

    margin_mse               the student's margins, positive less negative, against the teacher's
                             (sentence-transformers' MarginMSELoss; Hofstätter et al. 2020, arXiv:2010.02666)
    listwise_distillation    KL divergence of the student's softmax over the list from the teacher's, both at a
                             temperature (DistillKLDivLoss, without its factor of the temperature's square)

The losses of all dims are weighted and summed, as MatryoshkaLoss does it with either. A list counts where its positive
and at least one negative are valid and have a score of the teacher.

A list lies on its pair's rank as a whole, so a rank needs nothing of the others and what it finds belongs to its own
rows. Its scores are as few as its documents: autograd is cheap here, where the contrastive loss cannot afford it.

Shapes: b pairs and p documents of a rank, d dims, D embedding width, E = d * p entries of the lists of all dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farnear.loss.contrastive import dims_and_weights
from farnear.loss.listwise import list_losses, lists_that_count
from farnear.reranker_section import RerankerConfig
from farnear.sections import LossConfig

_SMALLEST_SQUARE = 1e-24  # of the norm below which torch.nn.functional.normalize takes it for a constant


@dataclass(frozen=True)
class TaughtLists:
    """The lists of a rank.

    Attributes:
        owner_p: int64, the pair of each document, whose positive is the first of them.
        valid_p: bool; False for a document that must not count, and for all of a pair that must not.
        teacher_p: float32, not finite where the teacher has said nothing.
        pairs: b.
    """

    owner_p: Tensor
    valid_p: Tensor
    teacher_p: Tensor
    pairs: int

    def counts(self, loss: LossConfig) -> Tensor:
        """Bool [b]: the lists that count."""
        return lists_that_count(self.owner_p, self.valid_p, self.teacher_p, _as_of_reranker(loss), num_lists=self.pairs)


@dataclass(frozen=True)
class DistillationGradient:
    """What the lists of one rank say.

    Attributes:
        loss_b: float32, each list's loss, whatever its weight; 0 for one that does not count.
        dq_bD: Of the weighted sum of the lists' losses with respect to the rank's queries.
        dk_pD: With respect to its documents.
        dlog_scale: float32 scalar, with respect to log(scale).
    """

    loss_b: Tensor
    dq_bD: Tensor
    dk_pD: Tensor
    dlog_scale: Tensor


def distillation_gradient(
    q_bD: Tensor, k_pD: Tensor, lists: TaughtLists, loss: LossConfig, *, weight: float, scale: float
) -> DistillationGradient:
    """The loss of each list and the gradient of their weighted sum.

    Args:
        q_bD: Queries of this rank, float32.
        k_pD: Its documents, float32.
        loss: The objective; its own scale and weights of terms are not read.
        weight: Of every list.
        scale: Factor on the cosine similarities.
    """
    dims, weights = dims_and_weights(loss, q_bD.shape[1])
    q_bD, k_pD = (x.detach().requires_grad_() for x in (q_bD, k_pD))
    score_dp = scale * _cosines(q_bD, k_pD, lists.owner_p, dims)
    # The lists of one dim after those of the other.
    first_list_d1 = lists.pairs * torch.arange(len(dims), device=q_bD.device)[:, None]
    loss_db = list_losses(
        score_dp.flatten(),
        (first_list_d1 + lists.owner_p).flatten(),
        lists.valid_p.repeat(len(dims)),
        lists.teacher_p.repeat(len(dims)),
        _as_of_reranker(loss),
        num_lists=len(dims) * lists.pairs,
    ).view(len(dims), lists.pairs)
    loss_b = (q_bD.new_tensor(weights)[:, None] * loss_db).sum(0)
    dq_bD, dk_pD, dscore_dp = torch.autograd.grad(weight * loss_b.sum(), (q_bD, k_pD, score_dp))
    return DistillationGradient(loss_b.detach(), dq_bD, dk_pD, (dscore_dp * score_dp.detach()).sum())


def _cosines(q_bD: Tensor, k_pD: Tensor, owner_p: Tensor, dims: Sequence[int]) -> Tensor:
    """Of each document and its pair's query, by their prefixes. [d, p]"""
    spans = list(zip((0, *dims[:-1]), dims, strict=True))

    def of_prefixes(x_nD: Tensor, y_nD: Tensor) -> Tensor:
        """Dot products [d, n]: those of a prefix are the sums of its blocks'."""
        product_nD = x_nD * y_nD
        return torch.stack([product_nD[:, start:stop].sum(1) for start, stop in spans]).cumsum(0)

    # Bounded before the root, whose gradient at 0 is infinite.
    norm_db, norm_dp = (of_prefixes(x, x).clamp_min(_SMALLEST_SQUARE).sqrt() for x in (q_bD, k_pD))
    return of_prefixes(q_bD[owner_p], k_pD) / norm_db[:, owner_p] / norm_dp


def _as_of_reranker(loss: LossConfig) -> RerankerConfig:
    """The same objective as a reranker's."""
    if loss.distillation is None:
        raise ValueError("the run file sets no loss.distillation")
    return RerankerConfig(
        loss=loss.distillation, distillation_temperature=loss.distillation_temperature, num_negatives=0
    )
