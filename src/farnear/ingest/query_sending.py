"""Sends request files to a server that speaks OpenAI's chat completions, and collects its answers.

Answers are lines of OpenAI's batch output, appended to one file as they come. That file is all there is to know about
how far a run got: a request that has an answer in it is not sent again, so a run that was killed is started anew with
the same words. A half-written last line, which a kill can leave, is cut off first. Failed requests leave a line too,
with the reason, and are sent again by the next run.

A server that is busy or away for a moment is asked again, later each time, or when it says. What no waiting mends (a
wrong key, a wrong address) ends the run at once.
"""

import fcntl
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, BinaryIO

from farnear.errors import UserError

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
_PASSING_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
_HOPELESS_STATUS = (401, 403, 404, 405)  # of the key or the address, and so the same for every request
_EXCERPT = 200  # characters of a server's complaint that are kept


@dataclass(frozen=True)
class Server:
    """Where requests go and how patiently.

    Attributes:
        endpoint: the address up to `/v1`.
        attempts: tries of one request.
        timeout: seconds that one answer may take.
    """

    endpoint: str
    api_key: str | None = None
    attempts: int = 6
    timeout: float = 600.0


@dataclass(frozen=True)
class Outcome:
    """What became of one request: `failure` is None when it was answered, now or by an earlier run."""

    custom_id: str
    failure: str | None
    by_earlier_run: bool = False


class _FailedError(Exception):
    """This request has failed for good; others may do."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would turn a POST into a GET and carry the key elsewhere; here it is an error."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def send_requests(files: Sequence[Path], answers: Path, server: Server, *, concurrency: int = 8) -> Iterator[Outcome]:
    """Send every request that has no answer yet, a few at once, and append the answers.

    Args:
        files: of `farnear.ingest.query_requests`.
        answers: made when it is not there.

    Yields:
        Outcomes as they come, also of requests that were answered before. The file holds an answer before its outcome
        is yielded.

    Raises:
        UserError: a file cannot be read, another run writes to the same answers, or the server cannot be reached or
            refuses every request.
    """
    if not server.endpoint.startswith(("http://", "https://")):
        raise UserError(f"the endpoint {server.endpoint!r} is no address; write it like http://localhost:8000/v1")
    answers.parent.mkdir(parents=True, exist_ok=True)
    with answers.open("a+b") as log:
        answered = _claim(log, answers)
        stop = threading.Event()
        under_way: dict[Future[dict[str, Any]], str] = {}
        with ThreadPoolExecutor(concurrency) as executor:
            try:
                for request in _requests(files):
                    if request["custom_id"] in answered:
                        yield Outcome(request["custom_id"], None, by_earlier_run=True)
                        continue
                    under_way[executor.submit(_ask, request, server, stop)] = request["custom_id"]
                    if len(under_way) == concurrency:
                        yield from _collected(under_way, log)
                while under_way:
                    yield from _collected(under_way, log)
            finally:  # also when whoever reads the outcomes has had enough
                stop.set()
                executor.shutdown(wait=True, cancel_futures=True)
                for future in under_way:
                    if not future.cancelled() and future.exception() is None and is_answer(future.result()):
                        _append(log, future.result())


def is_answer(line: dict[str, Any]) -> bool:
    """Whether a line of a batch output is an answer and no failure."""
    response = line.get("response")
    return isinstance(response, dict) and response.get("status_code") == 200


def read_lines(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, each with a `custom_id`. Raises UserError naming the line."""
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path} line {number} is no JSON ({error}); is it a file of requests or answers?"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("custom_id"), str):
            raise UserError(f"{path} line {number} has no custom_id; is it a file of requests or answers?")
        yield record


def _claim(log: BinaryIO, path: Path) -> set[str]:
    """Keep other runs away from the answers, cut off half a line, and return what is answered."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"another run is writing to {path}, and both would ask the same; wait for it, or name another file with "
            "--answers"
        ) from error
    log.seek(0)
    data = log.read()
    whole = data.rfind(b"\n") + 1
    log.truncate(whole)
    return {line["custom_id"] for line in read_lines(path, data[:whole]) if is_answer(line)}


def _requests(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for path in files:
        try:
            stream = path.open("rb")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from error
        with stream:
            for line in stream:
                for request in read_lines(path, line):
                    name = request["custom_id"]
                    if not isinstance(request.get("body"), dict) or not isinstance(request.get("url"), str):
                        raise UserError(f"{path}: {name} is no request with a url and a body; export the pages again")
                    if name in seen:
                        raise UserError(f"{path}: {name} is asked twice in these files; name each file once")
                    seen.add(name)
                    yield request


def _collected(under_way: dict[Future[dict[str, Any]], str], log: BinaryIO) -> Iterator[Outcome]:
    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
    for future in done:
        line = future.result()
        del under_way[future]
        _append(log, line)
        yield Outcome(line["custom_id"], line["error"]["message"] if line["error"] else None)


def _append(log: BinaryIO, line: dict[str, Any]) -> None:
    log.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    log.flush()


def _ask(request: dict[str, Any], server: Server, stop: threading.Event) -> dict[str, Any]:
    """A line for the answers, of success or failure."""
    name = request["custom_id"]
    try:
        body = _posted(request, server, stop)
    except _FailedError as error:
        return {"custom_id": name, "response": None, "error": {"code": "failed", "message": str(error)}}
    return {"custom_id": name, "response": {"status_code": 200, "body": body}, "error": None}


def _posted(request: dict[str, Any], server: Server, stop: threading.Event) -> Any:
    address = server.endpoint.rstrip("/") + request["url"].removeprefix("/v1")
    headers = {"Content-Type": "application/json", "User-Agent": "farnear"}
    if server.api_key is not None:
        headers["Authorization"] = f"Bearer {server.api_key}"
    post = urllib.request.Request(address, json.dumps(request["body"]).encode(), headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirects)
    pause: float | None = None
    unreachable, reason = False, ""
    for attempt in range(server.attempts):
        if attempt and stop.wait(pause if pause is not None else _pause(attempt)):
            raise _FailedError("the run was ended")
        unreachable, pause = False, None
        try:
            with opener.open(post, timeout=server.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                excerpt = " ".join(error.read().decode(errors="replace").split())[:_EXCERPT]
            reason = f"HTTP {error.code} {excerpt}".strip()
            if error.code in _HOPELESS_STATUS or 300 <= error.code < 400:
                raise UserError(
                    f"{address} refuses requests ({reason}); check --endpoint, the model's name and --api-key-env"
                ) from error
            if error.code not in _PASSING_STATUS:
                break
            pause = _asked_pause(error.headers.get("Retry-After"))
        except ValueError:
            reason = "the answer is no JSON"
        except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
            cause = getattr(error, "reason", error)
            unreachable = isinstance(error, urllib.error.URLError) and not isinstance(cause, TimeoutError)
            reason = " ".join(str(cause).split()) or type(cause).__name__
    if unreachable:
        raise UserError(
            f"{address} cannot be reached ({reason}); check --endpoint and the server, then run again: answers are kept"
        )
    raise _FailedError(reason)


def _pause(attempt: int) -> float:
    """Seconds before another try, spread so that requests do not all come back at once."""
    longest = min(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS)
    return longest * random.uniform(0.5, 1.0)


def _asked_pause(retry_after: str | None) -> float | None:
    """What a server asks for in seconds; None when it names none (or a date, which is rare)."""
    try:
        return min(max(float(retry_after or ""), 0.0), _LONGEST_WAIT_SECONDS)
    except ValueError:
        return None
