"""What the members of a sample mean: names, queries in JSON, and the identity of a query and of a page.

A shard follows the WebDataset convention: the members of one sample stand together and share a key, the path up to the
first dot of the file's name. The rest of the name says what a member is. A sample has up to three kinds of slots, and
each slot holds one input of the model, made of one or several parts:

    KEY.json                       "query": a text, several texts (a pair each), or chat messages
                                   "pos_id" or "pos_ids", "neg_ids": pages that stand in corpus shards, by their keys
    KEY.query.EXT                  parts of the query
    KEY.EXT                        parts of the positive document, most often one page: KEY.png
    KEY.neg0.EXT, KEY.neg1.EXT     parts of hard negatives, in the order of their numbers

EXT is txt (text), png, jpg, jpeg or webp (image), wav, flac, mp3 or ogg (audio), mp4, webm, mkv, mov or avi (video), or
messages.json (chat messages; a content part that is a bare ``{"type": "image"}`` stands for the slot's image). A corpus
shard holds documents only, KEY.EXT; the hard negatives of a shard of pairs that is used as one are documents KEY.neg0.
"""

import json
import re
from typing import Any

import xxhash

# Kinds of parts, as the index stores them.
JSON_TEXT, TEXT, IMAGE, AUDIO, VIDEO, MESSAGES, JSON_MESSAGES = range(7)

EXTENSIONS = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), IMAGE),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg"), AUDIO),
    **dict.fromkeys(("mp4", "webm", "mkv", "mov", "avi"), VIDEO),
    "txt": TEXT,
    "messages.json": MESSAGES,
}
MODALITIES = {JSON_TEXT: "text", TEXT: "text", IMAGE: "image", AUDIO: "audio", VIDEO: "video"}
"""sentence-transformers' name of each kind's modality; those that are not here are kinds of messages."""

_MEDIA = ("image", "audio", "video")
_SUFFIX = re.compile(rf"(?:(?P<slot>query|neg\d+)\.)?(?P<extension>{'|'.join(map(re.escape, EXTENSIONS))})")
_NEGATIVE = re.compile(r"neg\d+\..*")

Query = str | list[dict[str, Any]]
"""A text, or chat messages."""


def split_name(name: str) -> tuple[str, str]:
    """``"a/b.neg0.png"`` -> ``("a/b", "neg0.png")``; the key is empty where a file's name has nothing before a dot.

    ``tar -C FOLDER .`` writes ``./a/b.png``, which is the same name.
    """
    folder, slash, basename = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = basename.partition(".")
    return (folder + slash + stem, suffix) if stem and dot else ("", suffix)


def part_of(suffix: str) -> tuple[str, int] | None:
    """(slot, kind) of a member that is a part: the slot is "query", "positive" or "neg" with a number; else None.

    Raises ValueError for a hard negative of no known kind, which must not be overlooked.
    """
    suffix = suffix.lower()
    match = _SUFFIX.fullmatch(suffix)
    if match is None:
        if _NEGATIVE.fullmatch(suffix):
            raise ValueError(f"a hard negative of the unknown kind {suffix!r}")
        return None
    slot = match["slot"] or "positive"
    if slot.startswith("neg"):
        slot = f"neg{int(slot[3:])}"
    return slot, EXTENSIONS[match["extension"]]


def parse_json(data: bytes) -> dict[str, Any]:
    """The object of a KEY.json. Raises ValueError."""
    try:
        record = json.loads(data)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("the JSON is not an object")
    return record


def queries_of(record: dict[str, Any]) -> tuple[list[Query], bool]:
    """The queries of a KEY.json, and whether they came as a list of several; none where it has no "query".

    Raises ValueError for what is no query.
    """
    if "query" not in record:
        return [], False
    query = record["query"]
    if isinstance(query, list) and query and all(isinstance(one, dict) for one in query):
        return [check_messages(query)], False
    if isinstance(query, list):
        if not query:
            raise ValueError("the list of queries is empty")
        return [check_text(one) for one in query], True
    return [check_text(query)], False


def check_text(text: Any) -> str:
    """The text without the white space around it. Raises ValueError where it is empty or no text."""
    if not isinstance(text, str):
        raise ValueError(f"{json.dumps(text)[:40]} is not a text")
    if not text.strip():
        raise ValueError("the text is empty")
    text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer accepts
    return text.strip()


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Chat messages whose media are placeholders only: a path or an address in a shard must never be opened.

    Raises ValueError.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("chat messages are a list of objects with 'role' and 'content'")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError("a chat message has 'role' and 'content' and nothing else")
        check_text(message["role"])
        content = message["content"]
        if isinstance(content, str):
            check_text(content)
            continue
        if not isinstance(content, list) or not content:
            raise ValueError("the content of a chat message is a text or a list of parts")
        for part in content:
            if isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text":
                check_text(part["text"])
            elif not isinstance(part, dict) or set(part) != {"type"} or part["type"] not in _MEDIA:
                raise ValueError(
                    'a content part is {"type": "text", "text": ...} or a bare {"type": "image"}, "audio" or "video"'
                )
    return messages


def media_of(messages: list[dict[str, Any]]) -> list[str]:
    """The modalities that checked messages have a place for, in their order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part["type"] for content in contents for part in content if part["type"] != "text"]


def ids_of(record: dict[str, Any], *names: str) -> list[str]:
    """Keys of pages under ``names`` of a KEY.json, each once, in their order; null means none. Raises ValueError."""
    found: list[str] = []
    for name in names:
        value = record.get(name)
        ids = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(ids, list) or not all(isinstance(one, str) and one for one in ids):
            raise ValueError(f"{name!r} is not a page's key or a list of them")
        found += [one.removeprefix("./") for one in ids]
    "".join(found).encode("utf-8")  # as in check_text
    return list(dict.fromkeys(found))


def hash_bytes(data: bytes) -> int:
    """XXH3 of 64 bits as a signed integer, so that it fits an int64 column; many GB/s, so every read can be checked."""
    value = xxhash.xxh3_64_intdigest(data)
    return value - (1 << 64) if value >= 1 << 63 else value


def hash_query(query: Query) -> int:
    """The hash by which two queries count as the same: in texts, white space and case do not matter."""
    if isinstance(query, str):
        return hash_bytes(" ".join(query.split()).casefold().encode("utf-8"))
    return hash_bytes(json.dumps(query, sort_keys=True).encode())


def hash_parts(hashes: list[int]) -> int:
    """The identity of an input: of one part its own hash, of several that of all in their order."""
    return hashes[0] if len(hashes) == 1 else hash_bytes(repr(hashes).encode())
