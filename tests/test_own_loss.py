"""A loss of the user's own goes through the same cache, and what it may do wrong is said in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import make_inputs, run_config

import farnear
from farnear.config import load_config, parse_config
from farnear.errors import UserError
from farnear.loss.contrastive import contrastive_gradient
from farnear.loss.false_negatives import BatchFacts
from farnear.loss.own import load_own_loss, own_gradient
from farnear.parallel.world import start_world, stop_world
from farnear.sections import LossConfig
from farnear.training.run import train_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("own"))


def plain_facts(pairs: int) -> BatchFacts:
    numbers, yes = torch.arange(pairs), torch.ones(pairs, dtype=torch.bool)
    return BatchFacts(numbers + 100, yes, numbers[:, None], numbers, numbers, numbers, yes)


@pytest.mark.parametrize("dims", [None, (16, 4)])
def test_it_is_what_the_built_in_loss_would_be(dims: tuple[int, ...] | None) -> None:
    q_BD, k_ND = torch.randn(5, 16), torch.randn(5, 16)
    loss = LossConfig(function="own_losses:softmax", matryoshka_dims=dims)
    total, dq_BD, dk_ND = own_gradient(load_own_loss("own_losses:softmax"), q_BD, k_ND, plain_facts(5), loss)
    weight_b = torch.full((5,), 0.2)
    wanted = contrastive_gradient(
        q_BD, k_ND, None, plain_facts(5), slice(0, 5), weight_b, LossConfig(matryoshka_dims=dims), scale=20.0
    )
    assert torch.allclose(total, wanted.loss_b.mean(), rtol=1e-5)
    assert torch.allclose(dq_BD, wanted.dq_bD, atol=1e-6) and torch.allclose(dk_ND, wanted.dk_ND, atol=1e-6)


@pytest.mark.parametrize("dims", [None, (16, 4)])
def test_what_is_quarantined_is_left_out_before_it_is_called(dims: tuple[int, ...] | None) -> None:
    q_BD, k_ND = torch.randn(4, 16), torch.randn(6, 16)
    # Pairs 1 and 2 are out: one by its query, which its page outlives, the other with its page; so is a hard negative.
    facts = BatchFacts(
        query_hash_B=torch.arange(100, 104),
        pair_valid_B=torch.tensor([True, False, True, True]),
        answers_Bm=torch.arange(4)[:, None],
        positive_B=torch.arange(4),
        page_hash_N=torch.arange(6),
        owner_N=torch.tensor([0, 1, 2, 3, 3, 0]),
        page_valid_N=torch.tensor([True, True, False, True, True, False]),
    )
    rows_B, rows_N = torch.tensor([0, 3]), torch.tensor([0, 1, 3, 4])
    loss, softmax = LossConfig(function="own_losses:softmax", matryoshka_dims=dims), load_own_loss("own_losses:softmax")
    seen: list[BatchFacts] = []

    def function(query: torch.Tensor, document: torch.Tensor, batch: BatchFacts) -> torch.Tensor:
        seen.append(batch)
        return softmax(query, document, batch)

    total, dq_BD, dk_ND = own_gradient(function, q_BD, k_ND, facts, loss)
    assert seen[0].positive_B.tolist() == [0, 2] and seen[0].owner_N.tolist() == [0, -1, 1, 1]
    assert seen[0].query_hash_B.tolist() == [100, 103] and seen[0].page_hash_N.tolist() == [0, 1, 3, 4]

    alone = own_gradient(function, q_BD[rows_B], k_ND[rows_N], replace(seen[0], owner_N=torch.zeros(4).long()), loss)
    assert torch.equal(total, alone[0])
    assert torch.equal(dq_BD[rows_B], alone[1]) and torch.equal(dk_ND[rows_N], alone[2])
    assert not dq_BD[[1, 2]].any() and not dk_ND[[2, 5]].any() and dk_ND[1].any()

    nothing = own_gradient(function, q_BD, k_ND, replace(facts, pair_valid_B=torch.zeros(4, dtype=torch.bool)), loss)
    assert all(not x.any() for x in nothing) and nothing[1].shape == q_BD.shape and nothing[2].shape == k_ND.shape


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:f", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("own_losses:nothing", "own_losses has no function nothing"),
    ],
)
def test_a_function_that_is_not_there_is_named(name: str, says: str) -> None:
    with pytest.raises(UserError, match=r"cannot be imported|has no function") as caught:
        load_own_loss(name)
    assert says in str(caught.value)


@pytest.mark.parametrize("dims", [None, (4, 2)])
@pytest.mark.parametrize("name", ["one_number_a_row", "constant"])
def test_it_must_give_one_number_that_can_be_trained_by(name: str, dims: tuple[int, ...] | None) -> None:
    loss = LossConfig(function=f"own_losses:{name}", matryoshka_dims=dims)
    with pytest.raises(UserError, match="not one number that depends on the embeddings"):
        own_gradient(load_own_loss(f"own_losses:{name}"), torch.randn(3, 4), torch.randn(3, 4), plain_facts(3), loss)


def test_the_run_file_names_it_in_one_word_or_in_its_section(folder: Path, tmp_path: Path) -> None:
    config = run_config(folder, "unused")
    tree = {**config.model_dump(mode="json"), "loss": "own_losses:softmax"}
    assert parse_config(tree).loss == LossConfig(function="own_losses:softmax")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(path, ["loss=own_losses:softmax"]).loss.function == "own_losses:softmax"
    for odd, says in (
        ({"function": "own_losses.softmax"}, "package.module:function"),
        ({"function": "own_losses:softmax", "margin": 0.1}, "margin belongs to InfoNCE"),
        ({"function": "own_losses:softmax", "scale": 50}, "scale belongs to InfoNCE"),
        ({"gather": False}, "gather: false is for a function of your own"),
    ):
        with pytest.raises(UserError, match=says):
            parse_config({**tree, "loss": odd})


def train_with_own_loss(rank: int, world_size: int, folder: Path, gather: bool) -> None:
    loss = {"function": "own_losses:softmax", "gather": gather, "matryoshka_dims": [64, 16]}
    name = f"{world_size}-{gather}"
    config = run_config(folder, name, strategy="ddp", loss=loss, training={"max_steps": 2})
    world = start_world(config)
    train_in(world, config)
    stop_world()


def first_losses(folder: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_with_the_embeddings_of_all_ranks_it_does_not_matter_how_many_there_are(folder: Path) -> None:
    built_in = run_config(folder, "built-in", training={"max_steps": 2})
    farnear.train(built_in)
    for world_size in (1, 2):
        run_ranks(train_with_own_loss, world_size, folder, True)
    expected = first_losses(folder, "built-in")
    for name in ("1-True", "2-True"):
        assert first_losses(folder, name) == pytest.approx(expected, rel=1e-4)
    run_ranks(train_with_own_loss, 2, folder, False)
    # Fewer negatives a query: the mean of each rank's own loss.
    alone = first_losses(folder, "2-False")
    assert all(a < e for a, e in zip(alone, expected, strict=True))


def test_bad_results_stop_a_run_in_one_line(folder: Path) -> None:
    options: dict[str, Any] = {"loss": {"function": "own_losses:constant"}}
    with pytest.raises(UserError, match="return a scalar tensor computed from them"):
        farnear.train(run_config(folder, "constant", **options))
