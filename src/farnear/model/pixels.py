"""Pages travel from the data workers to the device as uint8, and what a page will cost is known before it is read.

A Qwen2-VL image processor resizes a page in uint8, and then makes eight times as many bytes of it: floats, and every
patch as two frames of a video that stands still. Made by the workers, they would pass through shared memory, wait in
pinned memory and cross to the device eight times as wide as the page is. So a worker asks the processor for less, by
arguments of the call that everybody may use (do not rescale, do not normalise, one frame), and gets uint8; the device
normalises and repeats the frames. All that is text, placeholders and grids comes from that same call.

The bytes come in the processor's order of patches, not as rows of an image: that order differs from model to model and
has to fit the grid, and putting it back into rows in the worker, only to know it a second time on the device, would
cost another copy of every page. What is left for the device is the same for pages of all sizes, so a mini-batch is one
tensor and one operation, and its images need no sorting.

Which models this is right for is not believed but tried: small images go both ways when a run starts, and where the
results differ, or for another family of processors, pages take the processor's own way.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from farnear.model.towers import SIDES, readers_of_pages, takes

if TYPE_CHECKING:  # a plan needs neither the model nor the seconds of this import
    from sentence_transformers.base.model import BaseModel

Int64 = npt.NDArray[np.int64]
PageTokens = Callable[[Int64, Int64], Int64]

_FAMILY = "Qwen2VLImageProcessor"
_AS_BYTES = {"image": {"do_rescale": False, "do_normalize": False, "temporal_patch_size": 1}}
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Normalisation:
    """From a byte to the number that the model sees, (byte - mean) / std, and how often a patch holds its frame.

    Attributes:
        mean: In bytes, of each channel; one for all where there is only one.
        std: As ``mean``.
        patch_size: Side of a patch in pixels.
        frames: Frames of a patch, all alike.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int
    frames: int


class PixelBytes(NamedTuple):
    """``pixel_values`` on their way to the device. A tuple, for that is what DataLoader pins and shares by its parts.

    Attributes:
        patch_PB: uint8 [patches, channels * patch_size**2], one frame of each patch, in the processor's order.
        normalisation: What makes floats of them.
    """

    patch_PB: Tensor
    normalisation: Normalisation

    def floats_on(self, device: torch.device) -> Tensor:
        """``pixel_values`` as the processor makes them, float32 [patches, channels * frames * patch_size**2]."""
        rule = self.normalisation
        # Not awaited: a pause here at every mini-batch would keep the device from being given work ahead.
        mean, std = (
            torch.tensor(values)[:, None, None].to(device, non_blocking=True) for values in (rule.mean, rule.std)
        )
        x = self.patch_PB.to(device, non_blocking=True)
        # [patches, channels, one frame, pixels]
        x = x.reshape(len(x), -1, 1, rule.patch_size**2)
        x = (x - mean).div_(std)
        return x.expand(-1, -1, rule.frames, -1).flatten(1)


def uint8_normalisation(model: "BaseModel") -> Normalisation | str:
    """How the model's pages are normalised, if they can travel as uint8, and otherwise why they cannot."""
    found = readers_of_pages(model)
    if len(found) != 1:
        return f"{len(found)} parts of the model read images" if found else "the model reads no images"
    reader = found[0]
    image_processor = image_processor_of(reader)
    if not is_qwen_family(image_processor):
        return f"{type(image_processor).__name__} is not of the Qwen2-VL family"
    try:
        rule = _normalisation(reader)
        return _first_difference(model, reader, rule) or rule
    except Exception as error:  # whatever a processor raises that takes other arguments or has other attributes
        reason = " ".join(str(error).split())[:300]
        return f"{type(image_processor).__name__} cannot be tried ({type(error).__name__}: {reason})"


def preprocess_to_bytes(call: Callable[..., Mapping[str, Any]], rule: Normalisation) -> dict[str, Any]:
    """Features of one mini-batch, with ``pixel_values`` as `PixelBytes` if there are images in it.

    Args:
        call: ``SentenceTransformer.preprocess`` with all arguments but ``processing_kwargs``.
        rule: Of the model.
    """
    features = dict(call(processing_kwargs=_AS_BYTES))
    if "pixel_values" not in features:
        return features
    pixels = features["pixel_values"]
    patch_PB = pixels.to(torch.uint8)
    # The processor without torchvision hands out whole floats, and an image may have come as floats from 0 to 1.
    if pixels.dtype != torch.uint8 and not torch.equal(patch_PB.to(pixels.dtype), pixels):
        return dict(call())
    features["pixel_values"] = PixelBytes(patch_PB, rule)
    return features


