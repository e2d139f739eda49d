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
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INFO = re.compile(r"/api/(models|datasets)/([^/]+)/([^/]+)/revision/(.+)")
FILE = re.compile(r"/(datasets/)?([^/]+)/([^/]+)/resolve/([^/]+)/(.+)")
NAMES = {"models": "tiny", "datasets": "rows"}
LFS = (".parquet", ".safetensors")


@dataclass
class Answer:
    status: int
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)


def describe(file: Path, folder: Path) -> dict[str, Any]:
    """A file as the Hub lists it: weights and Parquet go by LFS, whatever they hold."""
    content = file.read_bytes()
    size = len(content)
    blob = hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest()
    found = {"rfilename": file.relative_to(folder).as_posix(), "size": size, "blobId": blob}
    if file.suffix in LFS:
        sha256 = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
    return found


def answer(public: Path, path: str, commit: str = COMMIT) -> Answer:
    """What the Hub says to a request: `gated/…` wants a licence, `broken/…` is down."""
    match = INFO.fullmatch(path) or FILE.fullmatch(path)
    kind, owner, name, revision = match.groups()[:4] if match else (None, "", "", "")
    if owner == "broken":
        return Answer(503, b"down for maintenance")
    if owner not in ("public", "gated") or name != NAMES[(kind or "models").strip("/")]:
        return Answer(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
    if unquote(revision) not in ("main", "refs/convert/parquet", commit):
        return Answer(404, b'{"error":"Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
    if INFO.fullmatch(path):
        files = [describe(file, public) for file in sorted(public.rglob("*")) if file.is_file()]
        found = {"id": f"{owner}/{name}", "sha": commit, "siblings": files}
        return Answer(200, json.dumps(found).encode())
    if owner == "gated":
        return Answer(
            403, b"Access to gated/%s is restricted" % name.encode(), {"X-Error-Code": "GatedRepo"}
        )
    content = (public / path.partition(f"/resolve/{revision}/")[2]).read_bytes()
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
