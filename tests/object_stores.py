"""Object stores that fail on demand: http, moto's S3, and as much of the hub as reads need."""

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer to a GET. Without any field set nothing does."""

    status: int = 0  # answered in place of the object
    cut_at: int | None = (
        None  # bytes of the body after which the connection is closed, Content-Length as if it were whole
    )
    short_by: int = 0  # bytes missing at the end of the object, Content-Length and Content-Range too
    stall_at: int | None = None  # bytes of the body after which nothing comes until the server is told `go_on`
    long_by: int = 0  # bytes sent behind the last one that was asked for
    replace: bytes | None = None  # the object is this from now on


@dataclass
class ObjectServer:
    """Serves ``objects`` over http. ``faults`` of a path are used up one by one by its GETs."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    head_status: list[int] = field(default_factory=list)  # used up by HEADs of any path, and by the GETs of facts then
    ranges: bool = True
    etags: bool = True
    dates: dict[str, str] = field(default_factory=dict)  # Last-Modified of a path
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, range)
    go_on: threading.Event = field(default_factory=threading.Event)

    def put(self, path: str, data: bytes) -> str:
        """Store an object and return its url."""
        self.objects[path] = data
        return f"{self.url}/{path}"

    def gets(self, path: str) -> list[str]:
        """The ranges of the GETs of a path so far, "" for one without."""
        return [wanted for method, asked, wanted in self.requests if method == "GET" and asked == path]


class _Answering(BaseHTTPRequestHandler):
    """Answers HEAD and GET alike, and keeps silent about it."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        raise NotImplementedError


class _ObjectHandler(_Answering):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: ObjectServer, *args: Any) -> None:
        self.store = server
        super().__init__(*args)

    def _answer(self) -> None:
        store, path, wanted = self.store, self.path.lstrip("/").partition("?")[0], self.headers.get("Range", "")
        store.requests.append((self.command, path, wanted))
        # fsspec asks for facts with a HEAD, and with a GET without a range where this failed.
        if store.head_status and not wanted:
            return self._refuse(store.head_status.pop(0))
        fault = Fault()
        if self.command == "GET" and store.faults[path]:
            fault = store.faults[path].pop(0)
        if fault.replace is not None:
            store.objects[path] = fault.replace
        if fault.status:
            return self._refuse(fault.status)
        if path not in store.objects:
            return self._refuse(404)
        whole = store.objects[path]
        data = whole[: len(whole) - fault.short_by]
        if wanted and store.ranges:
            start, _, last = wanted.removeprefix("bytes=").partition("-")
            body = data[int(start) : int(last) + 1 + fault.long_by]
            if not body:
                return self._refuse(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}")
        else:
            body = data
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if store.etags:
            self.send_header("ETag", f'"{hashlib.md5(whole).hexdigest()}"')
        if path in store.dates:
            self.send_header("Last-Modified", store.dates[path])
        self.end_headers()
        if self.command == "HEAD":
            return None
        stop = fault.cut_at if fault.cut_at is not None else fault.stall_at
        self.wfile.write(body[:stop])
        self.wfile.flush()
        if fault.cut_at is not None:
            self.close_connection = True
        elif fault.stall_at is not None:
            store.go_on.wait(60)
            self.wfile.write(body[stop:])
        return None

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away are what the tests are about


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """Run a request handler on a free port; its url."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    store = ObjectServer()
    with serving(partial(_ObjectHandler, store)) as store.url:
        try:
            yield store
        finally:
            store.go_on.set()


