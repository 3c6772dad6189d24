"""As much of the hub's API as a push needs: repositories, branches, and commits of plain and of large files.

Large files come by LFS, or by the hub's own protocol, Xet, into a folder that hf_xet takes for a storage. What is in
there only hf_xet knows, so such a file is known by its sha256 alone.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from object_stores import serving

LARGE = (".safetensors", "tokenizer.json")
TOKEN = "hf_test"


@dataclass
class Repository:
    """Files of each branch, and of each pull request by its number."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)
    commits: int = 0


@dataclass
class WritableHub:
    """Repositories by name.

    Attributes:
        xet_folder: Where files that come by Xet go.
        stored: Contents of large files that have arrived by LFS, by their sha256.
        refused: Large files, by their sha256, that are answered with 403 instead of being taken.
        requests: Method and path of each.
    """

    url: str = ""
    xet_folder: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    refuses_commits: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)

    def arrived(self, method: str) -> list[str]:
        """Paths of the requests of a method."""
        return [path for sent, path in self.requests if sent == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: WritableHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._path()
        if "/xet-write-token/" in path:
            return self._answer({"casUrl": f"local://{self.hub.xet_folder}", "accessToken": "x", "exp": 4_000_000_000})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = self.hub.repositories[found[1]].branches[unquote(found[2])]
            return self._answer([{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()])
        if (found := re.match(r"/api/models/([^/]+/[^/]+)", path)) and found[1] in self.hub.repositories:
            return self._answer({"id": found[1], "private": self.hub.repositories[found[1]].private, "sha": "0" * 40})
        return self._answer({"error": "Repository not found"}, 404)

    def do_PUT(self) -> None:
        name = self._path().removeprefix("/lfs/")
        body = self._body()
        if name in self.hub.refused:
            return self._answer({"error": "forbidden"}, 403)
        assert hashlib.sha256(body).hexdigest() == name
        self.hub.stored[name] = body
        return self._answer({})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        if path == "/api/validate-yaml":
            is_card = json.loads(body)["content"].startswith("---\n")
            return self._answer({"errors": [], "warnings": []} if is_card else {"errors": [{"message": "none"}]})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._answer({"objects": [self._object(one) for one in json.loads(body)["objects"]]})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/([^/]+)", path)
        assert found, path
        name, do, branch = found.groups()
        repository = self.hub.repositories[name]
        if do == "branch":
            exists = unquote(branch) in repository.branches
            repository.branches.setdefault(unquote(branch), dict(repository.branches["main"]))
            return self._answer({"error": "exists"} if exists else {}, 409 if exists else 200)
        files = repository.branches[unquote(branch)]
        if do == "preupload":
            return self._answer({"files": [_mode(one["path"], files) for one in json.loads(body)["files"]]})
        return self._commit(name, files, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.hub.repositories
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories.setdefault(name, Repository(private))
        answer = {"url": f"{self.hub.url}/{name}"}
        self._answer({**answer, "error": "exists"} if exists else answer, 409 if exists else 200)

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
        return asked if asked["oid"] in self.hub.stored else {**asked, "actions": upload}

    def _commit(self, name: str, files: dict[str, bytes], operations: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[name]
        if self.hub.refuses_commits:
            return self._answer({"error": "no"}, 403)
        proposed = "create_pr" in parse_qs(urlsplit(self.path).query)
        after = dict(files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                after[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                after[value["path"]] = self.hub.stored.get(value["oid"], value["oid"].encode())
            elif operation["key"] == "deletedFile":
                del after[value["path"]]
        repository.commits += 1
        if proposed:
            repository.pull_requests.append(after)
        else:
            files.clear()
            files.update(after)
        oid = f"{repository.commits:040x}"
        url = f"{self.hub.url}/{name}"
        number = len(repository.pull_requests)
        return self._answer(
            {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": f"{url}/discussions/{number}"}
        )

    def _path(self) -> str:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        return path

    def _body(self) -> bytes:
        if length := self.headers["Content-Length"]:
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):  # chunked
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    mode = "lfs" if path.endswith(LARGE) else "regular"
    there = _oid(files[path]) if path in files and mode == "regular" else None
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there}


@contextmanager
def writable_hub() -> Iterator[WritableHub]:
    hub = WritableHub()
    with serving(partial(_Handler, hub)) as hub.url:
        yield hub
