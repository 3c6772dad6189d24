"""The tiled loss with its written-out gradient, against a dense one by autograd and sentence-transformers' own."""

from typing import Any

import pytest
import torch
from dense_loss import dense_loss, is_masked
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn

from farnear.loss.contrastive import LossGradient, contrastive_gradient, needs_all_queries
from farnear.loss.false_negatives import BatchFacts, false_negatives
from farnear.sections import LossConfig

SYMMETRIC = ("query_to_doc", "doc_to_query")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"matryoshka_dims": (24, 12, 5), "matryoshka_weights": (1.0, 0.3, 2.0)},
    {"directions": SYMMETRIC, "partition_mode": "per_direction"},
    {"directions": SYMMETRIC, "partition_mode": "joint", "matryoshka_dims": (24, 8)},
    {"directions": ALL, "matryoshka_dims": (24, 8)},
    {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    {"hardness_mode": "hard_negatives", "hardness_strength": 5.0, "matryoshka_dims": (24, 8)},
    {"hardness_mode": "all_negatives", "hardness_strength": 5.0, "directions": ALL},
    {"margin": 0.2},
    {"margin": 0.1, "margin_strategy": "relative", "directions": ALL, "matryoshka_dims": (24, 8)},
    {"margin": 0.0, "hardness_mode": "all_negatives", "hardness_strength": 5.0},
]


