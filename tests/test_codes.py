"""int8 and binary pages: the codes against sentence-transformers', the searches against plain ones over all scores."""

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings, truncate_embeddings

from farnear.retrieve.codes import BinaryRows, Int8Rows, binary_codes, int8_codes, unit_prefix, value_ranges
from farnear.retrieve.flat_index import flat_index

DIMS = (96, 64, 24)


def _embeddings(queries: int = 30, pages: int = 517, dim: int = 96) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(7)
    page_PD = torch.randn(pages, dim, generator=generator)
    page_PD[:, 3] = 0.25  # a component that tells nothing
    page_PD[400] = page_PD[2]
    query_QD = page_PD[torch.randint(pages, (queries,), generator=generator)]
    return (query_QD + torch.randn(queries, dim, generator=generator)).numpy(), page_PD.numpy()


def _unit(page_PD: np.ndarray, dim: int) -> np.ndarray:
    return torch.nn.functional.normalize(truncate_embeddings(torch.from_numpy(page_PD), dim), dim=1).numpy()


@pytest.mark.parametrize("dim", DIMS)
def test_codes_are_those_of_sentence_transformers(dim: int) -> None:
    _, page_PD = _embeddings()
    unit_Pd = unit_prefix(page_PD, dim)
    np.testing.assert_allclose(unit_Pd, _unit(page_PD, dim), atol=1e-7)
    ranges = value_ranges(page_PD, dim)
    np.testing.assert_array_equal(int8_codes(unit_Pd, ranges), quantize_embeddings(unit_Pd, "int8", ranges=ranges))
    np.testing.assert_array_equal(int8_codes(unit_Pd, ranges), quantize_embeddings(unit_Pd, "int8"))
    np.testing.assert_array_equal(binary_codes(unit_Pd), quantize_embeddings(unit_Pd, "binary"))


def test_codes_stand_for_their_rows() -> None:
    _, page_PD = _embeddings()
    unit_Pd, ranges = unit_prefix(page_PD, 64), value_ranges(page_PD, 64)
    half_a_step = (ranges[1] - ranges[0]) / 255 / 2
    meant_Pd = Int8Rows(int8_codes(unit_Pd, ranges), ranges)[:]
    # The largest value of a component is the end of the last step and stands for its middle.
    assert (np.abs(meant_Pd - unit_Pd) <= half_a_step * 2.01 + 1e-6).all()
    assert np.median(np.abs(meant_Pd - unit_Pd) / half_a_step.clip(min=1e-9)) < 1
    np.testing.assert_array_equal(BinaryRows(binary_codes(unit_Pd), 64)[10:20], np.where(unit_Pd > 0, 1, -1)[10:20])


@pytest.mark.parametrize("dim", DIMS)
def test_the_search_among_int8_pages_ranks_by_what_they_stand_for(dim: int) -> None:
    query_QD, page_PD = _embeddings()
    index = flat_index(page_PD, dim, "int8")
    ranges = value_ranges(page_PD, dim)
    meant_Pd = torch.from_numpy(Int8Rows(int8_codes(unit_prefix(page_PD, dim), ranges), ranges)[:])
    query_Qd = torch.from_numpy(unit_prefix(query_QD, dim))
    score_QP = query_Qd @ meant_Pd.T
    score_Qk, page_Qk = index.search(query_Qd.numpy(), 20)
    torch.testing.assert_close(score_Qk, score_QP.sort(dim=1, descending=True).values[:, :20], rtol=0, atol=1e-5)
    torch.testing.assert_close(score_QP.gather(1, page_Qk), score_Qk, rtol=0, atol=1e-5)
    assert index.nbytes == len(page_PD) * dim


@pytest.mark.parametrize("dim", DIMS)
def test_the_search_among_binary_pages_ranks_by_signs_that_differ_then_by_page(dim: int) -> None:
    query_QD, page_PD = _embeddings()
    index = flat_index(page_PD, dim, "binary")
    differing_QP = ((query_QD[:, None, :dim] > 0) != (page_PD[None, :, :dim] > 0)).sum(axis=2)
    expected_Qk = np.argsort(differing_QP, axis=1, kind="stable")[:, :20]
    score_Qk, page_Qk = index.search(unit_prefix(query_QD, dim), 20)
    np.testing.assert_array_equal(page_Qk.numpy(), expected_Qk)
    np.testing.assert_array_equal(score_Qk.numpy(), dim - 2 * np.take_along_axis(differing_QP, expected_Qk, axis=1))
    assert index.nbytes == len(page_PD) * dim // 8


@pytest.mark.parametrize("multiplier", [2, 4, 100])
def test_rescoring_orders_the_candidates_by_the_query_itself(multiplier: int) -> None:
    query_QD, page_PD = _embeddings()
    query_Qd = unit_prefix(query_QD, 64)
    index = flat_index(page_PD, 64, "binary", multiplier)
    _, page_Qk = index.search(query_Qd, 10)
    differing_QP = ((query_QD[:, None, :64] > 0) != (page_PD[None, :, :64] > 0)).sum(axis=2)
    sign_Pd = np.where(page_PD[:, :64] > 0, 1, -1)
    for query, found in enumerate(page_Qk.tolist()):
        candidates = np.sort(np.argsort(differing_QP[query], kind="stable")[: 10 * multiplier])
        score_c = sign_Pd[candidates].astype(np.float32) @ query_Qd[query]
        assert found == candidates[np.argsort(-score_c, kind="stable")][:10].tolist()
    twice = flat_index(page_PD, 64, "binary", multiplier).search(unit_prefix(page_PD[[2]], 64), 10)[1]
    assert twice[0, :2].tolist() == [2, 400], "a page that is stored twice: the lower one first"
    plain = flat_index(page_PD, 64, "binary").search(query_Qd, 10)[1]
    assert not torch.equal(plain, page_Qk), "the order of the signs is another one"


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("multiplier", [1, 4])
def test_a_query_that_comes_alone_finds_what_it_finds_among_others(precision: str, multiplier: int) -> None:
    query_QD, page_PD = _embeddings()
    page_PD = np.delete(page_PD, 400, axis=0)  # a page twice would be a tie, which `alone` leaves open
    query_Qd = unit_prefix(query_QD, 64)
    index = flat_index(page_PD, 64, precision, multiplier)  # type: ignore[arg-type]
    score_Qk, page_Qk = index.search(query_Qd, 10)
    for query in range(len(query_Qd)):
        alone = index.alone(query_Qd[query], 10)
        if precision != "binary":
            assert alone.tolist() == page_Qk[query].tolist()
        elif multiplier == 1:  # many pages differ in as many signs
            differing = (query_QD[query, :64] > 0) != (page_PD[alone, :64] > 0)
            assert (64 - 2 * differing.sum(axis=1)).tolist() == score_Qk[query].tolist()
