"""Exact search: against a full sort, with ties, truncation, odd block sizes and every input that must be refused."""

import pytest
import torch
from sentence_transformers.util import cos_sim, truncate_embeddings

from farnear.retrieve.search import _keys, _scores_of, top_k


def _embeddings(queries: int, pages: int, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + pages)
    return torch.randn(queries, dim, generator=generator), torch.randn(pages, dim, generator=generator)


def _by_full_sort(score_QP: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow reference: a stable sort keeps the lower page first among equal scores."""
    score_QP, page_QP = score_QP.sort(dim=1, descending=True, stable=True)
    return score_QP[:, :k], page_QP[:, :k]


@pytest.mark.parametrize("dim", [None, 24, 8, 1])
@pytest.mark.parametrize("tile", [(256, 8192), (3, 64), (1, 1), (17, 128)])
def test_agrees_with_a_full_sort_of_sentence_transformers_similarity(dim: int | None, tile: tuple[int, int]) -> None:
    query_QD, page_PD = _embeddings(17, 301)
    expected_score, expected_page = _by_full_sort(
        cos_sim(truncate_embeddings(query_QD, dim), truncate_embeddings(page_PD, dim)), 10
    )
    score_Qk, page_Qk = top_k(query_QD, page_PD, 10, dim=dim, tile=tile)
    assert score_Qk.dtype == torch.float32
    assert page_Qk.dtype == torch.int64
    torch.testing.assert_close(score_Qk, expected_score, rtol=0, atol=1e-6)
    if dim != 1:  # one component leaves only the scores 1 and -1, where rounding may part what is equal
        assert torch.equal(page_Qk, expected_page)


def test_equal_scores_go_to_the_lower_page() -> None:
    # Unit vectors along axes: every score is exactly 1, 0 or -1.
    page_PD = torch.tensor([[-1.0, 0], [0, 1], [1, 0], [0, -1], [1, 0], [0, 1], [-1, 0], [1, 0]])
    query_QD = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    score_Qk, page_Qk = top_k(query_QD, page_PD, 8)
    assert page_Qk.tolist() == [[2, 4, 7, 1, 3, 5, 0, 6], [1, 5, 0, 2, 4, 6, 7, 3], [0, 6, 1, 3, 5, 2, 4, 7]]
    assert score_Qk[0].tolist() == [1, 1, 1, 0, 0, 0, -1, -1]
    assert top_k(query_QD, page_PD, 2)[1].tolist() == [[2, 4], [1, 5], [0, 6]]


@pytest.mark.parametrize("k", [1, 100, 400])
@pytest.mark.parametrize("tile", [(256, 8192), (2, 64), (1, 1), (3, 128)])
def test_equal_scores_are_ordered_over_blocks(tile: tuple[int, int], k: int) -> None:
    axis_P = torch.randint(4, (333,), generator=torch.Generator().manual_seed(5))
    page_PD, query_QD = torch.eye(4)[axis_P], torch.eye(4) - 2 * torch.eye(4)[[1, 0, 3, 2]]
    _, expected_page = _by_full_sort(cos_sim(query_QD, page_PD), k)
    assert torch.equal(top_k(query_QD, page_PD, k, tile=tile)[1], expected_page)


@pytest.mark.parametrize("pages", [7, 65, 130, 1001])
def test_a_page_stored_twice_ties_with_itself_wherever_it_lies(pages: int) -> None:
    query_QD, page_PD = _embeddings(50, pages, dim=100)
    copies = [1, pages // 2, pages - 1]
    page_PD[copies] = page_PD[1].clone()
    score_Qk, page_Qk = top_k(page_PD[1] + 0.1 * query_QD, page_PD, 3, tile=(256, 512))
    assert page_Qk.tolist() == [copies] * 50
    assert torch.equal(score_Qk[:, 0], score_Qk[:, 2])


def test_zero_and_minus_zero_are_equal_scores() -> None:
    key_12 = _keys(torch.tensor([[-0.0, 0.0]]), first_page=5)
    assert key_12[0, 0] > key_12[0, 1], "the lower page first"
    assert _scores_of(key_12).tolist() == [[0, 0]]


def test_k_larger_than_the_corpus_is_clipped() -> None:
    query_QD, page_PD = _embeddings(3, 4)
    score_Qk, page_Qk = top_k(query_QD, page_PD, 10)
    assert score_Qk.shape == page_Qk.shape == (3, 4)
    assert sorted(page_Qk[0].tolist()) == [0, 1, 2, 3]
    assert top_k(query_QD[:0], page_PD, 10)[1].shape == (0, 4)
    assert top_k(query_QD, page_PD[:0], 10)[1].shape == (3, 0)


def test_length_does_not_matter_and_a_zero_vector_scores_zero() -> None:
    query_QD, page_PD = _embeddings(5, 9)
    scale_P = torch.arange(1, 10).unsqueeze(1) * 100.0
    assert torch.equal(top_k(query_QD, page_PD, 9)[1], top_k(query_QD * 7, page_PD * scale_P, 9)[1])
    assert top_k(query_QD * 0, page_PD, 2)[0].tolist() == [[0, 0]] * 5


def test_scores_in_fp32_whatever_surrounds_the_call() -> None:
    query_QD, page_PD = _embeddings(8, 300, dim=256)
    expected = top_k(query_QD, page_PD, 10)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            score_Qk, page_Qk = top_k(query_QD, page_PD, 10)
        assert matmul.fp32_precision == "bf16", "the caller's precision must come back"
    finally:
        matmul.fp32_precision = before
    assert torch.equal(score_Qk, expected[0])
    assert torch.equal(page_Qk, expected[1])
    half_score, _ = top_k(query_QD.bfloat16(), page_PD.bfloat16(), 10)
    assert half_score.dtype == torch.float32


def test_leaves_no_graph_behind() -> None:
    query_QD, page_PD = _embeddings(2, 3)
    assert not top_k(query_QD.requires_grad_(), page_PD, 1)[0].requires_grad


def test_refuses_what_it_cannot_rank() -> None:
    query_QD, page_PD = _embeddings(4, 6)
    with pytest.raises(ValueError, match=r"queries \(4, 24\) and pages \(6, 20\)"):
        top_k(query_QD, page_PD[:, :20], 3)
    with pytest.raises(ValueError, match="k is 0"):
        top_k(query_QD, page_PD, 0)
    for dim in (0, 25):
        with pytest.raises(ValueError, match=f"dim is {dim}, but the embeddings have 24"):
            top_k(query_QD, page_PD, 3, dim=dim)
    page_PD[2, 5] = float("nan")
    page_PD[4, 0] = float("inf")
    with pytest.raises(ValueError, match="2 embeddings of pages hold NaN or infinity"):
        top_k(query_QD, page_PD, 3)
    query_QD[1] = float("nan")
    with pytest.raises(ValueError, match="1 embeddings of queries"):
        top_k(query_QD, page_PD, 3)
