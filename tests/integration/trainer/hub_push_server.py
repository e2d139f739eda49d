"""A small Hugging Face Hub on loopback that takes pushes: what the real client asks for."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.integration.trainer.hub_server import COMMIT, Answer

TOKEN = "hf_may_write"
LFS = ("*.gguf", "*.safetensors")
NO_ENTRY = Answer(404, b"no such file", {"X-Error-Code": "EntryNotFound"})
ROUTES = {
    "create": r"POST /api/repos/create",
    "info": r"GET /api/models/(?P<repo>[^/]+/[^/]+)",
    "branch": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)",
    "preupload": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<branch>.+)",
    "batch": r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "store": r"PUT /lfs/(?P<oid>[0-9a-f]+)",
    "yaml": r"POST /api/validate-yaml",
    "paths": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<branch>.+)",
    "commit": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<branch>.+)",
    "resolve": r"(?:GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<branch>[^/]+)/(?P<path>.+)",
}


def reply(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


@dataclass
class PushHub:
    """Repositories by name and branch, and the content that was sent."""

    endpoint: str = ""
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)
    """Objects that were sent, by SHA-256."""

    commits: int = 0
    fail: dict[str, int] = field(default_factory=dict)
    """HTTP status by the name of a route that is out of order."""

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.branches[repo, branch]

    def answer(self, line: str, token: str, body: bytes) -> Answer:
        """What the Hub says to a request."""
        for name, pattern in ROUTES.items():
            if match := re.fullmatch(pattern, line):
                if name in self.fail:
                    return Answer(self.fail[name], b"out of order")
                if name not in ("store", "yaml") and token != f"Bearer {TOKEN}":
                    return Answer(401, b"who are you?")
                found: Answer = getattr(self, name)(body, **match.groupdict())
                return found
        return Answer(404, f"nothing at {line}".encode())

    def create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.private:
            return reply({"url": f"{self.endpoint}/{repo}"}, 409)
        self.private[repo] = asked.get("visibility") == "private"
        self.branches[repo, "main"] = {".gitattributes": b""}
        return reply({"url": f"{self.endpoint}/{repo}"})

    def info(self, _: bytes, repo: str) -> Answer:
        if repo not in self.private:
            return NO_ENTRY
        return reply({"id": repo, "private": self.private[repo], "siblings": []})

    def branch(self, _: bytes, repo: str, branch: str) -> Answer:
        if (repo, branch) in self.branches:
            return Answer(409, b"exists")
        self.branches[repo, branch] = dict(self.files(repo))
        return reply({})

    def preupload(self, body: bytes, repo: str, branch: str) -> Answer:
        asked = json.loads(body)
        inside = self.files(repo, branch).get(".gitignore", b"").decode()
        ignored = asked.get("gitIgnore", inside).split()
        answers = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if matches(item["path"], LFS) else "regular",
                "shouldIgnore": matches(item["path"], ignored),
            }
            for item in asked["files"]
        ]
        return reply({"files": answers})

    def batch(self, body: bytes, repo: str) -> Answer:  # noqa: ARG002 - one store for all
        found = []
        for item in json.loads(body)["objects"]:
            href = {"upload": {"href": f"{self.endpoint}/lfs/{item['oid']}"}}
            found.append(item if item["oid"] in self.objects else {**item, "actions": href})
        return reply({"transfer": "basic", "objects": found})

    def store(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return Answer(400, b"another content")
        self.objects[oid] = body
        self.stored.append(oid)
        return reply({})

    def yaml(self, _: bytes) -> Answer:
        return reply({"warnings": [], "errors": []})

    def paths(self, body: bytes, repo: str, branch: str) -> Answer:
        asked = parse_qs(body.decode())["paths"]
        files = self.files(repo, branch)
        return reply(
            [
                {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
                for path in asked
                if path in files
            ]
        )

    def commit(self, body: bytes, repo: str, branch: str) -> Answer:
        files = self.files(repo, branch)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        self.commits += 1
        url = f"{self.endpoint}/{repo}/commit/{COMMIT}"
        return reply({"commitUrl": url, "commitOid": COMMIT})

    def resolve(self, _: bytes, repo: str, branch: str, path: str) -> Answer:
        content = self.branches.get((repo, branch), {}).get(path)
        if content is None:
            return NO_ENTRY
        etag = hashlib.sha256(content).hexdigest()
        return Answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})


def matches(path: str, patterns: Any) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


class Handler(BaseHTTPRequestHandler):
    """Brings the answers to the wire."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, hub: PushHub, **kwargs: Any) -> None:
        self.hub = hub
        super().__init__(*args, **kwargs)

    def _answer(self) -> None:
        body = self._body()
        line = f"{self.command} {unquote(urlsplit(self.path).path)}"
        found = self.hub.answer(line, self.headers.get("Authorization", ""), body)
        self.send_response(found.status)
        for name, value in {"Content-Length": str(len(found.content)), **found.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found.content)

    # The names are http.server's.
    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def push_hub() -> Iterator[PushHub]:
    """A Hub on a free port, empty."""
    hub = PushHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub=hub))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
