"""AWS's security token service, as far as a pod's identity asks it: one call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

SPACE = "https://sts.amazonaws.com/doc/2011-06-15/"
GRANTED = f"""<AssumeRoleWithWebIdentityResponse xmlns="{SPACE}"><AssumeRoleWithWebIdentityResult>
<Credentials><AccessKeyId>ASIAEXAMPLE</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>
<SessionToken>session</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>
<AssumedRoleUser><Arn>arn:aws:sts::1:assumed-role/a/b</Arn><AssumedRoleId>a:b</AssumedRoleId>
</AssumedRoleUser></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""
REFUSED = f"""<ErrorResponse xmlns="{SPACE}"><Error><Type>Sender</Type><Code>{{code}}</Code>
<Message>Not authorized to perform it</Message></Error></ErrorResponse>"""


@dataclass
class Sts:
    """What it was asked, and what it says."""

    endpoint: str = ""
    requests: int = 0
    last: dict[str, list[str]] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None
    """Status and code of the answer."""


class Handler(BaseHTTPRequestHandler):
    """Brings the answers to the wire."""

    def __init__(self, *args: Any, sts: Sts, **kwargs: Any) -> None:
        self.sts = sts
        super().__init__(*args, **kwargs)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.sts.requests += 1
        self.sts.last = parse_qs(body)
        status, code = self.sts.refuse or (200, "")
        content = (REFUSED.format(code=code) if code else GRANTED).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def sts_server() -> Iterator[Sts]:
    """Run it on a free port of loopback."""
    sts = Sts()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, sts=sts))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    sts.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield sts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
