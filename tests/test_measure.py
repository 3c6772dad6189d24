"""Retrieval measures: against sentence-transformers' evaluator on random rankings, and against figures by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim, truncate_embeddings

from farnear.retrieve.measure import OF_A_RUN, OF_AN_EVALUATION, measure
from farnear.retrieve.search import top_k


def of_ks(*ks: int) -> list[str]:
    return [*(f"ndcg@{k}" for k in ks), *(f"recall@{k}" for k in ks), f"mrr@{max(ks)}"]


class _StoredEmbeddings:
    """What the evaluator asks of a model, answered from tensors: an input is the number of its row."""

    similarity_fn_name = "cosine"
    similarity = staticmethod(cos_sim)
    model_card_data = None

    def __init__(self, query_QD: torch.Tensor, page_PD: torch.Tensor) -> None:
        self.query_QD, self.page_PD = query_QD, page_PD

    def encode_query(self, rows: list[str], truncate_dim: int | None = None, **_: Any) -> torch.Tensor:
        return truncate_embeddings(self.query_QD[[int(row) for row in rows]], truncate_dim)

    def encode_document(self, rows: list[str], truncate_dim: int | None = None, **_: Any) -> torch.Tensor:
        return truncate_embeddings(self.page_PD[[int(row) for row in rows]], truncate_dim)


def _by_sentence_transformers(
    query_QD: torch.Tensor, page_PD: torch.Tensor, relevant: list[set[int]], dim: int | None
) -> dict[str, float]:
    # Ids of equal width: the evaluator breaks ties by the order of the strings.
    evaluator = InformationRetrievalEvaluator(
        queries={f"q{query}": str(query) for query in range(len(query_QD))},
        corpus={f"{page:06d}": str(page) for page in range(len(page_PD))},
        relevant_docs={f"q{query}": {f"{page:06d}" for page in pages} for query, pages in enumerate(relevant)},
        mrr_at_k=[10],
        ndcg_at_k=[1, 5, 10],
        accuracy_at_k=[1],
        precision_recall_at_k=[1, 5, 10, 100],
        map_at_k=[100],
        corpus_chunk_size=64,
        truncate_dim=dim,
    )
    evaluator.score_functions = {"cosine": cos_sim}
    found = evaluator.compute_all_metrics(_StoredEmbeddings(query_QD, page_PD))["cosine"]
    return {
        f"{name}@{k}": float(value)
        for name in ("ndcg", "recall", "mrr", "map")
        for k, value in found[f"{name}@k"].items()
    }


@pytest.mark.parametrize("dim", [None, 32, 16, 4])
@pytest.mark.parametrize("pages", [200, 7])
def test_agrees_with_sentence_transformers(pages: int, dim: int | None) -> None:
    generator = torch.Generator().manual_seed(pages)
    page_PD = torch.randn(pages, 32, generator=generator)
    page_PD[pages // 2] = page_PD[1]  # two stored images of one page
    target_Q = torch.randint(pages, (60,), generator=generator)
    query_QD = page_PD[target_Q] + 1.5 * torch.randn(60, 32, generator=generator)
    # 1, 2, 3 ... relevant pages; with 200 pages some queries have more of them than there are ranks.
    relevant = [
        {int(target)} | {int(page) for page in torch.randint(pages, (query % 14,), generator=generator)}
        for query, target in enumerate(target_Q)
    ]
    _, ranked_Qk = top_k(query_QD, page_PD, 100, dim=dim)
    measured = measure(ranked_Qk, relevant, OF_AN_EVALUATION)
    expected = _by_sentence_transformers(query_QD, page_PD, relevant, dim)
    assert measured == pytest.approx(expected, abs=1e-6)
    assert measure(ranked_Qk[:, :10], relevant) == {name: measured[name] for name in OF_A_RUN}
    assert 0.02 < measured["ndcg@10"] < 0.98, "a test of rankings that are all right or all wrong shows nothing"


def test_one_relevant_page_by_hand() -> None:
    ranked_Qk = np.array([[7, 3, 5, 9], [1, 2, 3, 4], [4, 8, 6, 2]])
    measured = measure(ranked_Qk, [{7}, {3}, {99}], names=of_ks(1, 2, 4))
    assert measured["ndcg@1"] == pytest.approx(1 / 3)
    assert measured["ndcg@2"] == pytest.approx(1 / 3)
    assert measured["ndcg@4"] == pytest.approx((1 + 1 / math.log2(4) + 0) / 3)
    assert measured["recall@1"] == measured["recall@2"] == pytest.approx(1 / 3)
    assert measured["recall@4"] == pytest.approx(2 / 3)
    assert measured["mrr@4"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert set(measured) == {"ndcg@1", "ndcg@2", "ndcg@4", "recall@1", "recall@2", "recall@4", "mrr@4"}


def test_several_relevant_pages_by_hand() -> None:
    # Three relevant pages, found at ranks 2 and 3, the third one not at all.
    measured = measure(torch.tensor([[0, 11, 12, 0, 0]]), [{11, 12, 13}], names=of_ks(1, 2, 5))
    assert measured["ndcg@1"] == 0
    assert measured["ndcg@2"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert measured["ndcg@5"] == pytest.approx((1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3) + 1 / 2))
    assert measured["recall@2"] == pytest.approx(1 / 3)
    assert measured["recall@5"] == pytest.approx(2 / 3)
    assert measured["mrr@5"] == pytest.approx(1 / 2)


def test_average_precision_by_hand() -> None:
    # Hits at ranks 1 and 3; of four relevant pages three could stand among three.
    measured = measure(np.array([[7, 0, 8, 9]]), [{7, 8, 9, 10}], names=["map@3", "map@4"])
    assert measured["map@3"] == pytest.approx((1 + 2 / 3) / 3)
    assert measured["map@4"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 4)


def test_a_measure_that_nobody_knows_is_refused() -> None:
    for name in ("precision@5", "ndcg", "ndcg@0", "ndcg@-1"):
        with pytest.raises(ValueError, match=f"'{name}' is no measure; these are: ndcg@k"):
            measure(np.array([[7]]), [{7}], names=[name])


def test_a_perfect_ranking_scores_one_although_recall_at_one_cannot() -> None:
    measured = measure(torch.tensor([[4, 5, 0]]), [{4, 5}])
    assert measured["ndcg@1"] == measured["ndcg@5"] == measured["ndcg@10"] == measured["mrr@10"] == 1
    assert measured["recall@1"] == 0.5
    assert measured["recall@10"] == 1


def test_the_reciprocal_rank_looks_no_further_than_the_largest_k() -> None:
    ranked_Qk = torch.tensor([[0, 1, 2, 3, 4]])
    assert measure(ranked_Qk, [{4}], names=["mrr@3"])["mrr@3"] == 0
    assert measure(ranked_Qk, [{4}], names=["mrr@5"])["mrr@5"] == pytest.approx(1 / 5)


def test_refuses_queries_that_nothing_can_be_measured_for() -> None:
    with pytest.raises(ValueError, match=r"query 1 has no relevant page \(2 such\)"):
        measure(torch.tensor([[0], [1], [2]]), [{0}, set(), set()])
    with pytest.raises(ValueError, match="2 rankings and 1 sets of relevant pages"):
        measure(torch.tensor([[0], [1]]), [{0}])
    with pytest.raises(ValueError, match="not zero"):
        measure(torch.empty(0, 10, dtype=torch.int64), [])
