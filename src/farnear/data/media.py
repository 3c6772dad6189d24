"""Decode images with Pillow, audio and video with PyAV (the ``media`` extra), which brings its own FFmpeg.

Audio and video come in the forms that sentence-transformers takes: samples with their rate, frames with their times.
Videos are thinned to at most two frames a second here, for a raw minute at 1080p is 11 GB; the model's processor thins
on.
"""

import io
import warnings
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from farnear.errors import UserError

FRAMES_PER_SECOND = 2.0
MAX_FRAMES = 768  # what Qwen's video processors take at most
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


class TooManyPixelsError(ValueError):
    """An image that Pillow does not even open, above 178,956,970 pixels."""


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels by the header of an image file. Raises ValueError where there is none."""
    try:
        return _opened(data).size
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(str(error)) from None
    except Exception as error:  # on broken bytes Pillow's decoders raise almost anything
        raise ValueError(reason_of(error)) from None


def decode_image(data: bytes) -> Image.Image:
    """An image in mode RGB: alpha over white, 16 bits cut to 8, no rotation, no profile. Raises almost anything."""
    image = _in_rgb(_opened(data))
    image.info = {}  # the EXIF block in it would make some image processors rotate the page
    return image


def decode_small(data: bytes, side: int) -> Image.Image:
    """An image for people to look at: upright as its EXIF says, at most ``side`` pixels wide and high, in mode RGB.

    Raises almost anything.
    """
    image = _opened(data)
    image.draft(None, (side, side))  # a JPEG need not be decoded in full
    image = _in_rgb(ImageOps.exif_transpose(image))
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 when it converts, which turns a page white.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reason_of(error: Exception) -> str:
    """What a decoder's error says, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "no PNG, JPEG or WebP"
    return " ".join(str(error).split()) or type(error).__name__


def _opened(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # The limit on pixels is data.max_image_pixels, applied when shards are joined to an index.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)


def decode_audio(data: bytes) -> dict[str, Any]:
    """``{"array": float32 [samples], "sampling_rate": Hz}``, the channels averaged."""
    av = _av()
    with av.open(io.BytesIO(data)) as container:
        stream = _first(container.streams.audio, "audio")
        # The layout stays: FFmpeg's own way to mono adds the channels at 0.7 each, beyond what a sample may be.
        resampler = av.AudioResampler(format="fltp", rate=stream.rate)
        frames = [resampled for frame in container.decode(stream) for resampled in resampler.resample(frame)]
        frames += resampler.resample(None)
        if not frames:
            raise ValueError("it has no samples")
        array = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in frames])
        return {"array": array.astype(np.float32, copy=False), "sampling_rate": int(stream.rate)}


def decode_video(data: bytes) -> dict[str, Any]:
    """``{"array": uint8 [frames, height, width, 3], "video_metadata": {...}}`` of evenly spaced frames.

    The metadata are those of a film of these frames: a processor thins on by them, and looks no frame up that is gone.
    """
    av = _av()
    with av.open(io.BytesIO(data)) as container:
        stream = _first(container.streams.video, "video")
        rate = float(stream.average_rate or 1)
        every = max(1, round(rate / FRAMES_PER_SECOND))
        kept, count = [], 0
        for count, frame in enumerate(container.decode(stream), 1):
            if (count - 1) % every == 0:
                kept.append(frame.to_ndarray(format="rgb24"))
                if len(kept) > MAX_FRAMES:
                    kept, every = kept[::2], every * 2
        if not kept:
            raise ValueError("it has no frames")
        metadata = {
            "fps": rate / every,
            "total_num_frames": len(kept),
            "duration": count / rate,
            "frames_indices": list(range(len(kept))),
        }
        return {"array": np.stack(kept), "video_metadata": metadata}


def _first(streams: Any, what: str) -> Any:
    if not streams:
        raise ValueError(f"it has no {what}")
    return streams[0]


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise UserError(
            "audio and video are decoded by PyAV, which is not installed; pip install 'farnear[media]'"
        ) from error
    return av
