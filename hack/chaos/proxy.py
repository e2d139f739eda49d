"""Between the operator and the API server: an HTTP proxy that understands watches and writes.

It passes everything on, until it is told to be unkind. It runs in a thread and event loop of its
own; its methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web

from hack.cluster.control_plane import ControlPlane

MERGE_PATCH = "application/merge-patch+json"
DROPPED = {"host", "content-length", "transfer-encoding", "accept-encoding", "connection"}
REPEATED = 30  # events of a watch that may come once more
TOUCHED = "chaos.finetune.dev/touched"


@dataclass(eq=False)
class _Watch:
    """A watch of the operator, of one resource such as `pods`."""

    resource: str
    transport: asyncio.BaseTransport | None
    recent: deque[bytes] = field(default_factory=lambda: deque(maxlen=REPEATED))
    repeat: bool = False


class ChaosProxy:
    """Reached by plain HTTP on `port` of this machine, it leads to a control plane."""

    def __init__(self, plane: ControlPlane) -> None:
        self._server = plane.server
        self._token = plane.admin_token
        self._context = ssl.create_default_context(cafile=str(plane.ca))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._watches: set[_Watch] = set()
        self._held: Counter[str] = Counter()
        self._flows = asyncio.Condition()
        self._armed: Counter[str] = Counter()
        self._at_write: tuple[str, Callable[[], None]] | None = None
        self.done: Counter[str] = Counter()
        """How often each armed fault has met a request."""

        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    # What it can be told

    def cut(self) -> None:
        """End all watches, in the middle of a line maybe."""
        self._loop.call_soon_threadsafe(self._cut)

    def hold(self, resource: str, seconds: float) -> None:
        """Let no event of a resource through for a time: what the operator knows is old then."""
        self._loop.call_soon_threadsafe(self._hold, resource, seconds)

    def repeat(self) -> None:
        """Send the last events of each watch again, as one does that resumes too early."""
        self._loop.call_soon_threadsafe(self._repeat)

    def arm(self, fault: str, requests: int) -> None:
        """Let the next requests meet a fault.

        `conflict`: somebody else changes a FineTuneJob right before its status is written.
        `lost-answer`: a write is carried out, and the connection ends before the answer.
        `refusal`: the API server is overloaded (503).
        """
        self._loop.call_soon_threadsafe(self._armed.update, {fault: requests})

    def at_write(self, when: str, act: Callable[[], None]) -> None:
        """Call `act` `before` or `after` the next write takes place; its answer is lost."""
        self._loop.call_soon_threadsafe(setattr, self, "_at_write", (when, act))

    def be_kind(self) -> None:
        """Forget all that is armed."""
        self._loop.call_soon_threadsafe(self._armed.clear)
        self._loop.call_soon_threadsafe(setattr, self, "_at_write", None)

    # How it works

    async def _start(self) -> int:
        self._client = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(ssl=self._context, limit=0),
            auto_decompress=False,
        )
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=1, handler_cancellation=True
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        self._cut()
        await self._runner.cleanup()
        await self._client.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:  # e.g. a watch whose events are held back
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in DROPPED}
        body = await request.read()
        if request.query.get("watch"):
            return await self._pass_watch(request, headers)
        if self._take("refusal"):
            return web.json_response(_overloaded(), status=503)
        if not _is_write(request):
            return await self._pass(request, headers, body)
        when, act = self._at_write or ("", None)
        self._at_write = None
        if act is not None and when == "before":
            act()
            return _gone(request)
        if _is_status(request) and self._take("conflict"):
            await self._touch(request.path.removesuffix("/status"))
        answer = await self._pass(request, headers, body)
        if act is not None:
            act()
        if act is not None or self._take("lost-answer"):
            return _gone(request)
        return answer

    async def _pass(
        self, request: web.Request, headers: dict[str, str], body: bytes
    ) -> web.StreamResponse:
        url = f"{self._server}{request.path_qs}"
        try:
            async with self._client.request(
                request.method, url, headers=headers, data=body or None
            ) as answer:
                text = await answer.read()
                kept = {k: v for k, v in answer.headers.items() if k.lower() not in DROPPED}
                return web.Response(body=text, status=answer.status, headers=kept)
        except aiohttp.ClientError:
            return _gone(request)  # as the API server is

    async def _pass_watch(
        self, request: web.Request, headers: dict[str, str]
    ) -> web.StreamResponse:
        resource = request.path.rstrip("/").rpartition("/")[2]
        watch = _Watch(resource, request.transport)
        try:
            async with self._client.get(
                f"{self._server}{request.path_qs}", headers=headers
            ) as answer:
                response = web.StreamResponse(status=answer.status)
                response.content_type = answer.content_type
                await response.prepare(request)
                self._watches.add(watch)
                await self._stream(watch, answer, response)
                return response
        except (aiohttp.ClientError, ConnectionError):
            return _gone(request)
        finally:
            self._watches.discard(watch)

    async def _stream(
        self, watch: _Watch, answer: aiohttp.ClientResponse, response: web.StreamResponse
    ) -> None:
        rest = b""
        async for data in answer.content.iter_any():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                while self._held[watch.resource]:
                    async with self._flows:
                        await self._flows.wait()
                again = list(watch.recent) if watch.repeat else []
                if again:
                    watch.repeat = False
                    self.done["repeat"] += len(again)
                for each in (*again, line):
                    await response.write(each + b"\n")
                watch.recent.append(line)

    async def _touch(self, path: str) -> None:
        """Change a FineTuneJob as somebody else does who puts a mark on it."""
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": MERGE_PATCH}
        mark = {"metadata": {"annotations": {TOUCHED: str(self.done["conflict"])}}}
        with contextlib.suppress(aiohttp.ClientError):
            await self._client.patch(
                f"{self._server}{path}", headers=headers, data=json.dumps(mark)
            )

    def _take(self, fault: str) -> bool:
        if self._armed[fault] <= 0:
            return False
        self._armed[fault] -= 1
        self.done[fault] += 1
        return True

    def _cut(self) -> None:
        for watch in _all(self._watches):
            _end(watch.transport)

    def _repeat(self) -> None:
        for watch in _all(self._watches):
            watch.repeat = True

    def _hold(self, resource: str, seconds: float) -> None:
        self._held[resource] += 1
        self._loop.call_later(seconds, self._release, resource)

    def _release(self, resource: str) -> None:
        self._held[resource] -= 1

        async def wake() -> None:
            async with self._flows:
                self._flows.notify_all()

        self._waking = self._loop.create_task(wake())


def _all(watches: set[_Watch]) -> Iterator[_Watch]:
    yield from list(watches)


def _is_write(request: web.Request) -> bool:
    """Whether it changes a Job or a FineTuneJob; to be refused a rehearsal costs nothing."""
    if request.method == "GET" or "dryRun" in request.query:
        return False
    return "/jobs" in request.path or "/finetunejobs/" in request.path


def _is_status(request: web.Request) -> bool:
    return request.method == "PATCH" and request.path.endswith("/status")


def _end(transport: asyncio.BaseTransport | None) -> None:
    if isinstance(transport, asyncio.Transport):
        transport.abort()


def _gone(request: web.Request) -> web.Response:
    """End the connection without an answer."""
    _end(request.transport)
    return web.Response(status=502)


def _overloaded() -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "reason": "ServiceUnavailable",
        "message": "the server is overloaded",
        "code": 503,
    }