class Passing(nn.Module):
    """A 'model' whose embeddings are its inputs, so that another library's loss can be asked about given tensors."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)


def plain_facts(pairs: int, negatives: int = 0) -> BatchFacts:
    """Nothing twice; documents are all positives, then each pair's first negative, then each pair's second, ..."""
    return BatchFacts(
        query_hash_B=torch.arange(pairs) + 100,
        pair_valid_B=torch.ones(pairs, dtype=torch.bool),
        answers_Bm=torch.arange(pairs)[:, None],
        positive_B=torch.arange(pairs),
        page_hash_N=torch.arange(pairs * (1 + negatives)),
        owner_N=torch.arange(pairs).repeat(1 + negatives),
        page_valid_N=torch.ones(pairs * (1 + negatives), dtype=torch.bool),
    )


def awkward_facts(generator: torch.Generator) -> BatchFacts:
    """9 pairs on three ranks, with duplicates, further answers, hard negatives and quarantined places."""
    positive_B = torch.tensor([0, 1, 2, 5, 6, 7, 10, 11, 12])
    owner_N = torch.tensor([0, 1, 2, 0, 2, 3, 4, 5, 3, 3, 6, 7, 8])
    page_hash_N = torch.randint(0, 10, (13,), generator=generator)
    answers = torch.randint(0, 10, (9, 2), generator=generator)
    answers_Bm = torch.cat([page_hash_N[positive_B][:, None], answers], 1)
    pair_valid_B = torch.ones(9, dtype=torch.bool)
    pair_valid_B[torch.randint(0, 9, (2,), generator=generator)] = False
    page_valid_N = pair_valid_B[owner_N].clone()
    page_valid_N[3] = False
    query_hash_B = torch.randint(0, 12, (9,), generator=generator)
    return BatchFacts(query_hash_B, pair_valid_B, answers_Bm, positive_B, page_hash_N, owner_N, page_valid_N)


def gradient_of_rows(
    q_BD: Tensor, k_ND: Tensor, facts: BatchFacts, rows: slice, weight_b: Tensor, loss: LossConfig, **options: Any
) -> LossGradient:
    every = q_BD if needs_all_queries(loss) else None
    return contrastive_gradient(q_BD[rows], k_ND, every, facts, rows, weight_b, loss, scale=loss.scale, **options)


@pytest.mark.parametrize("tile_bytes", [1, 4000, 1 << 20], ids=["row by row", "small tiles", "one tile"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_gradient_is_the_dense_one(objective: dict[str, Any], tile_bytes: int) -> None:
    loss = LossConfig(scale=8.0, **objective)
    generator = torch.Generator().manual_seed(len(str(objective)))
    facts = awkward_facts(generator)
    rows = slice(3, 6)
    weight_b = torch.where(facts.pair_valid_B[rows], 0.4, 0.0)
    assert weight_b.any()
    q_BD, k_ND = torch.randn(9, 24, generator=generator), torch.randn(13, 24, generator=generator)
    leaves = q_BD.double().requires_grad_(), k_ND.double().requires_grad_()
    log_scale = torch.tensor(loss.scale, dtype=torch.float64).log().requires_grad_()
    dense = dense_loss(*leaves, facts, rows, weight_b.double(), loss, log_scale.exp())
    dense.backward()

    mine = gradient_of_rows(q_BD, k_ND, facts, rows, weight_b, loss, tile_bytes=tile_bytes)
    assert torch.allclose((mine.loss_b * weight_b).sum().double(), dense, rtol=1e-5)
    dq_BD = torch.zeros_like(q_BD) if mine.dq_BD is None else mine.dq_BD.clone()
    dq_BD[rows] += mine.dq_bD
    for ours, leaf in ((dq_BD, leaves[0]), (mine.dk_ND, leaves[1]), (mine.dlog_scale, log_scale)):
        assert leaf.grad is not None
        assert leaf.grad.norm() > 1e-3
        assert torch.linalg.vector_norm(ours - leaf.grad) <= 2e-6 * leaf.grad.norm().clamp_min(0.1)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("objective", [one for one in OBJECTIVES if "margin" not in one], ids=str)
def test_agrees_with_sentence_transformers(objective: dict[str, Any], negatives: int) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(6, 24, generator=generator) for _ in range(2 + negatives)]
    leaves = [x.clone().requires_grad_() for x in columns]
    options = {name: value for name, value in objective.items() if not name.startswith("matryoshka")}
    model = SentenceTransformer(modules=[Passing()], device="cpu")
    theirs: nn.Module = MultipleNegativesRankingLoss(model, scale=20.0, **options)
    if "matryoshka_dims" in objective:
        weights = objective.get("matryoshka_weights")
        theirs = MatryoshkaLoss(model, theirs, list(objective["matryoshka_dims"]), list(weights) if weights else None)
    expected = theirs([{"sentence_embedding": x} for x in leaves], torch.arange(6))
    expected.backward()

    k_ND = torch.cat(columns[1:])
    weight_b = torch.full((6,), 1 / 6)
    loss = LossConfig(**objective)
    mine = gradient_of_rows(columns[0], k_ND, plain_facts(6, negatives), slice(0, 6), weight_b, loss)
    assert torch.allclose(mine.loss_b.mean(), expected, rtol=1e-5)
    dq_bD = mine.dq_bD if mine.dq_BD is None else mine.dq_bD + mine.dq_BD
    for ours, leaf in zip([dq_bD, *mine.dk_ND.split(6)], leaves, strict=True):
        assert leaf.grad is not None
        assert torch.linalg.vector_norm(ours - leaf.grad) <= 2e-6 * leaf.grad.norm()


def test_ranks_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    facts = awkward_facts(generator)
    loss = LossConfig(directions=ALL, matryoshka_dims=(24, 8))
    q_BD, k_ND = torch.randn(9, 24, generator=generator), torch.randn(13, 24, generator=generator)
    weight_B = facts.pair_valid_B / 7.0
    whole = gradient_of_rows(q_BD, k_ND, facts, slice(0, 9), weight_B, loss)
    assert whole.dq_BD is not None
    parts = [slice(0, 2), slice(2, 2), slice(2, 9)]
    of_ranks = [
        gradient_of_rows(q_BD, k_ND, facts, rows, weight_B[rows], loss) for rows in parts if rows.start < rows.stop
    ]
    assert torch.allclose(sum(part.dk_ND for part in of_ranks), whole.dk_ND, atol=1e-6)
    dq_BD = torch.cat([part.dq_bD for part in of_ranks]) + sum(part.dq_BD for part in of_ranks)
    assert torch.allclose(dq_BD, whole.dq_bD + whole.dq_BD, atol=1e-6)
    assert sum(part.masked for part in of_ranks) == whole.masked


@pytest.mark.parametrize("direction", ALL)
@pytest.mark.parametrize("seed", range(4))
def test_the_masked_places_are_those_found_by_comparing_all(direction: Any, seed: int) -> None:
    facts = awkward_facts(torch.Generator().manual_seed(seed))
    columns = len(facts.query_hash_B if direction.endswith("query") else facts.page_hash_N)
    valid_c = facts.pair_valid_B if direction.endswith("query") else facts.page_valid_N
    rows = slice(2, 8)
    mask_bc = torch.zeros(6, columns, dtype=torch.bool)
    found = false_negatives(direction, facts, rows)
    for tile in (slice(0, 4), slice(4, 6)):
        mask_bc[tile][found.of_rows(tile)] = True
    by_hand = torch.tensor([[is_masked(direction, i, j, facts) for j in range(columns)] for i in range(2, 8)])
    assert torch.equal(mask_bc & valid_c, by_hand & valid_c)
    assert by_hand.any()
    assert not by_hand.all()


def test_what_is_masked() -> None:
    # Pairs 0 and 2 show one page; pairs 1 and 3 ask one query; column 4 is a hard negative of pair 0 with pair 1's
    # page; column 5 is pair 2's and another answer to query 0; pair 3's place holds no valid pair.
    facts = BatchFacts(
        query_hash_B=torch.tensor([1, 2, 3, 2]),
        pair_valid_B=torch.tensor([True, True, True, False]),
        answers_Bm=torch.tensor([[10, 99], [11, 11], [10, 10], [13, 13]]),
        positive_B=torch.arange(4),
        page_hash_N=torch.tensor([10, 11, 10, 13, 11, 99]),
        owner_N=torch.tensor([0, 1, 2, 3, 0, 2]),
        page_valid_N=torch.tensor([True, True, True, False, True, True]),
    )
    expected = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    mask_bN = torch.zeros(4, 6, dtype=torch.bool)
    mask_bN[false_negatives("query_to_doc", facts, slice(0, 4)).of_rows(slice(0, 4))] = True
    assert torch.equal(mask_bN, expected)
    # Counted are those of rows that count and of columns that hold something: not pair 3's, nor in its column.
    q_BD, k_ND = torch.randn(4, 8), torch.randn(6, 8)
    weight_b = facts.pair_valid_B / 3.0
    assert gradient_of_rows(q_BD, k_ND, facts, slice(0, 4), weight_b, LossConfig()).masked == 4


def test_an_invalid_row_and_an_invalid_column_leave_no_trace() -> None:
    facts = plain_facts(4)
    facts.pair_valid_B[2] = facts.page_valid_N[2] = False
    q_BD, k_ND = torch.randn(4, 8), torch.randn(4, 8)
    loss = LossConfig(directions=ALL)
    mine = gradient_of_rows(q_BD, k_ND, facts, slice(0, 4), facts.pair_valid_B.float(), loss)
    assert mine.dq_BD is not None
    assert not mine.dk_ND[2].any() and not mine.dq_bD[2].any() and not mine.dq_BD[2].any()
    kept = torch.tensor([0, 1, 3])
    without = gradient_of_rows(q_BD[kept], k_ND[kept], plain_facts(3), slice(0, 3), torch.ones(3), loss)
    assert torch.allclose(mine.loss_b[kept], without.loss_b)
    assert torch.allclose(mine.dk_ND[kept], without.dk_ND, atol=1e-6)


def test_a_batch_without_any_valid_pair_gives_zeros_and_not_nan() -> None:
    facts = plain_facts(3)
    facts.pair_valid_B[:] = facts.page_valid_N[:] = False
    mine = gradient_of_rows(torch.randn(3, 8), torch.randn(3, 8), facts, slice(0, 3), torch.zeros(3), LossConfig())
    assert not mine.dq_bD.any() and not mine.dk_ND.any()
    assert mine.loss_b.isfinite().all()


@pytest.mark.parametrize("scale", [0.5, 100.0, 1000.0])
def test_extreme_scales_neither_overflow_nor_lose_the_loss(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q_BD, k_ND = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    # Every positive is as far from its query as can be.
    k_ND[:] = -q_BD
    loss, facts = LossConfig(scale=scale), plain_facts(5)
    mine = gradient_of_rows(q_BD, k_ND, facts, slice(0, 5), torch.ones(5), loss)
    dense = dense_loss(
        q_BD.double(), k_ND.double(), facts, slice(0, 5), torch.ones(5).double(), loss, torch.tensor(scale).double()
    )
    assert torch.allclose(mine.loss_b.sum().double(), dense, rtol=1e-5)


def test_an_embedding_of_zeros_has_a_finite_gradient() -> None:
    q_BD, k_ND = torch.randn(3, 8), torch.randn(3, 8)
    q_BD[1] = k_ND[2] = 0.0
    mine = gradient_of_rows(q_BD, k_ND, plain_facts(3), slice(0, 3), torch.ones(3), LossConfig())
    assert mine.dq_bD.isfinite().all() and mine.dk_ND.isfinite().all()


def test_the_margin_looks_at_cosines_and_not_at_what_hardness_makes_of_them() -> None:
    q_BD, k_ND = torch.eye(2), torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    options = {"margin": 0.05, "hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}
    mine = gradient_of_rows(q_BD, k_ND, plain_facts(2), slice(0, 2), torch.ones(2), LossConfig(**options))
    assert mine.beyond_margin == 0 and (mine.loss_b > 1.0).all()


def test_the_margin_counts_what_it_leaves_out() -> None:
    q_BD = torch.eye(3)
    k_ND = torch.tensor([[1.0, 0.9, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    # Query 1 finds page 0 at 0.67 of cosine, within 0.4 of its own page's 1.
    loss = LossConfig(margin=0.4)
    mine = gradient_of_rows(q_BD, k_ND, plain_facts(3), slice(0, 3), torch.ones(3), loss)
    assert mine.beyond_margin == 1
    assert gradient_of_rows(q_BD, k_ND, plain_facts(3), slice(0, 3), torch.ones(3), LossConfig()).beyond_margin == 0
