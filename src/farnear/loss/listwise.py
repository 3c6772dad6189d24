"""What a list of scores costs: the query's positive against its negatives.

    listwise                 cross-entropy of the positive in a softmax over the list's scores, activated and scaled
                             (sentence-transformers' MultipleNegativesRankingLoss for a CrossEncoder)
    pairwise_logistic        log(1 + exp(-(s_positive - s_negative))), the mean over the negatives (RankNet; Burges et
                             al. 2005)
    binary                   cross-entropy of sigmoid(s) with 1 for the positive and 0 for negatives, the mean over the
                             list (BinaryCrossEntropyLoss)
    margin_mse               square of the difference between the margins of student and teacher, s_positive -
                             s_negative, the mean over the negatives (MarginMSELoss; Hofstätter et al. 2020,
                             arXiv:2010.02666)
    listwise_distillation    KL divergence of the student's softmax over the list from the teacher's, both at a
                             temperature

Lists are ragged, and stand one after the other: entry e belongs to list ``list_E[e]``. Everything is differentiable
with respect to the scores, in fp32, and sums over a list's entries only, so that a batch's lists may be anywhere.

Shapes: E entries of l lists.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from farnear.reranker_section import DISTILLATIONS, RerankerConfig


def list_losses(
    score_E: Tensor,
    list_E: Tensor,
    valid_E: Tensor,
    teacher_E: Tensor | None,
    reranker: RerankerConfig,
    *,
    num_lists: int,
) -> Tensor:
    """The loss of each list, float32 [l]; 0, with a gradient of 0, for one that does not count.

    Args:
        score_E: Raw scores, before any activation.
        list_E: int64, which list an entry belongs to. Its first entry is the positive.
        valid_E: bool; an entry that is not stands for nothing, and without its positive a list does not count.
        teacher_E: Float, the teacher's scores, for distillation; where it is not finite the entry is as if not valid.
        reranker: Section `reranker`: which loss, and its settings.
        num_lists: l.
    """
    entries = _Entries(score_E, list_E, valid_E, teacher_E, reranker, num_lists)
    loss_l = _LOSSES[reranker.loss](entries)
    return torch.where(entries.counts_l, loss_l, torch.zeros_like(loss_l))


def lists_that_count(
    list_E: Tensor, valid_E: Tensor, teacher_E: Tensor | None, reranker: RerankerConfig, *, num_lists: int
) -> Tensor:
    """Bool [l]: lists with a valid positive and, except for the binary loss, a valid negative. See `list_losses`."""
    score_E = torch.zeros(len(list_E), device=list_E.device)
    return _Entries(score_E, list_E, valid_E, teacher_E, reranker, num_lists).counts_l


class _Entries:
    """Entries, which of them are what, and sums over lists."""

    def __init__(
        self,
        score_E: Tensor,
        list_E: Tensor,
        valid_E: Tensor,
        teacher_E: Tensor | None,
        reranker: RerankerConfig,
        num_lists: int,
    ) -> None:
        valid_E = valid_E.bool()
        if reranker.loss in DISTILLATIONS:
            if teacher_E is None:
                raise ValueError(f"loss {reranker.loss} needs the teacher's scores")
            valid_E = valid_E & teacher_E.isfinite()
            teacher_E = teacher_E.float().where(valid_E, 0.0)
        self.reranker = reranker
        self.list_E = list_E
        self.num_lists = num_lists
        place_E = torch.arange(len(list_E), device=list_E.device)
        first_l = torch.full((num_lists,), len(list_E), device=list_E.device)
        first_l = first_l.scatter_reduce(0, list_E, place_E, "amin")
        is_first_E = place_E == first_l[list_E]
        self.positive_E = is_first_E & valid_E
        self.negative_E = ~is_first_E & valid_E
        self.negatives_l = self.sum(self.negative_E.float())
        self.counts_l = self.sum(self.positive_E.float()) > 0
        if reranker.loss != "binary":
            self.counts_l = self.counts_l & (self.negatives_l > 0)
        # What does not count must not be computed with: nan times 0 is nan.
        self.valid_E = valid_E & self.counts_l[list_E]
        self.score_E = score_E.float().where(self.valid_E, 0.0)
        self.teacher_E = teacher_E

    def sum(self, x_E: Tensor) -> Tensor:
        return torch.zeros(self.num_lists, dtype=x_E.dtype, device=x_E.device).index_add(0, self.list_E, x_E)

    def mean_of_negatives(self, x_E: Tensor) -> Tensor:
        return self.sum(x_E.where(self.negative_E & self.valid_E, 0.0)) / self.negatives_l.clamp(min=1.0)

    def margin(self, x_E: Tensor) -> Tensor:
        """x of the list's positive less that of the entry."""
        return self.sum(x_E.where(self.positive_E, 0.0))[self.list_E] - x_E

    def log_softmax(self, x_E: Tensor) -> Tensor:
        """Over each list's valid entries; the others hold numbers that mean nothing."""
        low = torch.finfo(x_E.dtype).min
        masked_E = x_E.detach().where(self.valid_E, low)
        largest_l = torch.full((self.num_lists,), low, dtype=x_E.dtype, device=x_E.device)
        largest_l = largest_l.scatter_reduce(0, self.list_E, masked_E, "amax").clamp(min=low / 2)
        centred_E = x_E - largest_l[self.list_E].where(self.valid_E, 0.0)
        sum_l = self.sum(centred_E.exp().where(self.valid_E, 0.0))
        # A list without entries: its loss is not read, but must be a number.
        return centred_E - sum_l.where(self.counts_l, 1.0).log()[self.list_E]


def _listwise(entries: _Entries) -> Tensor:
    score_E = entries.score_E.sigmoid() if entries.reranker.activation_fn == "sigmoid" else entries.score_E
    log_p_E = entries.log_softmax(entries.reranker.scale * score_E)
    return -entries.sum(log_p_E.where(entries.positive_E & entries.valid_E, 0.0))


def _pairwise_logistic(entries: _Entries) -> Tensor:
    return entries.mean_of_negatives(softplus(-entries.margin(entries.score_E)))


def _binary(entries: _Entries) -> Tensor:
    # log(1 + e^-s) for a positive, log(1 + e^s) for a negative.
    loss_E = softplus(entries.score_E.where(entries.negative_E, -entries.score_E))
    valid_l = entries.sum(entries.valid_E.float()).clamp(min=1.0)
    return entries.sum(loss_E.where(entries.valid_E, 0.0)) / valid_l


def _margin_mse(entries: _Entries) -> Tensor:
    assert entries.teacher_E is not None
    difference_E = entries.margin(entries.score_E) - entries.margin(entries.teacher_E)
    return entries.mean_of_negatives(difference_E.square())


def _listwise_distillation(entries: _Entries) -> Tensor:
    assert entries.teacher_E is not None
    temperature = entries.reranker.distillation_temperature
    log_p_E = entries.log_softmax(entries.score_E / temperature)
    log_t_E = entries.log_softmax(entries.teacher_E / temperature)
    return entries.sum((log_t_E.exp() * (log_t_E - log_p_E)).where(entries.valid_E, 0.0))


_LOSSES = {
    "listwise": _listwise,
    "pairwise_logistic": _pairwise_logistic,
    "binary": _binary,
    "margin_mse": _margin_mse,
    "listwise_distillation": _listwise_distillation,
}
