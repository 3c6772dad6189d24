"""Shards behind urls, ``https://...``, ``s3://...`` and ``hf://...``: which there are, what they are now, their bytes.

Networks fail for a moment all the time, and a run of days must not end with each moment. So whatever may pass is tried
again here, for all protocols alike: errors of the server (5xx), "too many requests" (429), lost, refused and silent
connections, bodies that end early, which go on where they ended. Between attempts lies a wait that doubles, shortened
by chance, so that the ranks that failed together do not come back together. What cannot pass by itself, a missing or
forbidden object, is an error at once, and after the last attempt everything is: a ``UserError`` that names url, number
of attempts and last reason. No call waits for ever on a silent server.

Offsets are worth nothing in a shard that was written again. Each read is given the facts of the object that was
indexed, and fails when the answer is about another one. See ``transfer`` for what a protocol lets us see, and for how
users configure endpoints and credentials. Facts of an ``hf://`` url change with the branch it names; a url with a
commit in it (``hf://datasets/org/name@COMMIT/...``) does not, and is the better one for ranged reads.
"""

import glob
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from farnear.data.transfer import (
    ANSWERS_TELL_IDENTITY,
    ChangedError,
    RemoteFacts,
    find_facts,
    list_files,
    protocol_of,
    short_name,
    shown,
    stream,
)
from farnear.errors import UserError

