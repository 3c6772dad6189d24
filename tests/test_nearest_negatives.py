"""A reranker's negatives of the batch chosen by an embedder: the nearest, the same on all ranks, in a training."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mined_shards import Colours, page_tokens
from pair_makers import TEMPLATE, YES_NO
from tiny_runs import run_tree

from farnear.config import RunConfig, parse_config
from farnear.data.lists import lists_of_step
from farnear.data.negatives import Negatives
from farnear.data.order import Order
from farnear.data.plan import PlanSettings
from farnear.errors import UserError
from farnear.ingest.synthetic import synthesise
from farnear.mining_section import MiningConfig
from farnear.model.tiny import save_tiny_model
from farnear.parallel.world import World
from farnear.retrieve.embeddings import Embeddings
from farnear.retrieve.inference import Inference
from farnear.retrieve.mine import mine
from farnear.training.run import train_in
from farnear.training.shards import open_data

ONE = World(0, 1, torch.device("cpu"))


def preprocess(inputs: list[Any], side: str) -> dict[str, Any]:
    texts = [one if isinstance(one, str) else one.tobytes().hex() for one in inputs]
    return {"number": torch.tensor([sum(map(ord, text)) for text in texts])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pairs, a base, and what `farnear mine` leaves of them; another folder of other pairs."""
    folder = tmp_path_factory.mktemp("nearest")
    synthesise(folder / "data", train_pairs=22, eval_pairs=2, seed=0, size=(64, 64))
    synthesise(folder / "others", train_pairs=22, eval_pairs=2, seed=1, size=(64, 64))
    save_tiny_model(folder / "base", texts=YES_NO, hidden_size=64, num_layers=2)
    (folder / "template.jinja").write_text(TEMPLATE)
    for name in ("data", "others"):
        data = open_data(config_of(folder, "unused", data=name).data, config_of(folder, "unused").evaluation, ONE)
        by = Inference(Colours(), ONE, preprocess, page_tokens, batch_size=8, num_workers=0)
        mining, to = MiningConfig(num_negatives=2, range_max=5), folder / f"of-{name}"
        mine(by, data.train, data.store, mining, to, {"model": "colours"}, seed=1)
    return folder


def config_of(folder: Path, output_dir: str, embeddings: str = "of-data", data: str = "data") -> RunConfig:
    tree = run_tree(folder, output_dir, training={"mini_batch_size": {"pair": 8, "document": 4}, "num_train_epochs": 1})
    del tree["loss"]
    tree["data"]["train"] = str(folder / data / "train-*.tar")
    tree["reranker"] = {
        "num_negatives": 3,
        "sampling_strategy": "top",
        "embeddings": str(folder / embeddings / "embeddings"),
        "chat_template": str(folder / "template.jinja"),
    }
    return parse_config(tree)


def test_similarities_are_the_same_in_any_shape_and_those_of_the_cosine(folder: Path) -> None:
    index = open_data(config_of(folder, "unused").data, config_of(folder, "unused").evaluation, ONE).train
    embeddings = Embeddings.open(folder / "of-data" / "embeddings")
    similarity, pairs = embeddings.similarity_in(index), np.arange(len(index))
    pages = index.positives[index.positive_start_N1[pairs]]
    whole = similarity(pairs, pages)
    assert (whole == whole.round()).all() and whole.max() < 2**24
    for pair in pairs:
        np.testing.assert_array_equal(similarity(pairs[[pair]], pages[::-1].copy())[0, ::-1], whole[pair])
    query_ND, page_ND = embeddings.query(index.query_hash_N), embeddings.document(index.input_hash_I[pages])
    np.testing.assert_allclose(whole / 16e6, query_ND.astype(np.float64) @ page_ND.T.astype(np.float64), atol=3e-4)


def test_a_training_takes_the_nearest_pages_of_its_batches(folder: Path) -> None:
    config = config_of(folder, "run")
    seen: list[Any] = []
    real = lists_of_step

    def noted(*arguments: Any, **keys: Any) -> Any:
        seen.append((arguments, keys, real(*arguments, **keys)))
        return seen[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("farnear.data.list_dealing.lists_of_step", noted)
        train_in(ONE, config)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["scored"] for record in records] == [32, 32, 24] and all(record["loss"] for record in records)
    embeddings = Embeddings.open(folder / "of-data" / "embeddings")
    assert len(seen) == 3
    for (order, _, _), _, lists in seen:
        index = order.index
        query_GD = embeddings.query(index.query_hash_N[lists.pair_G]).astype(np.float64)
        positives = lists.document_E[lists.start_G1[:-1]]
        page_GD = embeddings.document(index.input_hash_I[positives]).astype(np.float64)
        cosine_GG = query_GD @ page_GD.T
        for place, pair in enumerate(lists.pair_G.tolist()):
            entries = lists.document_E[lists.start_G1[place] : lists.start_G1[place + 1]]
            answers = index.positive_hashes_of_query(pair)
            others = np.flatnonzero(~np.isin(index.input_hash_I[positives], answers))
            nearest = others[np.argsort(-cosine_GG[place, others])][:3]
            assert entries[1:].tolist() == positives[nearest].tolist()


def test_the_ring_takes_others(folder: Path) -> None:
    """What is tested above is not what happens anyway."""
    config = config_of(folder, "unused")
    index = open_data(config.data, config.evaluation, ONE).train
    order = Order(index, PlanSettings(seed=1, global_batch_size=8, tail="pad"), folder / "plans")
    similarity = Embeddings.open(folder / "of-data" / "embeddings").similarity_in(index)
    of_both = [
        lists_of_step(order, 0, Negatives.of_index(index), num_hard=0, num_in_batch=3, similarity=one)
        for one in (None, similarity)
    ]
    assert (of_both[0].document_E != of_both[1].document_E).sum() > 8


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ("nowhere", r"reranker.embeddings: .* holds no embeddings .*; name the folder `embeddings`"),
        (
            "of-others",
            r"reranker.embeddings: \d+ of 22 query embeddings .* are not stored, .*; run `farnear mine` with",
        ),
    ],
)
def test_another_folder_is_refused_in_one_line(folder: Path, embeddings: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train_in(ONE, config_of(folder, f"run-{embeddings}", embeddings))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "fewer rows", "another width", "not finite"])
def test_damaged_embeddings_are_told_in_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(folder / "of-data" / "embeddings", tmp_path / "embeddings")
    path = copy / "queries-00000.npy"
    rows = np.load(path)
    content = {"cut": path.read_bytes()[:-9], "empty": b""}
    if damage in content:
        path.write_bytes(content[damage])
    else:
        np.save(path, {"fewer rows": rows[1:], "another width": rows[:, 1:], "not finite": rows * np.nan}[damage])
    index = open_data(config_of(folder, "unused").data, config_of(folder, "unused").evaluation, ONE).train
    with pytest.raises(UserError, match="remove the folder, and run the same command again") as caught:
        Embeddings.open(copy).similarity_in(index)(np.arange(len(index)), index.positives)
    assert "\n" not in str(caught.value)
