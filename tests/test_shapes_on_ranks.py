"""Joined models on two ranks under every strategy: exact, trained, and exported. Minutes."""

from pathlib import Path

import exactness
import pytest
from ranks import run_ranks
from sentence_transformers import SentenceTransformer
from shape_runs import page, shape_config, write_shards
from tiny_towers import save_tiny_clip, save_tiny_text_encoder

import farnear
from farnear.parallel.world import start_world, stop_world
from farnear.training.gradient_check import check_gradient
from farnear.training.shards import open_data


def images_and_texts(i: int) -> dict[str, bytes]:
    query = {"query.png": page(100 + i)} if i % 2 else {"query.txt": f"number {i}".encode()}
    return {**query, "png": page(i)}


def exact_on_ranks(rank: int, world_size: int, folder: Path, router: dict[str, str], strategy: str) -> None:
    config = shape_config(folder / strategy, folder / "data", {"router": router}, strategy=strategy)
    world = start_world(config)
    plans = folder / strategy / "plans"
    plans.mkdir(parents=True, exist_ok=True)
    with exactness.parameters_split(strategy):
        report = check_gradient(config, open_data(config.data, config.evaluation, world), world, plans)
    assert rank or report.error < exactness.BOUND_FP32 * 2, report
    assert world_size == 2
    stop_world()


def train_on_ranks(rank: int, world_size: int, folder: Path, router: dict[str, str], strategy: str) -> None:
    farnear.train(shape_config(folder / f"{strategy}-run", folder / "data", {"router": router}, strategy=strategy))


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_joined_models_on_ranks(tmp_path: Path, strategy: str) -> None:
    # A CLIP's scale is a single number, which FSDP2 could not spread.
    router = {"text": str(save_tiny_text_encoder(tmp_path / "t")), "image": str(save_tiny_clip(tmp_path / "c"))}
    write_shards(tmp_path / "data", images_and_texts)
    run_ranks(exact_on_ranks, 2, tmp_path, router, strategy)
    run_ranks(train_on_ranks, 2, tmp_path, router, strategy)
    export = tmp_path / f"{strategy}-run" / "run" / "export"
    assert SentenceTransformer(str(export), device="cpu").get_embedding_dimension() == 48
