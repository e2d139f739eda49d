"""A small Hugging Face Hub on loopback: what the real client asks for, and the Hub's refusals."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INFO = re.compile(r"/api/models/([^/]+/[^/]+)/revision/(.+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Answer:
    """An HTTP answer."""

    status: int
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)


def describe(file: Path) -> dict[str, Any]:
    """A file as the Hub lists it: weights go by LFS, whatever they hold."""
    content = file.read_bytes()
    size = len(content)
    blob = hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest()
    found = {"rfilename": file.name, "size": size, "blobId": blob}
    if file.suffix == ".safetensors":
        sha256 = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
    return found


def answer(public: Path, path: str, commit: str = COMMIT) -> Answer:
    """What the Hub says to a request; `gated/tiny` wants a licence, `broken/tiny` is down."""
    match = INFO.fullmatch(path) or FILE.fullmatch(path)
    repository, revision = (match[1], match[2]) if match else ("", "")
    if repository == "broken/tiny":
        return Answer(503, b"down for maintenance")
    if repository not in ("public/tiny", "gated/tiny"):
        return Answer(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
    if revision not in ("main", commit):
        return Answer(404, b'{"error":"Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
    if INFO.fullmatch(path):
        files = [describe(file) for file in public.iterdir()]
        return Answer(
            200, json.dumps({"id": repository, "sha": commit, "siblings": files}).encode()
        )
    if repository == "gated/tiny":
        return Answer(
            403, b"Access to model gated/tiny is restricted", {"X-Error-Code": "GatedRepo"}
        )
    content = (public / path.rpartition("/")[2]).read_bytes()
    etag = hashlib.sha256(content).hexdigest()
    return Answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})


class Handler(BaseHTTPRequestHandler):
    """Brings the answers to the wire."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, public: Path, commit: str, **kwargs: Any) -> None:
        self.public, self.commit = public, commit
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.wfile.write(self._head())

    def do_HEAD(self) -> None:
        self._head()

    def _head(self) -> bytes:
        reply = answer(self.public, self.path.partition("?")[0], self.commit)
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        return reply.content

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def hub_server(public: Path, commit: str = COMMIT) -> Iterator[str]:
    """Serve the folder as `public/tiny` at this commit, on a free port."""
    handler = partial(Handler, public=public, commit=commit)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # poll often
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
