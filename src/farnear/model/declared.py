"""What a model's own files say of it, before it is built: its config, the width of its embeddings, how it reads pages.

The files come from anywhere, so every value that is used is looked at first, and a wrong one is named with its file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farnear.errors import UserError
from farnear.sections import ModelConfig


@dataclass(frozen=True)
class PageShape:
    """How pages become tokens.

    Attributes:
        patch_pixels: Side of a patch.
        merge: Patches along a side that make a token.
        channels, frames: Of a patch.
        min_pixels, max_pixels: Of a page, after resizing.
        is_known: Whether the model's config and processor say so, or it is a guess.
    """

    patch_pixels: int
    merge: int
    channels: int
    frames: int
    min_pixels: int
    max_pixels: int
    is_known: bool

    @property
    def most_tokens(self) -> int:
        return max(1, self.max_pixels // (self.patch_pixels * self.merge) ** 2)

    def uint8_bytes(self, tokens: int) -> int:
        """Of a page on its way to the device."""
        return tokens * self.merge**2 * self.channels * self.patch_pixels**2

    def float_bytes(self, tokens: int) -> int:
        """Of a page on the device."""
        return 4 * self.frames * self.uint8_bytes(tokens)


@dataclass(frozen=True)
class Declared:
    """A JSON object in a model's file, or one inside it.

    Attributes:
        place: As messages name it.
    """

    place: str
    values: dict[str, Any]

    def section(self, key: str) -> "Declared | None":
        """The object under a key; None where there is none. Raises ``UserError`` where it is something else."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Declared(f"{self.place}: {key}", value)

    def number(self, key: str, *, least: int = 1) -> int | None:
        """The whole number under a key; None where there is none. Raises ``UserError`` where it is something else."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(key, f"a whole number of {least} or more")
        return value

    def _wrong(self, key: str, wanted: str) -> UserError:
        return UserError(
            f"{self.place}: {key} is {json.dumps(self.values[key])[:40]}, not {wanted}, so the run cannot be planned; "
            "copy the model's own file there"
        )


def read_declared(path: Path) -> Declared:
    """Raises ``UserError`` where a file is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the model's own there") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {json.dumps(values)[:40]}, not an object; copy the model's own file there")
    return Declared(str(path), values)


def declared_width(settings: Declared, folder: Path) -> int:
    """Of the embeddings: the last dense layer's, where a SentenceTransformer has one, else the model's.

    Raises:
        UserError: It is not told, or no width.
    """
    for dense in sorted(folder.glob("*_Dense/config.json"), reverse=True):
        layer, key = read_declared(dense), "out_features"
        break
    else:
        layer, key = settings.section("text_config") or settings, "hidden_size"
    width = layer.number(key)
    if width is None:
        raise UserError(
            f"{layer.place} tells no {key}, so the embeddings' width is not known; copy the model's own file there"
        )
    return width


def declared_pages(config: ModelConfig, settings: Declared, folder: Path) -> PageShape:
    """By the processor's file, then the model's, then a guess. Raises ``UserError`` for a value that cannot be."""
    nothing = Declared("", {})
    vision = settings.section("vision_config") or nothing
    processor = nothing
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not processor.values and (folder / name).is_file():
            stored = read_declared(folder / name)
            processor = stored.section("image_processor") or stored
    size = processor.section("size") or nothing
    # Each is looked at, also where another one comes first.
    patch, patch_of_model = processor.number("patch_size"), vision.number("patch_size")
    merge, merge_of_model = processor.number("merge_size"), vision.number("spatial_merge_size")
    frames, frames_of_model = processor.number("temporal_patch_size"), vision.number("temporal_patch_size")
    low, shortest = processor.number("min_pixels", least=0), size.number("shortest_edge", least=0)
    high, longest = processor.number("max_pixels"), size.number("longest_edge")
    patch = patch or patch_of_model or 16
    merge = merge or merge_of_model or 1
    high = config.max_pixels or high or longest
    return PageShape(
        patch_pixels=patch,
        merge=merge,
        channels=vision.number("in_channels") or 3,
        frames=frames or frames_of_model or 1,
        min_pixels=config.min_pixels or low or shortest or (patch * merge) ** 2,
        max_pixels=high or 1_000_000,
        is_known=high is not None and "spatial_merge_size" in vision.values,
    )
