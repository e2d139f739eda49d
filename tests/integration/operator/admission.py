"""A webhook of the platform's: an HTTPS server that answers the API server's AdmissionReviews."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hack.cluster.pki import Authority

LOOPBACK = "127.0.0.1"

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def deny(code: int, message: str) -> dict[str, Any]:
    """The response that refuses a request, with the code that its sender gets."""
    return {"allowed": False, "status": {"code": code, "message": message}}


def patch(*operations: dict[str, Any]) -> dict[str, Any]:
    """The response that lets a request through with changes (JSON Patch)."""
    text = base64.b64encode(json.dumps(operations).encode()).decode()
    return {"allowed": True, "patchType": "JSONPatch", "patch": text}


class AdmissionServer:
    """Answers each review with what `answer` makes of its request."""

    def __init__(self, folder: Path, answer: Answer) -> None:
        authority = Authority(folder)
        authority.issue("webhook", "webhook", [LOOPBACK])
        self._ca = authority.certificate.read_bytes()
        self._server = ThreadingHTTPServer((LOOPBACK, 0), _handler(answer))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "webhook.crt", folder / "webhook.key")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def configuration(self, kind: str, name: str, namespace: str) -> dict[str, Any]:
        """A Validating- or MutatingWebhookConfiguration for new Jobs in a namespace."""
        rule = {
            "apiGroups": ["batch"],
            "apiVersions": ["v1"],
            "operations": ["CREATE"],
            "resources": ["jobs"],
        }
        client = {
            "url": f"https://{LOOPBACK}:{self._server.server_port}/review",
            "caBundle": base64.b64encode(self._ca).decode(),
        }
        webhook = {
            "name": "jobs.example.org",
            "clientConfig": client,
            "rules": [rule],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "timeoutSeconds": 5,
        }
        return {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": kind,
            "metadata": {"name": name},
            "webhooks": [webhook],
        }


def _handler(answer: Answer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(length))["request"]
            response = {"uid": request["uid"], **answer(request)}
            review = {
                "apiVersion": "admission.k8s.io/v1",
                "kind": "AdmissionReview",
                "response": response,
            }
            body = json.dumps(review).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            """Say nothing."""

    return Handler
