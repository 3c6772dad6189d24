"""Exact search: against a full sort, with ties, truncation, odd block sizes and every input that must be refused."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.util import cos_sim, truncate_embeddings

from farnear.errors import UserError
from farnear.retrieve.search import RUN, _key, _scores_of, faiss_search, top_k


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
    key_12 = _key(torch.tensor([[-0.0, 0.0]]), torch.tensor([[5, 6]]))
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


@pytest.mark.parametrize("k", [1, 31, 100, 700])
@pytest.mark.parametrize("tile", [(64, 64), (64, 1024), (256, 16384)])
def test_the_same_bits_as_all_scores_at_once(k: int, tile: tuple[int, int]) -> None:
    """Pages in falling, rising and random order of likeness, and many that score alike: every way through a tile."""
    generator = torch.Generator().manual_seed(2)
    page_PD = torch.randn(1500, 24, generator=generator).mul(4).round() / 4
    page_PD[200:230] = page_PD[900:930]
    page_PD[1000:1100] = page_PD[1000]
    query_QD = torch.randn(70, 24, generator=generator)
    by_first = page_PD[:, 0].argsort(stable=True)
    for order in (torch.arange(1500), by_first, by_first.flip(0)):
        pages = page_PD[order]
        score_Qk, page_Qk = top_k(query_QD, pages, k, tile=tile)
        every_QP, page_QP = top_k(query_QD, pages, 1500, tile=tile)
        assert torch.equal(score_Qk, every_QP[:, :k])
        assert torch.equal(page_Qk, page_QP[:, :k])
        score_QP = torch.empty_like(every_QP).scatter_(1, page_QP, every_QP)
        assert torch.equal(page_QP, _by_full_sort(score_QP, 1500)[1])
        torch.testing.assert_close(score_QP, cos_sim(query_QD, pages), rtol=0, atol=1e-6)


def test_reads_pages_from_a_disk_block_by_block(tmp_path: Path) -> None:
    query_QD, page_PD = _embeddings(20, 500)
    np.save(tmp_path / "pages.npy", page_PD.numpy())

    class Watched:
        """Tells which rows are read."""

        def __init__(self) -> None:
            self.rows: list[slice] = []
            self.pages = np.load(tmp_path / "pages.npy", mmap_mode="r")
            self.shape, self.ndim = self.pages.shape, 2

        def __len__(self) -> int:
            return len(self.pages)

        def __getitem__(self, rows: slice) -> Any:
            self.rows.append(rows)
            return self.pages[rows]

    watched = Watched()
    found = top_k(query_QD.numpy(), watched, 7, tile=(64, 128))
    assert [(rows.start, rows.stop) for rows in watched.rows] == [(0, 128), (128, 256), (256, 384), (384, 512)]
    for one, other in zip(found, top_k(query_QD, page_PD, 7, tile=(64, 128)), strict=True):
        assert torch.equal(one, other)


def test_faiss_is_asked_for_the_same_and_missed_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class IndexFlatIP:
        def __init__(self, dim: int) -> None:
            self.page_PD = np.zeros((0, dim), np.float32)

        def add(self, page_PD: Any) -> None:
            self.page_PD = np.concatenate([self.page_PD, page_PD])

        def search(self, query_QD: Any, k: int) -> Any:
            score_QP = query_QD @ self.page_PD.T
            # Equal scores in the order that is not wanted.
            page_Qk = score_QP.shape[1] - 1 - np.argsort(-score_QP[:, ::-1], axis=1, kind="stable")[:, :k]
            return np.take_along_axis(score_QP, page_Qk, axis=1), page_Qk

    query_QD, page_PD = _embeddings(9, 100)
    page_PD[50:] = page_PD[:50]
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=IndexFlatIP))
    score_Qk, page_Qk = faiss_search(page_PD.numpy(), block=33)(query_QD.numpy(), 10)
    expected = top_k(query_QD, page_PD, 10)
    torch.testing.assert_close(score_Qk, expected[0], rtol=0, atol=1e-6)
    assert torch.equal(page_Qk, expected[1])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"mining.use_faiss is set, but FAISS cannot be imported.*install faiss-cpu"):
        faiss_search(page_PD.numpy())


@pytest.mark.parametrize("k", [1, 2, 20, 64])
def test_the_bound_of_the_first_tile_is_tight(k: int) -> None:
    """Every run of columns holds one near page and else far ones, so that the k best are k runs' largest."""
    page_PD = torch.tensor([[-1.0, 0.0]]).repeat(64 * RUN, 1)
    angle_r = torch.linspace(0.1, 1.0, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    near_r = torch.arange(64) * RUN + torch.arange(64) % RUN
    page_PD[near_r] = torch.stack([angle_r.cos(), angle_r.sin()], dim=1)
    _, page_Qk = top_k(torch.tensor([[1.0, 0.0]]), page_PD, k)
    assert page_Qk[0].tolist() == near_r[angle_r.argsort()][:k].tolist()
