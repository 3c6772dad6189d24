"""A teacher's scores in an embedder's loss: from the file of the negatives to the gradient, on any number of ranks."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_loss import dense_distillation, dense_loss
from mined_shards import page_tokens, write_shards
from ranks import run_ranks
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss, MatryoshkaLoss
from sentence_transformers.util import pairwise_cos_sim
from tar_makers import number_of_image
from test_contrastive import Passing
from tiny_runs import make_inputs, run_config
from torch import Tensor, nn

import farnear
from farnear.config import RunConfig
from farnear.data.batch import RankBatch
from farnear.data.dealing import SIDES, Dealing
from farnear.data.document_names import DocumentNames, shard_names
from farnear.data.negatives_file import read_negatives
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.data.read import InputReader
from farnear.errors import UserError
from farnear.loss.distillation import TaughtLists, distillation_gradient
from farnear.loss.false_negatives import BatchFacts
from farnear.parallel.world import World, start_world, stop_world
from farnear.sections import LossConfig
from farnear.training.gradient_check import check_gradient
from farnear.training.objective import Sizes, embedding_gradient, gathered_facts, taught_lists
from farnear.training.run import train_in
from farnear.training.shards import open_data

from tar_makers import STORE  # isort: skip

OBJECTIVES: list[dict[str, Any]] = [
    {"distillation": "margin_mse"},
    {"distillation": "listwise_distillation", "distillation_temperature": 2.0},
    {"distillation": "margin_mse", "matryoshka_dims": (12, 24, 5), "matryoshka_weights": (0.3, 1.0, 2.0)},
    {"distillation": "listwise_distillation", "matryoshka_dims": (24, 8)},
]


def drawn(seed: int, pairs: int, documents: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q_bD, k_pD = (torch.randn(n, 24, generator=generator) for n in (pairs, documents))
    return q_bD, k_pD, 4 * torch.randn(documents, generator=generator)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_gradient_is_the_dense_one(objective: dict[str, Any]) -> None:
    loss = LossConfig(scale=8.0, **objective)
    # Pair 0 has three negatives of which one is quarantined, 1 one that the teacher does not know; 2 only such, 3 none,
    # 4 a positive that it does not know, 5 is quarantined itself, and 6 is whole.
    owner_p = torch.tensor([*range(7), 0, 1, 0, 2, 4, 1, 0, 5, 6, 2, 6, 6])
    q_bD, k_pD, teacher_p = drawn(1, 7, len(owner_p))
    valid_p = owner_p != 5
    valid_p[9] = valid_p[16] = False
    teacher_p[[4, 10, 12]] = torch.tensor([float("nan"), float("inf"), float("nan")])
    lists = TaughtLists(owner_p, valid_p, teacher_p, pairs=7)
    assert lists.counts(loss).tolist() == [True, True, False, False, False, False, True]

    facts = BatchFacts(
        query_hash_B=torch.arange(7),
        pair_valid_B=torch.arange(7) != 5,
        answers_Bm=torch.arange(7)[:, None],
        positive_B=torch.arange(7),
        page_hash_N=torch.arange(len(owner_p)),
        owner_N=owner_p,
        page_valid_N=valid_p,
    )
    leaves = q_bD.double().requires_grad_(), k_pD.double().requires_grad_()
    log_scale = torch.tensor(8.0, dtype=torch.float64).log().requires_grad_()
    dense = dense_distillation(*leaves, facts, teacher_p.double(), loss, log_scale.exp())
    dense.backward()
    mine = distillation_gradient(q_bD, k_pD, lists, loss, weight=1 / 3, scale=8.0)
    assert torch.allclose(mine.loss_b.sum().double() / 3, dense, rtol=1e-5)
    for ours, leaf in ((mine.dq_bD, leaves[0]), (mine.dk_pD, leaves[1]), (mine.dlog_scale, log_scale)):
        assert leaf.grad is not None and leaf.grad.norm() > 1e-2
        assert torch.linalg.vector_norm(ours - leaf.grad) <= 5e-6 * leaf.grad.norm()
    counts_p = torch.isin(owner_p, torch.tensor([0, 1, 6])) & valid_p & teacher_p.isfinite()
    assert torch.equal(mine.dk_pD.any(1), counts_p)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_agrees_with_sentence_transformers(objective: dict[str, Any]) -> None:
    pairs, negatives = 5, 3
    q_bD, k_pD, teacher_p = drawn(2, pairs, pairs * (1 + negatives))
    leaves = [q_bD, *k_pD.split(pairs)]
    leaves = [x.clone().requires_grad_() for x in leaves]

    def similarity(one: Tensor, other: Tensor) -> Tensor:
        return 20.0 * pairwise_cos_sim(one, other)

    model = SentenceTransformer(modules=[Passing()], device="cpu")
    loss = LossConfig(**objective)
    temperature = loss.distillation_temperature
    theirs: nn.Module
    if loss.distillation == "margin_mse":
        theirs = MarginMSELoss(model, similarity_fct=similarity)
    else:
        theirs = DistillKLDivLoss(model, similarity_fct=similarity, temperature=temperature)
    if loss.matryoshka_dims:
        weights = list(loss.matryoshka_weights) if loss.matryoshka_weights else None
        theirs = MatryoshkaLoss(model, theirs, list(loss.matryoshka_dims), weights)
    expected = theirs([{"sentence_embedding": x} for x in leaves], teacher_p.view(1 + negatives, pairs).T)
    expected = expected / temperature**2
    expected.backward()

    lists = TaughtLists(
        torch.arange(pairs).repeat(1 + negatives), torch.ones(len(k_pD), dtype=torch.bool), teacher_p, pairs
    )
    mine = distillation_gradient(q_bD, k_pD, lists, loss, weight=1 / pairs, scale=20.0)
    assert torch.allclose(mine.loss_b.mean(), expected, rtol=1e-5)
    for ours, leaf in zip([mine.dq_bD, *mine.dk_pD.split(pairs)], leaves, strict=True):
        assert leaf.grad is not None and leaf.grad.norm() > 1e-2
        assert torch.linalg.vector_norm(ours - leaf.grad) <= 5e-6 * leaf.grad.norm()


def test_nothing_to_learn_from_and_an_embedding_of_zeros_give_zeros_and_not_nan() -> None:
    q_bD, k_pD, teacher_p = drawn(3, 2, 4)
    owner_p, valid_p = torch.tensor([0, 1, 0, 1]), torch.ones(4, dtype=torch.bool)
    loss = LossConfig(distillation="margin_mse")
    nothing = TaughtLists(owner_p, ~valid_p, teacher_p, pairs=2)
    assert not any(
        x.any() for x in vars(distillation_gradient(q_bD, k_pD, nothing, loss, weight=1.0, scale=20.0)).values()
    )
    q_bD[0] = k_pD[1] = 0.0
    mine = distillation_gradient(q_bD, k_pD, TaughtLists(owner_p, valid_p, teacher_p, 2), loss, weight=1.0, scale=20.0)
    assert all(x.isfinite().all() for x in vars(mine).values())


@pytest.mark.parametrize("contrastive_weight", [0.0, 0.5])
def test_both_terms_add_up(contrastive_weight: float) -> None:
    pairs, owner_p = 6, np.array([*range(6), 0, 1, 1, 3, 5])
    q_bD, k_pD, teacher_p = drawn(4, pairs, len(owner_p))
    teacher_p[6] = float("nan")
    # Pair 5 is quarantined, which its documents need not repeat.
    valid_b, page_valid_p = np.arange(pairs) != 5, np.arange(len(owner_p)) != 8
    row_b, row_p = np.arange(pairs), np.arange(len(owner_p))
    batch = RankBatch(
        step=0,
        epoch=0,
        pairs_b=row_b,
        valid_b=valid_b,
        query_hash_b=row_b,
        page_hash_p=row_p,
        owner_p=owner_p,
        page_valid_p=page_valid_p,
        teacher_p=teacher_p.numpy(),
        answers_bm=row_b[:, None],
        mini_batches=(),
        quarantined=(),
        seconds_waited=0.0,
    )
    loss = LossConfig(
        distillation="margin_mse",
        distillation_weight=0.7,
        contrastive_weight=contrastive_weight,
        learn_scale=True,
        matryoshka_dims=(24, 8),
    )
    world = World(0, 1, torch.device("cpu"))
    lists = int(taught_lists(batch, world.device).counts(loss).sum())
    assert lists == 2  # of pairs 1 and 3
    sizes = Sizes([pairs], [len(owner_p)], [1], [lists])
    mine = embedding_gradient({"query": q_bD, "document": k_pD}, batch, sizes, loss, world, scale=8.0)

    facts, _ = gathered_facts([k_pD], batch, sizes, world)
    leaves = q_bD.double().requires_grad_(), k_pD.double().requires_grad_()
    log_scale = torch.tensor(8.0, dtype=torch.float64).log().requires_grad_()
    distilled = dense_distillation(*leaves, facts, teacher_p.double(), loss, log_scale.exp())
    weight_b = torch.from_numpy(valid_b).double() / valid_b.sum()
    contrastive = dense_loss(*leaves, facts, slice(0, pairs), weight_b, loss, log_scale.exp())
    total = contrastive_weight * contrastive + 0.7 * distilled
    total.backward()
    assert mine.loss == pytest.approx(total.item(), rel=1e-5)
    assert mine.distillation == pytest.approx(distilled.item(), rel=1e-5) and mine.lists == lists
    assert log_scale.grad is not None
    assert mine.dlog_scale == pytest.approx(log_scale.grad.item(), rel=1e-5)
    for ours, leaf in ((mine.of_side["query"], leaves[0]), (mine.of_side["document"], leaves[1])):
        assert leaf.grad is not None and leaf.grad.norm() > 1e-2
        assert torch.linalg.vector_norm(ours - leaf.grad) <= 5e-6 * leaf.grad.norm()
    without = embedding_gradient({"query": q_bD, "document": k_pD}, batch, sizes, LossConfig(), world, scale=8.0)
    assert without.distillation is None


def test_scores_go_with_the_documents_that_they_are_of(tmp_path: Path) -> None:
    # Pairs of one to three positives; page p has the score 100 * pair + p.
    pairs: list[Any] = [(number, 0, number, list(range(8, 8 + number)), []) for number in range(3)]
    index = write_shards(tmp_path, pairs)
    names = {0: [5, 6, 7], 1: [6], 2: [6, 7]}
    positives = {pair: [number_of(index, row) for row in index.positives_of(pair)] for pair in range(3)}
    lines = [
        {
            "shard": "pairs.tar",
            "key": f"k{pair}",
            "neg_ids": [f"p{page}" for page in pages],
            "neg_teacher": [100 * pair + page for page in pages],
            "pos_teacher": [100 * pair + page for page in positives[pair]],
        }
        for pair, pages in names.items()
    ]
    del lines[2]["pos_teacher"]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    negatives = read_negatives([str(tmp_path / "n.jsonl")], index, 0.0)
    order = Order(index, PlanSettings(0, 3), tmp_path)
    shown = set()
    for step in range(6):
        for rank in range(4):
            dealing = Dealing(
                rank=rank,
                world_size=4,
                page_tokens=page_tokens,
                mini_batch_size=dict.fromkeys(SIDES, 4),
                num_negatives=2,
                negatives=negatives,
            )
            one = dealing.slice_of(order, step)
            expected = [
                100 * pair + number_of(index, row)
                for pair, row in zip(one.pairs_b[one.owner_p], one.documents_p, strict=True)
            ]
            known = np.isfinite(one.teacher_p)
            assert one.teacher_p[known].tolist() == np.array(expected)[known].tolist()
            is_positive = np.arange(len(known)) < len(one.pairs_b)
            assert (known == ~(is_positive & (one.pairs_b[one.owner_p] == 2))).all()
            assert len(known) == 1 if one.borrowed else len(known) == 1 + min(2, len(names[int(one.pairs_b[0])]))
            shown |= set(one.teacher_p[:1][known[:1]].tolist())
    assert len(shown) > 2, "another positive is drawn in another epoch"


def number_of(index: Any, row: int) -> int:
    return number_of_image(InputReader(index, STORE)[int(row)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pairs with two negatives each; a teacher has scored those of all but every fourth."""
    folder = make_inputs(tmp_path_factory.mktemp("distillation"))
    plain = run_config(folder, "unused")
    index = open_data(plain.data, plain.evaluation, World(0, 1, torch.device("cpu"))).train
    names, shards = DocumentNames(index), shard_names(index)
    lines = []
    for pair in range(len(index)):
        others = [int(index.positives_of((pair + step) % len(index))[0]) for step in (3, 7)]
        line = {"shard": shards[index.pair_shard_N[pair]], "key": index.pair_key[pair]}
        line["neg_ids"] = list(names.names(np.array(others)))
        if pair % 4:
            line |= {"neg_teacher": [-2.0, 0.5 * (pair % 3)], "pos_teacher": [6.0]}
        lines.append(line)
    (folder / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        line.pop("neg_teacher", None)
    (folder / "untaught.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def taught(folder: Path, name: str, loss: dict[str, Any], file: str = "n.jsonl", **keys: Any) -> RunConfig:
    return run_config(folder, name, data={"negatives": str(folder / file)}, loss=loss, **keys)


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


LEARNED = {"distillation": "listwise_distillation", "distillation_weight": 5.0, "learn_scale": True}
TWO_STEPS = {"max_steps": 2, "save_steps": 2}


def train_on_ranks(rank: int, world_size: int, folder: Path) -> None:
    config = taught(folder, f"ranks-{world_size}", LEARNED, strategy="ddp", training=TWO_STEPS)
    world = start_world(config)
    train_in(world, config)
    stop_world()


def test_the_objective_does_not_depend_on_how_many_ranks_there_are(folder: Path) -> None:
    farnear.train(taught(folder, "ranks-1", LEARNED, training=TWO_STEPS))
    alone = metrics(folder, "ranks-1")
    assert [0 < step["distilled"] < step["pairs"] for step in alone] == [True, True]
    for world_size in (2, 3):
        run_ranks(train_on_ranks, world_size, folder)
        for step, wanted in zip(metrics(folder, f"ranks-{world_size}"), alone, strict=True):
            for name in ("loss", "distillation", "grad_norm", "scale"):
                assert step[name] == pytest.approx(wanted[name], rel=2e-4), name
            assert step["distilled"] == wanted["distilled"]
            assert step["collectives"]["exchange"]["calls"] == 3


def test_a_run_learns_what_the_teacher_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    farnear.train(
        taught(folder, "alone", {"distillation": "margin_mse", "contrastive_weight": 0}, training={"save_steps": 6})
    )
    steps = metrics(folder, "alone")
    first, last = (sum(step["distillation"] for step in part) for part in (steps[:3], steps[3:]))
    assert last < 0.8 * first, "an epoch apart"
    assert all(step["loss"] == step["distillation"] and step["masked"] == 0 for step in steps)
    assert "1 of margin_mse, from a teacher's scores, scale 20, fixed" in capsys.readouterr().out


def test_the_doctor_compares_it_too(folder: Path, tmp_path: Path) -> None:
    loss = {"distillation": "margin_mse", "contrastive_weight": 0.5}
    config = taught(folder, "unused", loss, model={"name_or_path": str(folder / "base")})
    world = World(0, 1, torch.device("cpu"))
    report = check_gradient(config, open_data(config.data, config.evaluation, world), world, tmp_path)
    assert report.error is not None and report.error <= report.bound


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ({"distillation_weight": 2.0}, "distillation_weight is set, but distillation is not"),
        ({"contrastive_weight": 0.0}, "contrastive_weight is set, but distillation is not"),
        ({"distillation": "margin_mse", "distillation_temperature": 2.0}, "belongs to listwise_distillation, not to"),
        ({"distillation": "margin_mse", "distillation_weight": 0.0}, "greater than 0"),
        ({"distillation": "mse"}, "'margin_mse' or 'listwise_distillation'"),
        ({"distillation": "margin_mse", "function": "own_losses:softmax"}, "own_losses:softmax takes its place"),
        (
            {"distillation": "margin_mse", "contrastive_weight": 0, "margin": 0.1},
            "margin belongs to InfoNCE, which contrastive_weight: 0 leaves out",
        ),
    ],
)
def test_options_that_contradict_are_refused(folder: Path, loss: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        taught(folder, "unused", loss)


@pytest.mark.parametrize(
    ("file", "data", "says"),
    [
        ("untaught.jsonl", {}, "loss.distillation margin_mse learns from a teacher's scores, and data.negatives holds"),
        ("n.jsonl", {"num_negatives": 0}, "data.num_negatives: 0 leaves all out"),
    ],
)
def test_without_a_teacher_there_is_nothing_to_distil(folder: Path, file: str, data: dict[str, Any], says: str) -> None:
    config = taught(folder, "refused", {"distillation": "margin_mse"}, file)
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        farnear.train(config)
    assert "\n" not in str(caught.value)
