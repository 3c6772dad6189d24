"""Pictures of pages in pages for people: small enough that hundreds of them can be sent on."""

import io

from PIL import Image

SIDE = 200
"""Pixels of a thumbnail at most."""
MOST_BYTES = 4500
"""Of a thumbnail: a report's 60 queries with two rankings, a right page and a picture each stay below 5 MB."""
_QUALITIES = (80, 65, 50, 35)


def thumbnail_bytes(image: Image.Image) -> bytes:
    """A JPEG file of an image in mode RGB, in the quality, and at last in the size, that ``MOST_BYTES`` allows."""
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= MOST_BYTES:
                return buffer.getvalue()
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))
