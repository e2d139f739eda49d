"""A proxy in front of an S3 server: it counts what passes and damages what a test wants."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

CHUNK = 64 << 10


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    size: int
    """Bytes of the body."""

    headers: dict[str, str] = field(default_factory=dict)
    """By name in small letters."""

    @property
    def checked(self) -> bool:
        """Whether the server is told the MD5 of the body."""
        return "content-md5" in self.headers

    @property
    def operation(self) -> str:
        """Its name in S3, of those that bring something."""
        if self.method == "POST":
            return (
                "CompleteMultipartUpload"
                if "uploadId" in self.query
                else ("DeleteObjects" if "delete" in self.query else "CreateMultipartUpload")
            )
        if self.method != "PUT":
            return self.method
        if self.part is not None:
            return "UploadPart"
        return "CopyObject" if "x-amz-copy-source" in self.headers else "PutObject"

    @property
    def part(self) -> int | None:
        """Number of the part that it brings."""
        return int(self.query["partNumber"][0]) if "partNumber" in self.query else None

    @property
    def completes(self) -> bool:
        """Whether it puts a multipart upload together."""
        return self.method == "POST" and "uploadId" in self.query


@dataclass(frozen=True)
class Fault:
    """What happens to a request."""

    cut_after: int | None = None
    """Both connections are cut after so many bytes of the body."""

    flip_at: int | None = None
    """One bit of this byte of the body is turned."""

    lose_answer: bool = False
    """The server does as it is told, and the client's connection is cut instead of its answer."""

    refuse: tuple[int, str] | None = None
    """The proxy answers itself, with this status and this code of S3."""

    wait: Callable[[], object] | None = None
    """Called before anything of the body is read; it may take its time."""


def wants_md5(request: Request) -> Fault | None:
    """A store that takes no body without its Content-MD5."""
    if request.operation in ("PutObject", "UploadPart", "DeleteObjects") and not request.checked:
        return Fault(refuse=(400, "MissingContentMD5"))
    return None


Choose = Callable[[Request], Fault | None]


@dataclass
class Proxy:
    """What passed, and how to get through it."""

    endpoint: str = ""
    requests: list[Request] = field(default_factory=list)
    faults: int = 0
    passed: int = 0
    """Bytes of bodies that the server got."""

    choose: Choose = lambda _: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def parts(self) -> list[int]:
        """Numbers of the parts that were sent, in order of their requests."""
        with self.lock:
            return [each.part for each in self.requests if each.part is not None]

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.requests, self.passed, self.faults = [], 0, 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, proxy: Proxy, upstream: str, **kwargs: Any) -> None:
        self.proxy = proxy
        self.upstream = upstream
        super().__init__(*args, **kwargs)

    def handle(self) -> None:
        """Answer until the client goes, which a killed one does without a word."""
        with suppress(ConnectionError):
            super().handle()

    def _pass_on(self) -> None:
        # A client that takes this for its HTTP proxy names the whole URL.
        parts = urlsplit(self.path)
        target = urlunsplit(("", "", parts.path, parts.query, ""))
        size = int(self.headers.get("Content-Length", 0))
        query = parse_qs(parts.query, keep_blank_values=True)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, parts.path, query, size, headers)
        with self.proxy.lock:
            self.proxy.requests.append(request)
            fault = self.proxy.choose(request) or Fault()
            self.proxy.faults += fault != Fault()
        if fault.wait:
            fault.wait()
        if fault.refuse:
            self._refuse(size, *fault.refuse)
            return
        server = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            server.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":  # answered here already
                    server.putheader(name, value)
            server.endheaders()
            if self._bring_body(server, size, fault):
                self._bring_answer(server.getresponse(), fault)
        except OSError:
            self.close_connection = True
        finally:
            server.close()

    # The names are http.server's.
    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    def _bring_body(self, server: http.client.HTTPConnection, size: int, fault: Fault) -> bool:
        done = 0
        while done < size:
            most = size if fault.cut_after is None else fault.cut_after
            data = self.rfile.read(min(CHUNK, size - done, max(most - done, 0)))
            if not data:
                self._cut()
                return False
            if fault.flip_at is not None and done <= fault.flip_at < done + len(data):
                changed = bytearray(data)
                changed[fault.flip_at - done] ^= 1 << 3
                data = bytes(changed)
            server.send(data)
            done += len(data)
            with self.proxy.lock:
                self.proxy.passed += len(data)
        return True

    def _bring_answer(self, answer: http.client.HTTPResponse, fault: Fault) -> None:
        content = answer.read()
        if fault.lose_answer:
            self._cut()
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else ""
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, size: int, status: int, code: str) -> None:
        while size > 0 and (data := self.rfile.read(min(CHUNK, size))):
            size -= len(data)
        content = f"<Error><Code>{code}</Code><Message>Refused</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def s3_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy before the server at a URL, on a free port of loopback."""
    proxy = Proxy()
    handler = partial(Handler, proxy=proxy, upstream=urlsplit(upstream).netloc)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
