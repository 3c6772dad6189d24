"""Read one input of the model, a query or a document, at its offsets, and decode it.

A read is a ``pread``, which needs no position in the file, so any input of any shard costs the same. The bytes are
compared with the hash that the scan took: a shard that was changed in place is noticed at the pair that it breaks.

What cannot be read or decoded is a ``BadInputError`` that names shard and member; nothing is made up in its place,
above all no blank page. The loader quarantines such a pair, an evaluation stops.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from PIL import Image

from farnear.data.index import Index
from farnear.data.media import decode_audio, decode_image, decode_small, decode_video, reason_of
from farnear.data.remote import shown
from farnear.data.sample import (
    AUDIO,
    IMAGE,
    JSON_MESSAGES,
    JSON_TEXT,
    MESSAGES,
    MODALITIES,
    TEXT,
    VIDEO,
    check_messages,
    check_text,
    hash_bytes,
    parse_json,
    queries_of,
)
from farnear.data.shard_store import OpenShards, ShardFacts, ShardStore
from farnear.errors import UserError

Value = TypeVar("Value")


class BadInputError(UserError):
    """One query or document cannot be used; ``reason`` says why without naming it."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadInputError"], tuple[str, str]]:
        return BadInputError, (str(self), self.reason)


class InputReader:
    """Queries and documents of an index by input row. It can be sent to another process; threads must not share one."""

    def __init__(self, index: Index, store: ShardStore) -> None:
        self.index = index
        self._shards = OpenShards(store)

    def __getitem__(self, row: int) -> Any:
        """An input in one of sentence-transformers' forms.

        A text is a ``str`` without the white space around it, an image in mode RGB (alpha over white, 16 bits cut to 8,
        no rotation, no profile), audio ``{"array": float32 [samples], "sampling_rate": Hz}``, a video ``{"array": uint8
        [frames, height, width, 3], "video_metadata": {...}}``, several of these a dict by modality, chat messages a
        list with their media in place. Raises ``BadInputError``, and ``UserError`` where a whole shard cannot be read.
        """
        values: dict[str, Any] = {}
        messages = None
        for part in self.index.parts(row):
            kind, value = self._kind(part), self._value(part, _decoded)
            if kind in (MESSAGES, JSON_MESSAGES):
                messages = value
            else:
                values[MODALITIES[kind]] = value
        if messages is not None:
            return _with_media(messages, values)
        if len(values) > 1:
            return values
        ((modality, value),) = values.items()
        return {modality: value} if modality in ("audio", "video") else value

    def words(self, row: int) -> str:
        """The texts of an input, for people to read; empty where it has none. Nothing else is decoded.

        Raises as ``reader[row]``.
        """
        parts = [part for part in self.index.parts(row) if self._kind(part) not in (IMAGE, AUDIO, VIDEO)]
        return " ".join(text for part in parts for text in _texts(self._value(part, _decoded)))

    def picture(self, row: int, side: int) -> Image.Image | None:
        """The first image of an input, for people to look at: upright, at most ``side`` pixels wide and high, RGB.

        None where it has none. Raises as ``reader[row]``.
        """
        part = next((part for part in self.index.parts(row) if self._kind(part) == IMAGE), None)
        return None if part is None else self._value(part, lambda data, *_: decode_small(data, side))

    def close(self) -> None:
        """Close the open shards. They are opened again when they are needed."""
        self._shards.close()

    def _kind(self, part: int) -> int:
        return int(self.index.part_kind_M[part])

    def _value(self, part: int, decode: Callable[[bytes, int, int], Value]) -> Value:
        """What ``decode`` makes of a part's bytes, its kind and its place in a list of queries."""
        try:
            return decode(self._read(part), self._kind(part), int(self.index.part_entry_M[part]))
        except (MemoryError, UserError):
            raise
        except Exception as error:  # on broken bytes decoders raise almost anything
            raise self._bad(part, f"cannot be decoded ({reason_of(error)})") from error

    def _read(self, part: int) -> bytes:
        index = self.index
        shard = int(index.part_shard_M[part])
        facts = ShardFacts(index.shards[shard], int(index.shard_size_S[shard]), index.etags[shard])
        place = int(index.part_offset_M[part]), int(index.part_size_M[part])
        data = self._shards.read(facts, *place)
        # The disk may have spoilt the copy of a shard that is right where it comes from.
        if hash_bytes(data) != index.part_hash_M[part] and self._shards.fetch_again(facts):
            data = self._shards.read(facts, *place)
        if hash_bytes(data) != index.part_hash_M[part]:
            raise self._bad(part, "has other bytes than when it was indexed")
        return data

    def _bad(self, part: int, reason: str) -> BadInputError:
        index = self.index
        where = f"{index.part_name[part]!r} in shard {shown(index.shards[int(index.part_shard_M[part])])}"
        return BadInputError(
            f"the member {where} {reason}, so its pair cannot be used; write it again, or name the pair in a file of "
            "data.exclude",
            reason,
        )


def text_of(value: Any) -> str:
    """The words of an input, as `InputReader` gives it; empty where it has none."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return str(value.get("text", ""))
    if not isinstance(value, list):
        return ""
    contents = [
        [message["content"]] if isinstance(message["content"], str) else message["content"] for message in value
    ]
    return " ".join(
        part if isinstance(part, str) else str(part.get("text", "")) for parts in contents for part in parts
    )


def _with_media(messages: list[dict[str, Any]], values: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages with the media in the places of their stand-ins; that each has one the scan has seen to."""
    for message in messages:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] != "text":
                    part[part["type"]] = values[part["type"]]
    return messages


def _texts(value: Any) -> list[str]:
    """Of a text, or of chat messages."""
    if isinstance(value, str):
        return [value]
    contents = [message["content"] for message in value]
    return [
        text
        for content in contents
        for text in ([content] if isinstance(content, str) else [part["text"] for part in content if "text" in part])
    ]


def _decoded(data: bytes, kind: int, entry: int) -> Any:
    if kind in (JSON_TEXT, JSON_MESSAGES):
        return queries_of(parse_json(data))[0][max(entry, 0)]
    if kind == TEXT:
        return check_text(data.decode("utf-8-sig"))
    if kind == MESSAGES:
        return check_messages(json.loads(data))
    return {IMAGE: decode_image, AUDIO: decode_audio, VIDEO: decode_video}[kind](data)
