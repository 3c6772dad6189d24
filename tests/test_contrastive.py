"""The loss against sentence-transformers' own, and its masks against hand-made cases."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn

from farnear.loss.contrastive import Columns, contrastive_loss, false_negatives


class Passing(nn.Module):
    """A 'model' whose embeddings are its inputs, so that another library's loss can be asked about given tensors."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)


def no_mask(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.bool)


def columns(pages: list[int], queries: list[int], positives: list[bool], valid: list[bool]) -> Columns:
    return Columns(torch.tensor(pages), torch.tensor(queries), torch.tensor(positives), torch.tensor(valid))


@pytest.mark.parametrize(("dims", "weights"), [(None, None), ((32, 16, 8), None), ((32, 8), (1.0, 0.3))])
def test_agrees_with_sentence_transformers(dims: tuple[int, ...] | None, weights: tuple[float, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q_bD, k_bD, negative_bD = (torch.randn(6, 32, generator=generator) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q_bD, k_bD, negative_bD)]
    model = SentenceTransformer(modules=[Passing()], device="cpu")
    theirs: nn.Module = MultipleNegativesRankingLoss(model, scale=20.0)
    if dims is not None:
        theirs = MatryoshkaLoss(model, theirs, list(dims), list(weights) if weights else None)
    expected = theirs([{"sentence_embedding": x} for x in leaves], torch.arange(6))
    expected.backward()

    mine = [x.clone().requires_grad_() for x in (q_bD, k_bD, negative_bD)]
    loss_b = contrastive_loss(
        mine[0], torch.cat(mine[1:]), no_mask(6, 12), 0, scale=20.0, dims=dims, dim_weights=weights
    )
    loss_b.mean().backward()
    assert torch.allclose(loss_b.mean(), expected, rtol=1e-6)
    for ours, other in zip(mine, leaves, strict=True):
        assert ours.grad is not None
        assert other.grad is not None
        assert torch.allclose(ours.grad, other.grad, atol=1e-7)


def test_offset_is_where_the_rows_positives_stand() -> None:
    q_bD, k_ND = torch.randn(3, 8), torch.randn(9, 8)
    loss_b = contrastive_loss(q_bD, k_ND, no_mask(3, 9), 4, scale=5.0)
    shifted = contrastive_loss(q_bD, k_ND.roll(-4, 0), no_mask(3, 9), 0, scale=5.0)
    assert torch.allclose(loss_b, shifted)
    assert not torch.allclose(loss_b, contrastive_loss(q_bD, k_ND, no_mask(3, 9), 3, scale=5.0))


def test_a_masked_column_is_as_good_as_absent() -> None:
    q_bD, k_ND = torch.randn(2, 8), torch.randn(5, 8)
    mask = no_mask(2, 5)
    mask[:, 3] = True
    assert torch.allclose(
        contrastive_loss(q_bD, k_ND, mask, 0, scale=20.0),
        contrastive_loss(q_bD, k_ND[[0, 1, 2, 4]], no_mask(2, 4), 0, scale=20.0),
    )


def test_what_is_masked() -> None:
    # Pairs 0 and 2 show one page; pairs 1 and 3 ask one query; column 4 is a hard negative with pair 1's page;
    # column 5 is a hard negative that says nothing of queries; pair 3's place holds no valid pair.
    facts = columns(
        pages=[10, 11, 10, 13, 11, 99],
        queries=[1, 2, 3, 2, 0, 1],
        positives=[True, True, True, True, False, False],
        valid=[True, True, True, False, True, True],
    )
    expected = torch.tensor(
        [
            [0, 0, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [1, 0, 0, 1, 0, 0],
            [0, 1, 0, 0, 0, 0],
        ]
    ).bool()
    own_b1 = facts.page_hash_N[:4, None]
    assert torch.equal(false_negatives(facts, slice(0, 4), own_b1), expected)
    assert torch.equal(false_negatives(facts, slice(2, 4), own_b1[2:]), expected[2:])
    # Another answer to query 0 stands there as a hard negative, and pair 2 has pair 1's page for a second answer.
    answers_b2 = torch.tensor([[10, 99], [11, 11], [10, 11], [13, 13]])
    expected[0, 5] = expected[2, 1] = expected[2, 4] = True
    assert torch.equal(false_negatives(facts, slice(0, 4), answers_b2), expected)


def test_bf16_embeddings_are_scored_in_fp32() -> None:
    q_bD, k_ND = torch.randn(4, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    loss_b = contrastive_loss(q_bD, k_ND, no_mask(4, 4), 0, scale=20.0)
    assert loss_b.dtype == torch.float32
    assert torch.allclose(loss_b, contrastive_loss(q_bD.float(), k_ND.float(), no_mask(4, 4), 0, scale=20.0))
