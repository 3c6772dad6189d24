"""One attempt at an object behind a url: its facts, its bytes, the names that match a glob. Over http(s), s3 and hf.

fsspec does the transfer. What is added here is what it leaves out: a time limit for every silence of the other side,
and the comparison of each answer with the facts of the object that was indexed, on the answer's own header, so that an
object that is replaced while it is read is noticed without asking twice. Nothing is tried again here, and the libraries
are told not to: ``remote`` tries again, in one place and for all protocols alike.

- http(s): fsspec streams an answer and hides its header, but hands unknown arguments to aiohttp, which calls a function
  with the header of the answer before the body is read. Servers without ranges serve whole objects.
- s3: s3fs's own readers send no If-Match and drop the header too, so GetObject is called through s3fs's ``call_s3``.
- hf: ``HfFileSystem`` tells the hash of a file's content, but shows no header of an answer, and has its own few retries
  that cannot be turned off. A range is therefore compared by its length only, see ``ANSWERS_TELL_IDENTITY``.

File systems are fsspec's own instances, one a thread and process and configured by the user in fsspec's or the
protocol's own way; nothing of them is kept here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from farnear.errors import UserError

_PIECE = 4 << 20  # read from a connection at once, at most
_HF_PIECE = 64 << 20  # a request each, and the hub counts requests

ANSWERS_TELL_IDENTITY = {"http": True, "https": True, "s3": True, "hf": False}
"""The protocols that can be read, and whether a changed object shows in the answer to the read itself."""

_EXTRA = {"http": "http", "https": "http", "s3": "s3"}


@dataclass(frozen=True)
class RemoteFacts:
    """What tells one state of an object from another."""

    size: int  # bytes
    etag: str  # as the server writes it; where it gives none its date of change, and "" where it gives neither


class ChangedError(Exception):
    """The object is not the one of the facts any more. The message says what differs."""


def protocol_of(url: str) -> str:
    """The protocol of a url. Raises ``UserError`` for one that cannot be read."""
    protocol = url.partition("://")[0].lower()
    try:
        urlsplit(url)
    except ValueError as error:
        raise UserError(f"{shown(url)} is no url ({error}), so nothing can be read there; correct it") from None
    if protocol not in ANSWERS_TELL_IDENTITY:
        raise UserError(
            f"{shown(url)} has the protocol {protocol!r}, which cannot be read; use a path or one of "
            f"{', '.join(ANSWERS_TELL_IDENTITY)}"
        )
    return protocol


def shown(url: str) -> str:
    """The url as messages name it: without a query or a password, which may be a key to the object."""
    protocol, separator, rest = url.partition("://")
    if protocol.lower() not in ("http", "https"):
        return url
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{protocol}{separator}{host.rpartition('@')[2]}{slash}{path}"


def short_name(shard: str) -> str:
    """The last part of a path or url, as messages name it."""
    return PurePosixPath(shown(shard)).name


def find_facts(url: str, seconds_stalled: float) -> RemoteFacts:
    """Size and etag of the object, asked for anew.

    Raises:
        UserError: It is a folder, its size is not told, or a package is missing.
        Exception: Whatever the protocol's library raises when it fails.
    """
    protocol = protocol_of(url)
    if protocol == "s3":
        found = _s3(seconds_stalled).info(url, refresh=True, timeout=seconds_stalled)
    elif protocol == "hf":
        # Without `expand_info` a fresh answer is cut to name, size and type.
        found = _file_system(url).info(url, refresh=True, expand_info=True)
    else:
        found = _file_system(url).info(url, timeout=seconds_stalled)
    if found["type"] != "file":
        raise UserError(f"{shown(url)} is a folder and not a tar, so its pairs would be missing; name its shards")
    if found["size"] is None:
        raise UserError(
            f"the server does not tell the size of {shown(url)}, so a part of it could not be told from the whole; "
            f"serve it with a Content-Length"
        )
    return RemoteFacts(int(found["size"]), _etag(found))


def _etag(found: dict[str, Any]) -> str:
    if found.get("lfs"):
        return str(found["lfs"]["sha256"])
    names = ("ETag", "Last-Modified", "xet_hash", "blob_id")
    return next((str(found[name]) for name in names if found.get(name)), "")


def stream(url: str, start: int, stop: int, facts: RemoteFacts, seconds_stalled: float) -> Iterator[bytes]:
    """Yield the bytes from ``start`` to ``stop`` in pieces; fewer when the connection ends early and says so to nobody.

    Raises:
        ChangedError: The answer is about another object than ``facts``.
        Exception: Whatever the protocol's library raises when it fails.
    """
    readers = {"s3": _stream_s3, "hf": _stream_hf}
    return readers.get(protocol_of(url), _stream_http)(url, start, stop, facts, seconds_stalled)


def list_files(pattern: str, seconds_stalled: float) -> list[str]:
    """The urls of the files that match a glob, sorted, listed anew. For s3 and hf."""
    protocol = protocol_of(pattern)
    file_system = _s3(seconds_stalled) if protocol == "s3" else _file_system(pattern)
    file_system.invalidate_cache()
    found = file_system.glob(pattern, detail=True)
    return sorted(f"{protocol}://{name}" for name, entry in found.items() if entry["type"] == "file")


def _stream_http(url: str, start: int, stop: int, facts: RemoteFacts, seconds_stalled: float) -> Iterator[bytes]:
    file_system = _file_system(url)
    from aiohttp import ClientTimeout

    async def check(response: Any) -> None:
        try:
            if response.status == 416:
                raise ChangedError(f"it has no byte {stop - 1} any more")
            response.raise_for_status()
            headers = response.headers
            whole = response.status == 200
            if whole and (start, stop) != (0, facts.size):
                raise UserError(
                    f"the server of {shown(url)} sends whole objects only, so its pairs cannot be read one by one; "
                    f"set data.remote: cache, or use a server that answers range requests"
                )
            told = headers.get("Content-Length") if whole else _total(headers.get("Content-Range", ""))
            _compare(facts, told, (headers.get("ETag"), headers.get("Last-Modified")))
        except BaseException:
            response.close()  # aiohttp leaves it open then
            raise

    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    # aiohttp's own default limits the whole transfer to five minutes.
    timeout = ClientTimeout(total=None, connect=seconds_stalled, sock_read=seconds_stalled)
    # Block size 0 is fsspec's name for one answer that is streamed; with a size given it sends no HEAD before.
    with file_system.open(
        url, block_size=0, size=facts.size, headers=headers, raise_for_status=check, timeout=timeout
    ) as file:
        yield from iter(partial(file.read, _PIECE), b"")


def _stream_s3(url: str, start: int, stop: int, facts: RemoteFacts, seconds_stalled: float) -> Iterator[bytes]:
    from fsspec.asyn import sync

    file_system = _s3(seconds_stalled)
    bucket, key, version = file_system.split_path(url)
    which = {"Bucket": bucket, "Key": key, **({"VersionId": version} if version else {})}
    answer = file_system.call_s3("get_object", Range=f"bytes={start}-{stop - 1}", timeout=seconds_stalled, **which)
    body = answer["Body"]
    try:
        _compare(facts, _total(answer.get("ContentRange", "")), (answer.get("ETag"),))
        yield from iter(partial(sync, file_system.loop, body.read, _PIECE), b"")
    finally:
        body.close()


def _stream_hf(url: str, start: int, stop: int, facts: RemoteFacts, seconds_stalled: float) -> Iterator[bytes]:
    # The hub's client limits its silences itself, by HF_HUB_DOWNLOAD_TIMEOUT.
    with _file_system(url).open(url, cache_type="none", size=facts.size) as file:
        file.seek(start)
        while file.tell() < stop:
            piece = file.read(min(_HF_PIECE, stop - file.tell()))
            if not piece:
                return
            yield piece


def _total(content_range: str) -> str | None:
    """The size of the whole object in "bytes 0-99/1234"."""
    total = content_range.rpartition("/")[2]
    return total if total.isdigit() else None


def _compare(facts: RemoteFacts, size: str | None, etags: tuple[str | None, ...]) -> None:
    """Compare an answer's header with the facts, as far as it says anything."""
    if size is not None and int(size) != facts.size:
        raise ChangedError(f"it has {size} bytes and had {facts.size}")
    if facts.etag and any(etags) and facts.etag not in etags:
        raise ChangedError(f"its etag is {next(filter(None, etags))} and was {facts.etag}")


def _file_system(url: str, **options: Any) -> Any:
    import fsspec

    protocol = protocol_of(url)
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        # The hub's package comes with farnear.
        how = f"pip install 'farnear[{_EXTRA[protocol]}]'" if protocol in _EXTRA else "install farnear again"
        raise UserError(f"{shown(url)} cannot be read without a package that is not installed; {how}") from error


def _s3(seconds_stalled: float) -> Any:
    """s3fs without its own retries. Endpoint, credentials and region are the user's: AWS_ENDPOINT_URL and its like, or
    fsspec's configuration (FSSPEC_S3)."""
    import fsspec.config

    options = {
        **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
        "connect_timeout": seconds_stalled,
        "read_timeout": seconds_stalled,
        "retries": {"total_max_attempts": 1},
    }
    file_system = _file_system("s3://", config_kwargs=options)
    file_system.retries = 1  # s3fs's own, around those of botocore; the options above make the instance ours
    return file_system
