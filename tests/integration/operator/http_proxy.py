"""Between the operator and the API server: it passes requests on, or answers some with 503."""

from __future__ import annotations

import asyncio
import ssl
import threading
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from hack.cluster.control_plane import ControlPlane
from hack.cluster.pki import Authority

LOOPBACK = "127.0.0.1"
KEPT = {"Authorization", "Accept", "Content-Type", "User-Agent"}
STARTED_SECONDS = 60
CLOSING_SECONDS = 0.5  # until the sockets of both sides are closed
AWAY = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "ServiceUnavailable"}


class HttpProxy:
    """A port that leads to the API server, with a certificate of the same authority.

    `at` names the port; any free one is taken otherwise.
    """

    def __init__(self, plane: ControlPlane, *, at: int = 0) -> None:
        self.failing = ""
        """How the paths end whose requests are answered with 503; none if empty."""

        self.failed = 0
        """Requests that were answered with 503."""

        self.port = at
        self._server = plane.server
        pki = Authority(plane.ca.parent)
        pki.issue("proxy", "proxy", [LOOPBACK])
        self._served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._served.load_cert_chain(pki.folder / "proxy.crt", pki.folder / "proxy.key")
        self._trusted = ssl.create_default_context(cafile=str(plane.ca))
        self._loop = asyncio.new_event_loop()
        self._answers: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._done = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(STARTED_SECONDS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """End all answers that are still being given, such as watches."""
        for each in [*self._answers]:
            self._loop.call_soon_threadsafe(each.cancel)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self._trusted, limit=0)
        forever = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=forever) as session:

            async def answer(request: web.Request) -> web.StreamResponse:
                return await self._answer(session, request)

            app = web.Application()
            app.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
            await runner.setup()
            site = web.TCPSite(runner, LOOPBACK, self.port, ssl_context=self._served)
            await site.start()
            self.port = runner.addresses[0][1]
            self._ready.set()
            await self._done.wait()
            await runner.cleanup()
        await asyncio.sleep(CLOSING_SECONDS)

    async def _answer(
        self, session: aiohttp.ClientSession, request: web.Request
    ) -> web.StreamResponse:
        if self.failing and request.path.endswith(self.failing):
            self.failed += 1
            return web.json_response({**AWAY, "code": 503}, status=503)
        task = asyncio.current_task()
        assert task is not None
        self._answers.add(task)
        try:
            return await self._pass_on(session, request)
        except asyncio.CancelledError:
            if request.transport is not None:
                request.transport.abort()  # the server leaves it open
            raise
        finally:
            self._answers.discard(task)

    async def _pass_on(
        self, session: aiohttp.ClientSession, request: web.Request
    ) -> web.StreamResponse:
        given = {name: value for name, value in request.headers.items() if name in KEPT}
        body = await request.read()
        url = f"{self._server}{request.path_qs}"
        async with session.request(
            request.method,
            url,
            headers=given,
            data=body or None,
            skip_auto_headers=["Content-Type"],
        ) as upstream:
            answer = web.StreamResponse(status=upstream.status)
            answer.content_type = upstream.content_type
            await answer.prepare(request)
            async for piece in upstream.content.iter_any():
                await answer.write(piece)
            await answer.write_eof()
            return answer
