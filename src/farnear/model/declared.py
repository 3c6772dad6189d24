"""What a model's own files say of it, before it is built: its config, the width of its embeddings, how it reads pages.

The files come from anywhere, so every value that is used is looked at first, and a wrong one is named with its file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farnear.errors import UserError
from farnear.model.pixels import PageTokens, ProportionalTokens, SmartResizeTokens, pixel_bounds
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
        is_one_size: Whether all pages are brought to one size, or each keeps its shape.
    """

    patch_pixels: int
    merge: int
    channels: int
    frames: int
    min_pixels: int
    max_pixels: int
    is_known: bool
    is_one_size: bool = False

    @property
    def tokens_of(self) -> PageTokens:
        """What a page costs, as a run counts it (`farnear.model.pixels.page_tokens`)."""
        if self.is_one_size:
            return ProportionalTokens((self.patch_pixels * self.merge) ** 2, self.min_pixels, self.max_pixels)
        return SmartResizeTokens(self.patch_pixels, self.merge, self.min_pixels, self.max_pixels, True)

    @property
    def most_tokens(self) -> int:
        return max(1, self.max_pixels // (self.patch_pixels * self.merge) ** 2)

    def host_bytes(self, tokens: int) -> int:
        """Of a page on its way to the device: a byte a channel and pixel, or a float."""
        return (4 if self.is_one_size else 1) * tokens * self.merge**2 * self.channels * self.patch_pixels**2


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


def declared_width(settings: Declared) -> int:
    """Of a model's hidden states. Raises ``UserError`` where it is not told, or no width."""
    return told(settings.section("text_config") or settings, "hidden_size")


def told(settings: Declared, key: str) -> int:
    """The whole number under a key that has to be there. Raises ``UserError`` where it is not, or no such number."""
    width = settings.number(key)
    if width is None:
        raise UserError(
            f"{settings.place} tells no {key}, so the embeddings' width is not known; copy the model's own file there"
        )
    return width


def declared_pages(config: ModelConfig, settings: Declared, folder: Path) -> PageShape:
    """By the processor's file, then the model's, then a guess. Raises ``UserError`` for a value that cannot be."""
    nothing = Declared("", {})
    vision = settings.section("vision_config") or nothing
    processor = _processor(folder)
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


def pages_of_one_size(config: ModelConfig, vision: Any, folder: Path) -> PageShape:
    """How a dual encoder reads pages.

    Args:
        vision: Its config's vision part, as transformers has read it.
    """
    stored = _processor(folder).values
    patch, side = int(vision.patch_size), getattr(vision, "image_size", None)
    if side is None:
        # SigLIP 2 of any size pads every page to so many patches.
        patches = int(stored.get("max_num_patches") or vision.num_patches)
        low = high = float(patches * patch**2)
    else:
        defaults: dict[str, Any] = {"do_center_crop": "crop_size" in stored}
        if not {"size", "crop_size"} & stored.keys():
            defaults["size"] = {"height": int(side), "width": int(side)}
        of_run_file = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
        settings = {**defaults, **stored, **{name: value for name, value in of_run_file.items() if value is not None}}
        try:
            low, high = pixel_bounds(settings.get)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the processor's file in {folder} has a size that cannot be read ({error}); copy the model's own there"
            ) from None
    return PageShape(
        patch_pixels=patch,
        merge=1,
        channels=int(vision.num_channels),
        frames=1,
        min_pixels=int(low),
        max_pixels=int(high),
        is_known=True,
        is_one_size=True,
    )


def _processor(folder: Path) -> Declared:
    """What a stored processor says of images; empty where there is none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            stored = read_declared(folder / name)
            found = stored.section("image_processor") or stored
            if found.values:
                return found
    return Declared("", {})
