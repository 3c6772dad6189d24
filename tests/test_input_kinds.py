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
    query = (
        {"query.messages.json": chat(i)} if i % 2 else {"query.messages.json": chat(i, "image"), "query.png": page(i)}
    )
    return {**query, "messages.json": chat(i, "image"), "png": page(100 + i)}


def films(i: int) -> dict[str, bytes]:
    """Films, every second in a chat."""
    return {"query.txt": words(i), "mp4": film(i), **({"messages.json": chat(i, "video")} if i % 2 else {})}


def all_kinds(i: int) -> dict[str, bytes]:
    """A sound, a sound in a chat, a page with text, a film; sounds of more than one rate."""
    rate = 16_000 if i % 2 else 8000
    documents = [
        {"wav": sound(i, rate)},
        {"messages.json": chat(i, "audio"), "wav": sound(i, rate)},
        {"png": page(i), "txt": words(i)},
        {"mp4": film(i)},
    ]
    return {"query.txt": words(i), **documents[i % 4]}


def all_but_sounds(i: int) -> dict[str, bytes]:
    """For a text encoder and a model that sees."""
    return (mixed, chats, mixed, films)[i % 4](i)


def sounds_and_pages(i: int) -> dict[str, bytes]:
    """For towers: sounds of another rate than the model's, and pages."""
    return {"query.txt": words(i), **({"wav": sound(i, 2 * AUDIO_RATE)} if i % 2 else {"png": page(i)})}


def sounds(i: int) -> dict[str, bytes]:
    """No page at all."""
    return {"query.txt": words(i), "wav": sound(i, AUDIO_RATE)}


Members = Callable[[int], dict[str, bytes]]
TEXT, IMAGE, AUDIO = ("0.sub_modules.text.", "0.sub_modules.image.", "0.sub_modules.audio.")
RUNS: list[tuple[str, Members, list[str]]] = [
    ("vlm", mixed, [VISUAL, LANGUAGE]),
    ("vlm", chats, [VISUAL, LANGUAGE]),
    ("vlm", films, [VISUAL, LANGUAGE]),
    ("siglip", images_and_texts, ["0.model.text_model", "0.model.vision_model"]),
    ("omni", all_kinds, ["0.model.audio_tower", VISUAL, LANGUAGE]),
    ("text+vlm", all_but_sounds, [f"{TEXT}0", f"{IMAGE}{VISUAL}"]),
    ("clap", sounds, ["0.model.text_model", "0.model.audio_model"]),
    ("text+siglip+clap", sounds_and_pages, [f"{TEXT}3", f"{IMAGE}0.model.vision_model", f"{AUDIO}0.model.audio_model"]),
]


@pytest.mark.parametrize(("model", "members", "moved"), RUNS, ids=lambda value: getattr(value, "__name__", None))
def test_a_run_on_inputs(
    tmp_path: Path, models: dict[str, dict[str, Any]], model: str, members: Members, moved: list[str]
) -> None:
    trained_and_checked(tmp_path, write_shards(tmp_path / "data", members), models[model], moved)


UNSUPPORTED: list[tuple[str, dict[str, bytes], str]] = [
    ("clip", {"query.txt": b"q", "wav": sound(1, 8000)}, "documents of the kind audio, which .* does not take .mod"),
    ("clip", {"query.txt": b"q", "png": page(1), "txt": b"w"}, "documents of the kind image.text, which"),
    ("siglip", {"query.messages.json": chat(1), "png": page(1)}, "queries of the kind message, which"),
    (
        "vlm",
        {"query.txt": b"q", "messages.json": chat(1, "audio"), "wav": sound(1, 8000)},
        "documents .* audio.message",
    ),
    ("vlm", {"query.wav": sound(2, 8000), "query.txt": b"q", "png": page(1)}, "queries of the kind audio.text, which"),
    ("clap", {"query.txt": b"q", "png": page(1)}, r"documents of the kind image, .* \(modalities: text, audio\)"),
    ("text+clip", {"query.txt": b"q", "mp4": film(1)}, "documents of the kind video, which .* does not take there"),
    (
        "text, then vlm",
        {"query.png": page(1), "png": page(2)},
        "queries of the kind image, which .* does not take there",
    ),
]


@pytest.mark.parametrize(("model", "members", "says"), UNSUPPORTED)
def test_a_kind_that_the_model_does_not_take_is_refused(
    tmp_path: Path, models: dict[str, dict[str, Any]], model: str, members: dict[str, bytes], says: str
) -> None:
    data = write_shards(tmp_path / "data", lambda i: members if i == 2 else text_and_page(i))
    with pytest.raises(UserError, match=says) as caught:
        farnear.train(shape_config(tmp_path, data, models[model]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_sounds_keep_their_tone_at_another_rate() -> None:
    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)

    for rate, other in ((44_100, 16_000), (8000, 48_000)):
        sounded = resampled({"array": tone(rate), "sampling_rate": rate}, other)
        assert sounded["sampling_rate"] == other and sounded["array"].dtype == np.float32
        assert abs(len(sounded["array"]) - other) <= 2
        edge = other // 20  # where a filter begins and ends
        assert np.abs(sounded["array"] - tone(other)[: len(sounded["array"])])[edge:-edge].max() < 0.02
    same = {"array": tone(8000), "sampling_rate": 8000}
    assert resampled(same, 8000) is same


def test_a_chat_is_given_arrays_and_the_reader_keeps_its_own(models: dict[str, dict[str, Any]]) -> None:
    omni = load_model(ModelConfig(**models["omni"]), with_weights=False)
    heard = {"array": np.zeros(800, np.float32), "sampling_rate": 8000}
    seen = {"array": np.zeros((3, 32, 32, 3), np.uint8), "video_metadata": None}
    one = [
        {"role": "system", "content": "a text"},
        {"role": "user", "content": [{"type": "audio", "audio": heard}, {"type": "video", "video": seen}]},
    ]
    taken, arguments = given_to(omni, [one], "query")
    audio, video = taken[0][1]["content"]
    assert audio["audio"].shape == (1600,) and video["video"].shape == (3, 32, 32, 3)
    assert arguments["processing_kwargs"]["video"]["video_metadata"][0]["total_num_frames"] == 3
    assert one[1]["content"][0]["audio"] is heard
    assert given_to(omni, ["a.png"], "query") == ([{"text": "a.png"}], {})
    # Of a Router's models each hears at a rate of its own, and chats are read by another than sounds.
    both = {"image": models["omni"]["name_or_path"], "audio": models["clap"]["name_or_path"]}
    router = load_model(ModelConfig(router=both), with_weights=False)
    (chatted,), _ = given_to(router, [one], "query")
    (alone,), _ = given_to(router, [{"audio": {**heard, "sampling_rate": 16_000}}], "query")
    assert chatted[1]["content"][0]["audio"].shape == (1600,)
    assert alone["audio"]["sampling_rate"] == AUDIO_RATE and alone["audio"]["array"].shape == (400,)
