"""A run of two steps with any model on any kind of input, and everything that such a run has to show.

trained_and_checked    train, then: the loss is finite and every named part has moved; the evaluation ran; the
                       export, loaded by sentence-transformers alone, embeds as the trained model; and the cached
                       step's gradient is the plain one
"""

import io
import json
import math
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tar_makers import STORE, Members, image_bytes, index_of, write_tar
from tiny_runs import run_config

import farnear
from farnear.data.read import InputReader
from farnear.model.embedder import Embedder, Preprocessing, to_device
from farnear.model.inputs import rate_of as rate_taken
from farnear.model.inputs import resampled
from farnear.model.load import load_model
from farnear.model.towers import reader_of
from farnear.parallel.world import World
from farnear.training import embedders
from farnear.training.gradient_check import check_gradient
from farnear.training.shards import open_data

CPU = torch.device("cpu")
TRAIN_PAIRS, EVAL_PAIRS = 6, 3


def page(i: int) -> bytes:
    """Page i."""
    return image_bytes(40 * i + 7, size=(64, 64))


def sound(i: int, rate: int) -> bytes:
    """A quarter of a second of a tone of its own, as a WAV file."""
    tone = 12_000 * np.sin(np.arange(rate // 4) * (0.05 + 0.03 * i))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(tone.astype("<i2").tobytes())
    return buffer.getvalue()


def write_shards(folder: Path, members: Callable[[int], dict[str, bytes]]) -> Path:
    """``train.tar`` and ``eval.tar`` with pairs whose members, by the names behind the key, follow from a number."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, first, count in (("train", 0, TRAIN_PAIRS), ("eval", TRAIN_PAIRS, EVAL_PAIRS)):
        pairs: Members = [
            (f"k{i}.{suffix}", data) for i in range(first, first + count) for suffix, data in members(i).items()
        ]
        write_tar(folder / f"{name}.tar", pairs)
    return folder


def text_and_page(i: int) -> dict[str, bytes]:
    """What visual document retrieval is about."""
    return {"query.txt": f"which page shows number {i}?".encode(), "png": page(i)}


def shape_config(folder: Path, data: Path, model: dict[str, Any], **keys: Any) -> Any:
    """Two steps of three pairs."""
    return run_config(
        folder,
        "run",
        model={"name_or_path": "", **model},
        data={"train": str(data / "train.tar"), "eval": str(data / "eval.tar")},
        loss={"matryoshka_dims": [16]},
        training={
            "global_batch_size": 3,
            "mini_batch_size": 2,
            "num_train_epochs": 1,
            "save_steps": 0,
            **keys.pop("training", {}),
        },
        **keys,
    )


def trained_and_checked(
    folder: Path, data: Path, model: dict[str, Any], moved: Sequence[str], **keys: Any
) -> SentenceTransformer:
    """Train in this process and check.

    Args:
        moved: Beginnings of names of parameters, under each of which some must have moved.

    Returns:
        The export.
    """
    config = shape_config(folder, data, model, **keys)
    with patch.object(embedders, "export_model", wraps=embedders.export_model) as exported:
        summary = farnear.train(config)
    weights = exported.call_args.args[1]
    assert math.isfinite(summary["loss"])
    before = load_model(config.model, seed=config.seed)
    start = dict(before.named_parameters())
    for name in moved:
        mine = [key for key in weights if key.startswith(name)]
        assert mine, f"nothing that trains is called {name}"
        assert any(not torch.equal(weights[key], start[key]) for key in mine), f"{name} has not moved"
    measured = [json.loads(line)["kind"] for line in (folder / "run" / "eval.jsonl").read_text().splitlines()]
    assert measured == ["before", "after"]
    before.load_state_dict(weights, strict=False)
    export = SentenceTransformer(str(folder / "run" / "export"), device="cpu")
    assert_same_embeddings(before, export, data)
    assert_exact_gradient(folder, config)
    return export


def assert_same_embeddings(trained: SentenceTransformer, export: SentenceTransformer, data: Path) -> None:
    """As training embeds and as a user does."""
    index = index_of([data / "eval.tar"])
    reader, preprocess = InputReader(index, STORE), Preprocessing(trained)
    embedder = Embedder(trained, bf16=False).eval()
    for side, rows in (("query", index.query_N), ("document", index.positives)):
        encode = export.encode_query if side == "query" else export.encode_document
        for row in rows.tolist():
            with torch.no_grad():
                e_1D = embedder(to_device(preprocess([reader[row]], side), CPU))
            given, how = as_users_give_it(reader[row], rate_of(export, side))
            other_1D = encode([given], convert_to_tensor=True, **how)
            assert torch.allclose(e_1D, other_1D, atol=1e-5), (side, float((e_1D - other_1D).abs().max()))


def as_users_give_it(one: Any, rate: int | None) -> tuple[Any, dict[str, Any]]:
    """sentence-transformers takes sounds of the model's rate, and in chats bare arrays, with what is known of films
    beside.
    """
    if isinstance(one, dict) and "audio" in one and rate:
        one = {**one, "audio": resampled(one["audio"], rate)}
    known = []
    for message in one if isinstance(one, list) else ():
        for part in message["content"]:
            if isinstance(value := part.get(part["type"]), dict):
                known += [value["video_metadata"]] if "video_metadata" in value else []
                part[part["type"]] = (resampled(value, rate) if "sampling_rate" in value and rate else value)["array"]
    return one, {"processing_kwargs": {"video": {"video_metadata": known}}} if known else {}


def rate_of(model: SentenceTransformer, side: str) -> int | None:
    """Of the sounds that it takes."""
    return rate_taken(reader_of(model, side, "audio"))


def assert_exact_gradient(folder: Path, config: Any) -> None:
    """The cached step's is the plain one's."""
    world = World(0, 1, CPU)
    plans = folder / "plans"
    plans.mkdir(exist_ok=True)
    report = check_gradient(config, open_data(config.data, config.evaluation, world), world, plans)
    assert report.error is not None and report.error < 2e-5
    assert report.mini_batches >= 4
