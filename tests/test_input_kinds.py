"""Inputs of every kind, alone and mixed in one run: images as queries, pages with text, chats, sounds, films.

Each is trained, evaluated and exported, and its cached gradient compared with the plain one (`shape_runs`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_makers import video_bytes
from pair_makers import one_thread  # noqa: F401
from shape_runs import page, shape_config, sound, text_and_page, trained_and_checked, write_shards
from tiny_towers import (
    AUDIO_RATE,
    save_tiny_clap,
    save_tiny_clip,
    save_tiny_omni,
    save_tiny_siglip,
    save_tiny_text_encoder,
)

import farnear
from farnear.errors import UserError
from farnear.model.inputs import given_to, resampled
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

VISUAL, LANGUAGE = "0.model.visual", "0.model.language_model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Sections `model`, by name."""
    folder = tmp_path_factory.mktemp("models")
    text, siglip, vlm, clap, clip, omni = (
        str(path)
        for path in (
            save_tiny_text_encoder(folder / "text"),
            save_tiny_siglip(folder / "siglip"),
            save_tiny_model(folder / "vlm", hidden_size=32, num_layers=1),
            save_tiny_clap(folder / "clap"),
            save_tiny_clip(folder / "clip"),
            save_tiny_omni(folder / "omni"),
        )
    )
    return {
        "vlm": {"name_or_path": vlm},
        "siglip": {"name_or_path": siglip},
        "clip": {"name_or_path": clip},
        "clap": {"name_or_path": clap},
        "omni": {"name_or_path": omni},
        "text+vlm": {"router": {"text": text, "image": vlm}},
        "text+clip": {"router": {"text": text, "image": clip}},
        "text+siglip+clap": {"router": {"text": text, "image": siglip, "audio": clap}},
        "text, then vlm": {"router": {"query": text, "document": vlm}},
    }


def words(i: int) -> bytes:
    return f"of number {i}".encode()


def chat(i: int, *media: str) -> bytes:
    parts = [{"type": kind} for kind in media]
    return json.dumps([{"role": "user", "content": [*parts, {"type": "text", "text": f"number {i}"}]}]).encode()


def film(i: int) -> bytes:
    return video_bytes(brightness_step=10 * i + 5)


def mixed(i: int) -> dict[str, bytes]:
    """Every second query an image, every second page with a text beside it."""
    query = {"query.png": page(100 + i)} if i % 2 else {"query.txt": words(i)}
    return {**query, "png": page(i), **({"txt": words(i)} if i % 3 else {})}


def images_and_texts(i: int) -> dict[str, bytes]:
    """For what reads one kind at a time: both on both sides."""
    query = {"query.png": page(100 + i)} if i % 2 else {"query.txt": words(i)}
    return {**query, **({"png": page(i)} if i % 3 else {"txt": words(i)})}


def chats(i: int) -> dict[str, bytes]:
    """Chats with an image and without on both sides."""
    query = {"query.messages.json": chat(i)} if i % 2 else {"query.messages.json": chat(i, "image"), "query.png": page(i)}
    return {**query, "messages.json": chat(i, "image"), "png": page(100 + i)}


def films(i: int) -> dict[str, bytes]:
    """Films, every second in a chat."""
    return {"query.txt": words(i), "mp4": film(i), **({"messages.json": chat(i, "video")} if i % 2 else {})}


def sounds_and_all(i: int) -> dict[str, bytes]:
    """A sound, a sound in a chat, a page; sounds of more than one rate."""
    rate = 16_000 if i % 2 else 8000
    documents = [{"wav": sound(i, rate)}, {"messages.json": chat(i, "audio"), "wav": sound(i, rate)}, {"png": page(i)}]
    return {"query.txt": words(i), **documents[i % 3]}


def sounds_and_pages(i: int) -> dict[str, bytes]:
    """For towers: sounds of another rate than the model's, and pages."""
    return {"query.txt": words(i), **({"wav": sound(i, 2 * AUDIO_RATE)} if i % 2 else {"png": page(i)})}


Members = Callable[[int], dict[str, bytes]]
TEXT, IMAGE, AUDIO = ("0.sub_modules.text.", "0.sub_modules.image.", "0.sub_modules.audio.")
RUNS: list[tuple[str, Members, list[str]]] = [
    ("vlm", mixed, [VISUAL, LANGUAGE]),
    ("vlm", chats, [VISUAL, LANGUAGE]),
    ("vlm", films, [VISUAL, LANGUAGE]),
    ("siglip", images_and_texts, ["0.model.text_model", "0.model.vision_model"]),
    ("omni", sounds_and_all, ["0.model.audio_tower", VISUAL, LANGUAGE]),
    ("text+vlm", lambda i: chats(i) if i % 3 == 2 else mixed(i), [f"{TEXT}0", f"{IMAGE}{VISUAL}"]),
    ("text+siglip+clap", sounds_and_pages, [f"{TEXT}3", f"{IMAGE}0.model.vision_model", f"{AUDIO}0.model.audio_model"]),
]


@pytest.mark.parametrize(("model", "members", "moved"), RUNS, ids=lambda value: getattr(value, "__name__", None))
def test_a_run_on_inputs(
    tmp_path: Path, models: dict[str, dict[str, Any]], model: str, members: Members, moved: list[str]
) -> None:
    trained_and_checked(tmp_path, write_shards(tmp_path / "data", members), models[model], moved)
