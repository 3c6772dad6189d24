"""Pages from wherever they lie: the bytes of an image file, a path, an address, an array.

The bytes of a PNG, JPEG or WebP go into a shard as they are: what was compressed once is not compressed again, and a
photo does not grow by becoming a PNG. Everything else that Pillow can open (TIFF, BMP, GIF, ...) is a format that the
reader of shards does not decode; it becomes a PNG, which loses nothing, and importers count and tell how many did.

Every image is decoded once when it is imported. A broken one found here costs a line of an import; found in a training
run, it costs that run.
"""

import hashlib
import io
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")  # of Pillow
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
TEXT_EXTENSION = "txt"
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
_FETCH_ATTEMPTS = 4
_FETCH_TIMEOUT_SECONDS = 30.0
_FIRST_WAIT_SECONDS = 0.5
_PLACE_SHOWN = 100  # characters
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)  # what a server says when another try may do


class BadPageError(Exception):
    """A value is no page. The message is the end of a sentence: "which is ..."."""


@dataclass(frozen=True)
class PageFile:
    """What a query may find: the bytes of an image file, or a text in UTF-8, with the extension that says which.

    Attributes:
        converted_from: the format that was turned into PNG, None when the bytes are the source's own.
    """

    data: bytes
    extension: str
    converted_from: str | None = None


def extension_of(data: bytes) -> str | None:
    """`png`, `jpg` or `webp` by the first bytes of a file; None for what the reader of shards cannot decode."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def fault_of(image: bytes) -> str | None:
    """Why training could not read an image, which would stop it days later; the end of a sentence: "which ..."."""
    try:
        with Image.open(io.BytesIO(image), formats=IMAGE_FORMATS) as picture:
            picture.draft("RGB", (64, 64))  # a JPEG need not be decoded at its full size to be seen whole
            picture.load()
    except UnidentifiedImageError:
        return f"which is no image of the kinds {', '.join(IMAGE_FORMATS)}"
    except Exception as error:  # on broken bytes Pillow's decoders raise almost anything
        return f"which cannot be decoded ({' '.join(str(error).split())})"
    return None


def page_from_bytes(data: bytes) -> PageFile:
    """An image file as a page, converted only when it must be.

    Raises:
        BadPageError: it is empty, no image, or cannot be decoded.
    """
    if not data:
        raise BadPageError("which is empty")
    extension = extension_of(data)
    if extension is not None:
        if fault := fault_of(data):
            raise BadPageError(fault)
        return PageFile(data, extension)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return PageFile(_png(picture), "png", converted_from=picture.format or "an unnamed format")
    except UnidentifiedImageError:
        raise BadPageError("which is no image that Pillow knows") from None
    except Exception as error:
        raise BadPageError(f"which cannot be decoded ({' '.join(str(error).split())})") from error


def page_from(value: Any, folder: Path) -> PageFile:
    """A cell of a table as a page.

    Args:
        value: the bytes of an image file; a path; an http(s) address; what `datasets` makes of an image that it does
            not decode ({"bytes", "path"}); or an array as nested lists of shape [H, W, 3] (RGB), [H, W, 1] or [H, W]
            (grey), values 0 to 255.
        folder: where relative paths start.

    Raises:
        BadPageError: there is no page in it.
    """
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return page_from_bytes(value)
    if isinstance(value, str):
        return page_from_bytes(_bytes_at(value, folder))
    if isinstance(value, list):
        return PageFile(_png(_picture_of_array(value)), "png", converted_from="an array")
    raise BadPageError(f"which is {type(value).__name__} and not an image's bytes, path, address or array")


def page_from_text(text: str) -> PageFile:
    """A document of plain text as a page. Raises BadPageError when it is empty."""
    if not text.strip():
        raise BadPageError("which is empty")
    return PageFile(text.encode(), TEXT_EXTENSION)


def name_of(value: Any) -> str:
    """A name by which equal pages are known without fetching or decoding them: their address, or a hash."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return hash_of(value)
    if isinstance(value, str):
        return value
    return hash_of(repr(value).encode())


def hash_of(data: bytes) -> str:
    """BLAKE2b of 16 bytes in hex: the name of a page by its content."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def is_address(text: str) -> bool:
    """Whether a string is an http or https address and not a path."""
    return text.lower().startswith(("http://", "https://"))


def _bytes_at(place: str, folder: Path) -> bytes:
    if is_address(place):
        return _fetched(place)
    path = folder / place
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadPageError(
            f"which names {_shortened(place)}, but there is no such file in {folder}{_hint(place)}"
        ) from None
    except OSError as error:
        reason = f"{error.strerror or error}{_hint(place)}"
        raise BadPageError(f"which names {_shortened(place)}, which cannot be read ({reason})") from error


def _shortened(place: str) -> str:
    return repr(place if len(place) <= _PLACE_SHOWN else f"{place[:_PLACE_SHOWN]}...")


def _hint(place: str) -> str:
    is_path = Path(place).suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
    return "" if is_path else "; if the column holds texts and not paths, say --texts"


def _fetched(address: str) -> bytes:
    """What an address holds. A server that is busy or away is asked again a few times, later each time."""
    quoted = urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(quoted, headers={"User-Agent": "farnear"})
    for attempt in range(_FETCH_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=_FETCH_TIMEOUT_SECONDS) as answer:
                data: bytes = answer.read()
                return data
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code not in _PASSING_STATUS:
                break
        except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    raise BadPageError(f"which names {address}, which cannot be fetched ({reason})")


def _picture_of_array(value: Any) -> Image.Image:
    import numpy as np

    try:
        array = np.asarray(value)
    except ValueError:
        raise BadPageError("which is a list of unequal rows and not an image") from None
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if not (grey or (array.ndim == 3 and array.shape[2] == 3)) or array.size == 0:
        raise BadPageError(f"which is an array of shape {list(array.shape)} and not [height, width, 3]")
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
        raise BadPageError(f"which is an array of {array.dtype} and not of whole numbers from 0 to 255")
    pixels = array.astype(np.uint8)
    return Image.fromarray(pixels.reshape(pixels.shape[:2]) if grey else pixels)


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    (picture if picture.mode in _PNG_MODES else picture.convert("RGB")).save(stream, "PNG")
    return stream.getvalue()