class S3Server:
    """moto's S3 with ``faults`` before it, used up one by one by the GETs of "bucket/key"."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.url = ""
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[tuple[str, str, str]] = []  # (method, path, range)
        self.go_on = threading.Event()
        self._moto = DomainDispatcherApplication(create_backend_app)

    def gets(self, path: str) -> list[str]:
        """The ranges of the GETs of a path so far."""
        return [wanted for method, asked, wanted in self.requests if method == "GET" and asked == path]

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].lstrip("/")
        self.requests.append((method, path, environ.get("HTTP_RANGE", "")))
        fault = self.faults[path].pop(0) if method == "GET" and self.faults[path] else Fault()
        if fault.status:
            start_response(f"{fault.status} Fault", [("Content-Type", "application/xml")])
            yield b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
            return
        body = b"".join(self._moto(environ, start_response))
        stop = fault.cut_at if fault.cut_at is not None else fault.stall_at
        yield body[:stop]
        if fault.stall_at is not None:
            self.go_on.wait(60)
            yield body[stop:]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    from werkzeug.serving import make_server

    store = S3Server()
    server = make_server("127.0.0.1", 0, store, threaded=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        store.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_environment(url: str) -> Iterator[Any]:
    """The environment of this process, and of those it starts, points to an S3 server; a client of it."""
    import boto3
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield boto3.client("s3")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@dataclass
class Hub:
    """One dataset repository ``org/pages`` on a hub."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else _form_paths(body)
        paths = [asked] if isinstance(asked, str) else asked
        self.hub.requests.append(("POST", self.path))
        self._json([self._entry(path) for path in paths if path in self.hub.files])

    def do_GET(self) -> None:
        self.hub.requests.append(("GET", self.path))
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/org/pages/revision/") or path == "/api/datasets/org/pages":
            return self._json({"id": "org/pages", "sha": "0" * 40, "siblings": []})
        if path.startswith("/api/datasets/org/pages/tree/main"):
            return self._json([self._entry(name) for name in self.hub.files])
        name = path.removeprefix("/datasets/org/pages/resolve/main/")
        if name not in self.hub.files:
            return self._json({"error": "not found"}, 404)
        start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        body = self.hub.files[name][int(start) : int(last) + 1]
        return self._send(206, body)

    def _entry(self, path: str) -> dict[str, Any]:
        data = self.hub.files[path]
        sha256 = hashlib.sha256(data).hexdigest()
        lfs = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": path, "size": len(data), "oid": "1" * 40, "lfs": lfs}

    def _json(self, answer: Any, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _form_paths(body: str) -> list[str]:
    from urllib.parse import parse_qs

    return parse_qs(body)["paths"]


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    with serving(partial(_HubHandler, hub)) as hub.url:
        yield hub


class _ModelHubHandler(_Answering):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: "ModelHub", *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def _answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append((self.command, path))
        if path.startswith("/api/models/org/tiny/revision/"):
            return self._send(json.dumps({"id": "org/tiny", "sha": hub.commit, "siblings": []}).encode())
        below = path.removeprefix("/api/models/org/tiny/tree/").removeprefix("/org/tiny/resolve/")
        revision, _, rest = below.partition("/")
        files = hub.former.get(revision, hub.files)
        commit = {"X-Repo-Commit": revision if revision in hub.former else hub.commit}
        if path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
                if not rest or name.startswith(f"{rest}/")
            ]
            if rest and not entries:
                return self._send(b"", 404, {**commit, "X-Error-Code": "EntryNotFound"})
            return self._send(json.dumps(entries).encode())
        if rest not in files or rest in hub.refused:
            code = "EntryNotFound" if rest not in files else "Refused"
            return self._send(b"", 404 if rest not in files else 403, {**commit, "X-Error-Code": code})
        data = files[rest]
        return self._send(data, 200, {**commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": self.hub.commit, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@dataclass
class ModelHub:
    """One model repository ``org/tiny`` on a hub, whose branch is at ``commit``; ``former`` has files of others."""

    url: str = ""
    commit: str = "c0ffee" + "0" * 34
    files: dict[str, bytes] = field(default_factory=dict)
    former: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def downloaded(self) -> set[str]:
        """Names of the files that were asked for."""
        asked = {path.partition(f"/resolve/{self.commit}/")[2] for method, path in self.requests if method == "GET"}
        return asked - {""}


@contextmanager
def model_hub_server() -> Iterator[ModelHub]:
    hub = ModelHub()
    with serving(partial(_ModelHubHandler, hub)) as hub.url:
        yield hub
