"""Losses of lists against sentence-transformers' and torch's own, values and gradients, on ragged lists too."""

from typing import Any

import pytest
import torch
from sentence_transformers.cross_encoder.losses import (
    BinaryCrossEntropyLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from farnear.loss.listwise import list_losses, lists_that_count
from farnear.reranker_section import RerankerConfig

LISTS, LENGTH = 4, 5
LOSSES = ("listwise", "pairwise_logistic", "binary", "margin_mse", "listwise_distillation")


def section(loss: str, **keys: Any) -> RerankerConfig:
    return RerankerConfig(loss=loss, num_negatives=0, **keys)


def of_sentence_transformers(loss_class: type[nn.Module], **attributes: Any) -> Any:
    """A loss without a model: scores are given to it."""
    loss = loss_class.__new__(loss_class)
    nn.Module.__init__(loss)
    for name, value in attributes.items():
        setattr(loss, name, value)
    return loss


def listwise(score_ln: Tensor, teacher_ln: Tensor, config: RerankerConfig) -> Tensor:
    activation = nn.Sigmoid() if config.activation_fn == "sigmoid" else nn.Identity()
    theirs = of_sentence_transformers(
        MultipleNegativesRankingLoss,
        activation_fn=activation,
        scale=config.scale,
        cross_entropy_loss=nn.CrossEntropyLoss(),
    )
    return theirs.calculate_loss(list(score_ln.T), len(score_ln))


def pairwise_logistic(score_ln: Tensor, teacher_ln: Tensor, config: RerankerConfig) -> Tensor:
    return -nn.functional.logsigmoid(score_ln[:, :1] - score_ln[:, 1:]).mean()


def binary(score_ln: Tensor, teacher_ln: Tensor, config: RerankerConfig) -> Tensor:
    label_ln = torch.zeros_like(score_ln)
    label_ln[:, 0] = 1.0
    theirs = of_sentence_transformers(BinaryCrossEntropyLoss, bce_with_logits_loss=nn.BCEWithLogitsLoss())
    return theirs.bce_with_logits_loss(score_ln.flatten(), label_ln.flatten())


def margin_mse(score_ln: Tensor, teacher_ln: Tensor, config: RerankerConfig) -> Tensor:
    theirs = of_sentence_transformers(MarginMSELoss, activation_fn=nn.Identity(), loss_fct=nn.MSELoss())
    theirs.logits_from_pairs = lambda pairs, **_: torch.stack([document for _, document in pairs])
    inputs = [["q"] * len(score_ln), *(list(column) for column in score_ln.T)]
    return theirs(inputs, list(teacher_ln))


def listwise_distillation(score_ln: Tensor, teacher_ln: Tensor, config: RerankerConfig) -> Tensor:
    t = config.distillation_temperature
    return nn.functional.kl_div(
        (score_ln / t).log_softmax(-1), (teacher_ln / t).log_softmax(-1), reduction="batchmean", log_target=True
    )


REFERENCES = {
    "listwise": listwise,
    "pairwise_logistic": pairwise_logistic,
    "binary": binary,
    "margin_mse": margin_mse,
    "listwise_distillation": listwise_distillation,
}


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(3 * torch.randn(LISTS, LENGTH, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("loss", "keys"),
    [
        *((loss, {}) for loss in LOSSES),
        ("listwise", {"scale": 3.0, "activation_fn": "identity"}),
        ("listwise_distillation", {"distillation_temperature": 2.5}),
    ],
)
def test_lists_of_equal_length_cost_what_they_do_elsewhere(loss: str, keys: dict[str, Any]) -> None:
    config = section(loss, **keys)
    score_ln, teacher_ln = drawn()
    score_ln.requires_grad_()
    list_E = torch.arange(LISTS).repeat_interleave(LENGTH)
    ours_l = list_losses(
        score_ln.flatten(), list_E, torch.ones(LISTS * LENGTH).bool(), teacher_ln.flatten(), config, num_lists=LISTS
    )
    (ours,) = torch.autograd.grad(ours_l.mean(), score_ln)
    reference = REFERENCES[loss](score_ln, teacher_ln, config)
    (wanted,) = torch.autograd.grad(reference, score_ln)
    assert wanted.abs().max() > 1e-2
    torch.testing.assert_close(ours_l.mean(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_ragged_lists_cost_what_each_costs_alone(loss: str) -> None:
    """Entries that are not valid hold what would spoil everything that they get into."""
    config = section(loss)
    score_ln, teacher_ln = drawn()
    # Lists of 5, 3, 1 and 0 valid negatives, and one whose positive is not valid, in no order.
    lengths = {7: 6, 0: 4, 3: 2, 5: 1, 1: 3}
    score_E, teacher_E, list_E, valid_E, wanted = [], [], [], [], torch.zeros(8)
    for number, (place, length) in enumerate(lengths.items()):
        own = torch.cat([score_ln.flatten(), score_ln.flatten()])[number * 3 :][:length]
        of_teacher = teacher_ln.flatten()[number * 2 :][:length]
        if place != 1 and (length > 1 or loss == "binary"):
            wanted[place] = REFERENCES[loss](own[None], of_teacher[None], config)
        for i in range(length):
            score_E.append(own[i : i + 1])
            teacher_E.append(of_teacher[i : i + 1])
            list_E.append(place)
            valid_E.append(place != 1 or i > 0)
            if i == 0:
                score_E.append(torch.tensor([float("nan")]))
                teacher_E.append(torch.tensor([float("inf")]))
                list_E.append(place)
                valid_E.append(False)
    flat_E = torch.cat(score_E).requires_grad_()
    arguments = (torch.tensor(list_E), torch.tensor(valid_E), torch.cat(teacher_E), config)
    loss_l = list_losses(flat_E, *arguments, num_lists=8)
    torch.testing.assert_close(loss_l, wanted, rtol=1e-5, atol=1e-6)
    counts_l = lists_that_count(*arguments, num_lists=8)
    assert counts_l.tolist() == [place in (7, 0, 3) or (place == 5 and loss == "binary") for place in range(8)]
    loss_l.sum().backward()
    assert flat_E.grad is not None
    assert flat_E.grad.isfinite().all()
    is_used_E = torch.tensor(valid_E) & counts_l[torch.tensor(list_E)]
    assert (flat_E.grad[~is_used_E] == 0).all()
    assert (flat_E.grad[is_used_E] != 0).all()


def test_an_entry_without_a_teacher_is_left_out() -> None:
    score_E, teacher_E = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([2.0, float("nan"), 1.0])
    list_E, valid_E = torch.zeros(3, dtype=torch.int64), torch.ones(3).bool()
    for loss in ("margin_mse", "listwise_distillation"):
        config = section(loss)
        kept = REFERENCES[loss](score_E[None, ::2], teacher_E[None, ::2], config)
        torch.testing.assert_close(
            list_losses(score_E, list_E, valid_E, teacher_E, config, num_lists=1)[0], kept, rtol=1e-5, atol=1e-6
        )
        with pytest.raises(ValueError, match="needs the teacher's scores"):
            list_losses(score_E, list_E, valid_E, None, config, num_lists=1)


def test_scores_in_half_precision_and_far_apart_are_taken_in_fp32() -> None:
    score_E = torch.tensor([-300.0, 300.0, 200.0], dtype=torch.bfloat16, requires_grad=True)
    config = section("listwise", activation_fn="identity")
    list_E, valid_E = torch.zeros(3, dtype=torch.int64), torch.ones(3).bool()
    loss_l = list_losses(score_E, list_E, valid_E, None, config, num_lists=1)
    assert loss_l.dtype == torch.float32
    assert loss_l.item() == pytest.approx(6000.0)
    loss_l.sum().backward()
    assert score_E.grad is not None and score_E.grad.tolist() == [-10.0, 10.0, 0.0]