__all__ = [
    "USUAL",
    "Patience",
    "RemoteFacts",
    "expand_remote",
    "is_glob",
    "is_remote",
    "read_pieces",
    "read_range",
    "remote_facts",
    "short_name",
    "shown",
]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long to wait for a network. The default gives a server about 15 seconds to come back."""

    attempts: int = 6
    seconds_first_wait: float = 1.0  # it doubles with each attempt, and up to half of it is taken off by chance
    seconds_longest_wait: float = 30.0
    seconds_stalled: float = 60.0  # of silence, after which a connection counts as lost


USUAL = Patience()


def is_remote(name: str) -> bool:
    """Whether a shard's name is a url and not a path. ``file://`` is a path's other name, and no url here."""
    protocol, separator, _ = name.partition("://")
    return bool(separator) and "/" not in protocol and protocol.lower() != "file"


def expand_remote(pattern: str, patience: Patience = USUAL) -> list[str]:
    """The urls that a url names: itself, or with ``*``, ``?`` and ``[...]`` those of the matching files, sorted.

    A url without these is not looked at. http cannot list files; there a ``?`` begins a query.

    Raises:
        UserError: Nothing matches, the protocol cannot list or is unknown, or the store cannot be reached.
    """
    if not is_glob(pattern):
        return [pattern]
    matches = _persist(pattern, patience, lambda: list_files(pattern, patience.seconds_stalled))
    if not matches:
        raise UserError(f"{shown(pattern)} matches no file, so there is nothing to read; check its folder and pattern")
    return matches


def is_glob(pattern: str) -> bool:
    """Whether a url stands for the files that match it. Raises ``UserError`` for one that nobody can list."""
    if protocol_of(pattern) in ("http", "https"):
        # Behind the host, which has brackets of its own when it is an IPv6 address.
        path = pattern.partition("?")[0].partition("://")[2].partition("/")[2]
        if glob.has_magic(path):
            raise UserError(
                f"{shown(pattern)} holds a glob, and http has no way to list files; name the shards with braces like "
                f"{{000..007}}"
            )
        return False
    return glob.has_magic(pattern.partition("?versionId=")[0])


def remote_facts(url: str, patience: Patience = USUAL) -> RemoteFacts:
    """Size and etag of an object as they are now, never from a cache.

    Raises:
        UserError: It is missing, forbidden, a folder, without a size, or cannot be reached.
    """
    return _persist(url, patience, lambda: find_facts(url, patience.seconds_stalled))


def read_range(url: str, start: int, stop: int, facts: RemoteFacts, patience: Patience = USUAL) -> bytes:
    """The bytes of an object from ``start`` to ``stop``, all of them. Errors as ``read_pieces``."""
    return b"".join(read_pieces(url, start, stop, facts, patience))


def read_pieces(
    url: str, start: int, stop: int, facts: RemoteFacts, patience: Patience = USUAL
) -> Generator[bytes, None, None]:
    """Yield the bytes of an object from ``start`` to ``stop`` as they come, in pieces of at most 64 MiB.

    One request serves them all as long as nothing fails. The attempts count for the whole range.

    Raises:
        UserError: The object is missing or forbidden, is not the one of ``facts`` any more, has no such bytes, or
            cannot be read.
    """
    if not 0 <= start <= stop <= facts.size:
        raise UserError(
            f"{shown(url)} has {facts.size} bytes and none from {start} to {stop}, so it is not the shard that was "
            f"indexed; build the index again"
        )
    attempts = _Attempts(url, patience)
    position = start
    while position < stop:
        try:
            for piece in stream(url, position, stop, facts, patience.seconds_stalled):
                if position + len(piece) > stop:
                    raise ChangedError("it sends more bytes than asked for")
                position += len(piece)
                yield piece
            if position < stop:
                raise EOFError(f"the answer ended {stop - position} bytes early")
        except Exception as error:
            attempts.failed(error)
    if (start, stop) == (0, facts.size) and not ANSWERS_TELL_IDENTITY[protocol_of(url)]:
        now = remote_facts(url, patience)
        if now != facts:
            raise _changed(url, f"its etag is {now.etag} and was {facts.etag}")


def _persist(url: str, patience: Patience, call: Callable[[], Result]) -> Result:
    attempts = _Attempts(url, patience)
    while True:
        try:
            return call()
        except Exception as error:
            attempts.failed(error)


class _Attempts:
    """Counts the attempts at one url, and waits between them."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.url = url
        self.patience = patience
        self.failures = 0

    def failed(self, error: Exception) -> None:
        """Wait before the next attempt, or raise the error that ends them. To be called where ``error`` was caught."""
        if isinstance(error, (UserError, *_DEFECTS)):
            raise
        self.failures += 1
        cause = _cause(error)
        status = _status(cause)
        reason = _reason(cause, status).replace(self.url, shown(self.url))
        if _is_final(cause, status):
            raise UserError(
                f"{shown(self.url)} cannot be read ({reason}), so its pairs would be missing; check the url, that the "
                f"object exists and that you may read it"
            ) from error
        if self.failures >= self.patience.attempts:
            if isinstance(error, ChangedError):
                raise _changed(self.url, reason) from error
            raise UserError(
                f"{shown(self.url)} cannot be read: {self.failures} attempts failed, the last one with: {reason}; "
                f"check the network and the server, and start again"
            ) from error
        wait = min(self.patience.seconds_longest_wait, self.patience.seconds_first_wait * 2 ** (self.failures - 1))
        # A generator of its own: the global one may belong to a run with a seed.
        time.sleep(wait * random.SystemRandom().uniform(0.5, 1))


_DEFECTS = (TypeError, AttributeError, NameError, LookupError, AssertionError, MemoryError)


def _changed(url: str, how: str) -> UserError:
    return UserError(
        f"{shown(url)} was changed after it was indexed ({how}), so the offsets of its pairs are wrong; build the "
        f"index again"
    )


def _cause(error: BaseException) -> BaseException:
    """The error of aiohttp, botocore or the hub's client behind the one that its file system raised.

    fsspec's http says "not found" for servers that fail or cannot be reached, s3fs makes an ``OSError`` of everything.
    """
    while error.__cause__ is not None and isinstance(error, OSError):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """The status of the answer that an error stands for, if it stands for one."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _is_final(error: BaseException, status: int | None) -> bool:
    """Whether asking again is useless."""
    if status is not None:
        return 300 <= status < 500 and status not in (408, 425, 429)
    # Named, so that the packages they come from need not be there.
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "OfflineModeIsEnabled"):
        return True
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ValueError)


def _reason(error: BaseException, status: int | None) -> str:
    if status is not None:
        phrases = {int(known): known.phrase for known in HTTPStatus}
        return f"{status} {phrases.get(status, '')}".strip()
    return " ".join(str(error).split()) or type(error).__name__
