"""Models of every shape: dual encoders, models joined by a Router, and one that was saved as a Router.

Each is trained, evaluated and exported, and its cached gradient compared with the plain one (`shape_runs`).
"""

from pathlib import Path

import pytest
from shape_runs import text_and_page, trained_and_checked, write_shards
from tiny_towers import save_tiny_clip, save_tiny_siglip, save_tiny_text_encoder

from farnear.model.tiny import save_tiny_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), text_and_page)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    made = {
        "text": save_tiny_text_encoder(folder / "text"),
        "raw_text": folder / "text-raw",
        "clip": save_tiny_clip(folder / "clip"),
        "clip_st": save_tiny_clip(folder / "clip-st", as_sentence_transformer=True),
        "siglip": save_tiny_siglip(folder / "siglip"),
        "siglip_st": save_tiny_siglip(folder / "siglip-st", as_sentence_transformer=True),
        "vlm": save_tiny_model(folder / "vlm", hidden_size=32, num_layers=1),
    }
    return {name: str(path) for name, path in made.items()}


INNER = "0.model."
TEXT, IMAGE = "0.sub_modules.text.", "0.sub_modules.image."


@pytest.mark.parametrize("name", ["clip", "siglip_st"])
def test_a_dual_encoder(tmp_path: Path, data: Path, towers: dict[str, str], name: str) -> None:
    export = trained_and_checked(
        tmp_path, data, {"name_or_path": towers[name]}, [f"{INNER}text_model", f"{INNER}vision_model"]
    )
    assert [type(module).__name__ for module in export] == ["Transformer", *(["Normalize"] * (not name.endswith("st")))]


JOINED: dict[str, tuple[dict[str, str], list[str]]] = {
    "siglip": ({"text": "text", "image": "siglip"}, [f"{TEXT}0", f"{TEXT}3.linear", f"{IMAGE}0.model.vision_model"]),
    "clip": ({"text": "raw_text", "image": "clip_st"}, [f"{TEXT}0", f"{TEXT}2.linear", f"{IMAGE}0.model.vision_model"]),
    "one_width": ({"text": "text", "image": "vlm"}, [f"{TEXT}0", f"{IMAGE}0.model.visual", f"{IMAGE}0.model.language"]),
    "by_side": (
        {"query": "text", "document": "vlm"},
        ["0.sub_modules.query.0", "0.sub_modules.document.0.model.visual"],
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_models(tmp_path: Path, data: Path, towers: dict[str, str], name: str) -> None:
    names, moved = JOINED[name]
    router = {route: towers[tower] for route, tower in names.items()}
    export = trained_and_checked(tmp_path, data, {"router": router}, moved)
    assert [type(module).__name__ for module in export] == ["Router", "Normalize"]
    if name == "siglip":
        # What was saved as a Router is trained on by its name.
        again = tmp_path / "again"
        model = {"name_or_path": str(tmp_path / "run" / "export"), "freeze": ["sub_modules.image"]}
        trained_and_checked(again, data, model, [f"{TEXT}0"])