def is_qwen_family(image_processor: Any) -> bool:
    """Whether it is the image processor of Qwen2-VL, 2.5-VL and 3-VL, in any of its variants (with PIL, fast)."""
    return any(base.__name__.startswith(_FAMILY) for base in type(image_processor).__mro__)


def _normalisation(reader: Any) -> Normalisation:
    factor = float(_setting(reader, "rescale_factor")) if _setting(reader, "do_rescale") else 1.0
    mean, std = torch.zeros(1), torch.ones(1)
    if _setting(reader, "do_normalize"):
        mean, std = (
            torch.atleast_1d(torch.as_tensor(_setting(reader, name), dtype=torch.float32))
            for name in ("image_mean", "image_std")
        )
    # float32 first and then the factor: so does the processor, and the results agree to the last bit.
    mean, std = mean * (1.0 / factor), std * (1.0 / factor)
    return Normalisation(
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        patch_size=int(_setting(reader, "patch_size")),
        frames=int(_setting(reader, "temporal_patch_size")),
    )


def _first_difference(model: "BaseModel", reader: Any, rule: Normalisation) -> str | None:
    """What differs when two images go both ways; None if nothing does."""
    step = rule.patch_size * int(_setting(reader, "merge_size"))
    odd = 3 if _setting(reader, "do_resize") else 0  # sizes that have to be changed, where sizes are changed
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((3 * step + odd, 2 * step - odd), (2 * step, 5 * step + odd))
    ]

    # A reranker's chat template may know no message but those of a pair; a Router may route by the side.
    of_pairs = model.model_type == "CrossEncoder"
    inputs: list[Any] = [({"text": "a"}, image) for image in images] if of_pairs else images
    side = {} if of_pairs else {"task": next(side for side in SIDES if takes(model, side, "image"))}

    def call(**kwargs: Any) -> Mapping[str, Any]:
        return model.preprocess(inputs, **side, **kwargs)

    expected, actual = call(), preprocess_to_bytes(call, rule)
    if expected.keys() != actual.keys():
        return f"asked for uint8, the processor gives {sorted(actual)} instead of {sorted(expected)}"
    for name, value in expected.items():
        other = actual[name]
        if isinstance(other, PixelBytes):
            other = other.floats_on(torch.device("cpu"))
            same = (
                value.dtype == other.dtype
                and value.shape == other.shape
                and bool((value - other).abs().max() <= _TOLERANCE)
            )
        else:
            same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        if not same:
            return f"asked for uint8, the processor gives other {name}"
    return None if isinstance(actual["pixel_values"], PixelBytes) else "the processor gives no whole bytes"


def page_tokens(model: "BaseModel") -> PageTokens:
    """What a page costs the language model, from its width and height in pixels: a function that can be pickled.

    For the Qwen2-VL family it is exact: image placeholders after ``smart_resize``. A page that the processor refuses,
    because it is too long for its width, costs as much as the largest. For others it is an estimate: the pixels that
    are left after resizing, as far as the processor's settings tell, in the model's patches.
    """
    reader = next(iter(readers_of_pages(model)), model[0])
    if is_qwen_family(image_processor_of(reader)):
        size = _sizes(_setting(reader, "size"))
        return SmartResizeTokens(
            patch_size=int(_setting(reader, "patch_size")),
            merge_size=int(_setting(reader, "merge_size")),
            min_pixels=_setting(reader, "min_pixels") or size["shortest_edge"],
            max_pixels=_setting(reader, "max_pixels") or size["longest_edge"],
            resizes=bool(_setting(reader, "do_resize")),
        )
    pixels_per_token = _pixels_per_token(reader)
    # SigLIP 2 of any size pads every page to so many patches.
    if patches := _setting(reader, "max_num_patches"):
        return ProportionalTokens(1.0, float(patches), float(patches))
    return ProportionalTokens(pixels_per_token, *pixel_bounds(partial(_setting, reader)))


