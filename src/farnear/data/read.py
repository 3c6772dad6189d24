"""Read one query or one page at its offset, and decode the page to RGB.

A read is a ``pread``, which needs no position in the file, so any pair of any shard costs the same. Shards are opened
when they are first needed and at most 256 stay open. A worker process opens its own: with a descriptor shared between
processes the kernel would see their reads as one stream and misjudge its read-ahead.

Offsets are worth nothing in a shard that was written again, so the size of a shard is compared with the index when it
is opened. What cannot be read or decoded is a ``UserError`` that names shard and member; nothing is made up in its
place, above all no blank page.
"""

import io
import os
from collections import OrderedDict

import numpy as np
from PIL import Image, UnidentifiedImageError

from farnear.data.index import Index
from farnear.data.scan import parse_query
from farnear.errors import UserError

_OPEN_SHARDS = 256
_FORMATS = ("PNG", "JPEG", "WEBP")
_CHANGED = "so it was changed after it was indexed; build the index again"


class PairReader:
    """Queries and pages of an index by row. It can be sent to another process; threads must not share one."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._file_of_shard: OrderedDict[int, io.FileIO] = OrderedDict()

    def __reduce__(self) -> tuple[type["PairReader"], tuple[Index]]:
        # Open files stay where they are.
        return PairReader, (self.index,)

    def query(self, pair: int) -> str:
        """The text of a pair's query, without the white space around it."""
        index = self.index
        shard = int(index.query_shard_N[pair])
        data = self._read(shard, int(index.query_offset_N[pair]), int(index.query_size_N[pair]))
        try:
            query = parse_query(data, bool(index.query_is_json_N[pair]))
        except ValueError:
            query = None
        if query is None:
            raise UserError(
                f"shard {index.shards[shard]} has no query for {index.pair_key[pair]!r} any more, {_CHANGED}"
            )
        return query

    def page(self, page: int) -> Image.Image:
        """The page in a page row, decoded to mode RGB: alpha over white, 16 bits cut to 8, no rotation, no profile."""
        index = self.index
        shard = int(index.page_shard_P[page])
        data = self._read(shard, int(index.page_offset_P[page]), int(index.page_size_P[page]))
        try:
            return _to_rgb(Image.open(io.BytesIO(data), formats=_FORMATS))
        except MemoryError:
            raise
        except Exception as error:  # on broken bytes Pillow's decoders raise almost anything
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "no PNG, JPEG or WebP" if unknown else " ".join(str(error).split())
            raise UserError(
                f"the page {index.page_name[page]!r} in shard {index.shards[shard]} cannot be decoded ({reason}), so "
                f"its pair cannot be used; write the page again or drop its sample"
            ) from error

    def close(self) -> None:
        """Close the open shards. They are opened again when they are needed."""
        while self._file_of_shard:
            self._file_of_shard.popitem()[1].close()

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        name = self.index.shards[shard]
        end = offset + size
        pieces = []
        try:
            file = self._open(shard)
            while offset < end:  # one pread may return less than asked
                piece = os.pread(file.fileno(), end - offset, offset)
                if not piece:
                    raise UserError(f"shard {name} ends at byte {offset} and its index says {end}, {_CHANGED}")
                pieces.append(piece)
                offset += len(piece)
        except OSError as error:
            raise UserError(f"shard {name} cannot be read ({error.strerror}); check its path and its disk") from error
        return b"".join(pieces)

    def _open(self, shard: int) -> io.FileIO:
        file = self._file_of_shard.get(shard)
        if file is not None:
            self._file_of_shard.move_to_end(shard)
            return file
        name, indexed_size = self.index.shards[shard], int(self.index.shard_size_S[shard])
        file = io.FileIO(name)
        size = os.fstat(file.fileno()).st_size
        if size != indexed_size:
            file.close()
            raise UserError(f"shard {name} has {size} bytes and its index says {indexed_size}, {_CHANGED}")
        if len(self._file_of_shard) >= _OPEN_SHARDS:
            self._file_of_shard.popitem(last=False)[1].close()
        self._file_of_shard[shard] = file
        return file


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 when it converts, which turns a page white.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # the EXIF block in it would make some image processors rotate the page
    return image