@dataclass(frozen=True)
class SmartResizeTokens:
    """Image placeholders of a page under the Qwen2-VL family's ``smart_resize``."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    resizes: bool

    def __call__(self, width_n: Int64, height_n: Int64) -> Int64:
        """Tokens [n] of pages of these sizes in pixels."""
        side = self.patch_size * self.merge_size
        w, h = (np.maximum(np.asarray(size_n, np.float64), 1.0) for size_n in (width_n, height_n))
        if not self.resizes:
            return (np.maximum(w // side, 1) * np.maximum(h // side, 1)).astype(np.int64)
        # Operations and their order are smart_resize's, so that no rounding falls the other way.
        # https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2_vl/
        w_n, h_n = np.rint(w / side), np.rint(h / side)
        pixels_n = w_n * side * (h_n * side)
        too_large, too_small = pixels_n > self.max_pixels, pixels_n < self.min_pixels
        shrink, grow = np.sqrt(h * w / self.max_pixels), np.sqrt(self.min_pixels / (h * w))
        w_n, h_n = (
            np.where(
                too_large,
                np.maximum(np.floor(x / shrink / side), 1),
                np.where(too_small, np.ceil(x * grow / side), x_n),
            )
            for x, x_n in ((w, w_n), (h, h_n))
        )
        refused = np.maximum(w, h) / np.minimum(w, h) > 200
        largest = max(self.max_pixels // side**2, 1)
        return np.where(refused, largest, w_n * h_n).astype(np.int64)


@dataclass(frozen=True)
class ProportionalTokens:
    """An estimate of a page's cost: its pixels between two bounds; the bounds are equal where all pages become one."""

    pixels_per_token: float
    min_pixels: float
    max_pixels: float

    def __call__(self, width_n: Int64, height_n: Int64) -> Int64:
        """Tokens [n] of pages of these sizes in pixels; at least 1."""
        pixels_n = np.asarray(width_n, np.float64) * np.asarray(height_n, np.float64)
        tokens_n = np.clip(pixels_n, self.min_pixels, self.max_pixels) / self.pixels_per_token
        return np.maximum(np.rint(tokens_n), 1).astype(np.int64)


def pixel_bounds(setting: Callable[[str], Any]) -> tuple[float, float]:
    """Fewest and most pixels of a page after resizing, as far as the settings of a processor tell.

    Args:
        setting: What one is, by its name; None where there is none.
    """
    crop = setting("crop_size") if setting("do_center_crop") else None
    size = dict(crop) if isinstance(crop, Mapping) else _sizes(setting("size"))
    if size.get("height") and size.get("width"):
        pixels = float(size["height"] * size["width"])
        return pixels, pixels
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    if high is not None and high > 8192:  # no edge is that long: these are pixels of the whole page
        bounds = low or 1, high
    elif low is not None:
        bounds = low**2, low * (high or low)
    elif high is not None:
        bounds = 1, high**2
    elif size.get("max_height") and size.get("max_width"):
        bounds = 1, size["max_height"] * size["max_width"]
    else:
        bounds = 1, np.inf
    fewest = float(setting("min_pixels") or bounds[0])
    return fewest, max(fewest, float(setting("max_pixels") or bounds[1]))


def _pixels_per_token(reader: Any) -> float:
    config = getattr(reader, "config", None)
    vision = getattr(config, "vision_config", config)
    patch: Any = _setting(reader, "patch_size") or getattr(vision, "patch_size", None)
    if isinstance(patch, Mapping):
        patch = patch.get("height")
    return float(int(patch or 16) * int(_setting(reader, "merge_size") or 1)) ** 2


def image_processor_of(reader: Any) -> Any:
    """The part of a module's processor that takes images; None where there is no processor."""
    processor = getattr(reader, "processor", None)
    return getattr(processor, "image_processor", processor)


def _sizes(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {name: value for name, value in dict(size or {}).items() if value is not None}


def _setting(reader: Any, name: str) -> Any:
    """A setting as it is in force when the module preprocesses."""
    for holder in call_settings(reader):
        if holder.get(name) is not None:
            return holder[name]
    return getattr(image_processor_of(reader), name, None)


def call_settings(reader: Any) -> Iterator[dict[str, Any]]:
    """What overrides an image processor's own settings in every call, the strongest first.

    sentence-transformers passes the arguments stored with the module. transformers passes to every part of a processor
    what its tokenizer was made with, and that is all that ``from_pretrained`` was given.
    """
    stored = getattr(reader, "processing_kwargs", None) or {}
    yield stored.get("image") or {}
    yield getattr(getattr(getattr(reader, "processor", None), "tokenizer", None), "init_kwargs", None) or {}
