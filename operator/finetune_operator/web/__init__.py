"""A read-only web page: what the watches show of FineTuneJobs, for people without kubectl.

It asks the API server for nothing, and has neither a login nor anything that changes the cluster.
`pages` says what a page shows; the templates make HTML of it, without a script.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import unicodedata
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.resources import files
from typing import Any, TypeGuard
from urllib.parse import urlencode

from aiohttp import hdrs, web
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetune_operator.api import JsonObject
from finetune_operator.cluster import OperatorError
from finetune_operator.settings import EVERY_ADDRESS, Settings
from finetune_operator.web.pages import Filters, Point, job_page, list_page
from finetune_trainer.contract import Stage
from finetune_trainer.contract.base import redact

CURVES, POINTS = 1_000, 120  # 24 bytes a point: 3 MB at most
TEXT_LIMIT = 4_000  # characters of one text on a page
SHORTEST_REFRESH, LONGEST_REFRESH = 5, 3600  # seconds
BIDIRECTIONAL = {chr(code) for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F))} | {
    chr(code) for code in range(0x2066, 0x206A)
}
THIS_MACHINE = {"localhost", "127.0.0.1", "[::1]"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "finetune-operator",  # in place of the libraries' versions
}

Shown = Callable[[], Sequence[JsonObject]]
"""Every FineTuneJob that the watches show; raises an OperatorError while they can't tell."""


class LossCurves:
    """The losses that trainings report while this operator runs, since status has only the last.

    Where a curve is full, every second point of it goes; where there are too many curves, the one
    that was told of longest ago.
    """

    def __init__(self, curves: int = CURVES, points: int = POINTS) -> None:
        self._limits = (curves, points)
        self._known: OrderedDict[str, tuple[str, array[float]]] = OrderedDict()

    def note(self, raw: JsonObject) -> None:
        """Remember what a FineTuneJob's progress says."""
        status = raw.get("status") or {}
        told = status.get("progress") or {}
        step, loss = told.get("step"), told.get("loss")
        if told.get("stage") != Stage.TRAIN or not isinstance(step, int) or not _is_number(loss):
            return
        held_out = told.get("evalLoss")
        point = (float(step), float(loss), float(held_out) if _is_number(held_out) else math.nan)
        stages = {each.get("name"): each for each in status.get("stages") or []}
        training = str(stages.get(Stage.TRAIN, {}).get("fingerprint") or "")
        self._add(str(raw["metadata"]["uid"]), training, point)

    def of(self, uid: str) -> Sequence[Point]:
        """Step, loss and loss on the held-out rows (NaN where there is none), in order."""
        _, values = self._known.get(uid, ("", array("d")))
        return [(values[n], values[n + 1], values[n + 2]) for n in range(0, len(values), 3)]

    def _add(self, uid: str, training: str, point: Point) -> None:
        before, values = self._known.pop(uid, (training, array("d")))
        if before != training:
            values = array("d")
        # A training that was resumed goes back to its last checkpoint.
        while values and values[-3] >= point[0]:
            del values[-3:]
        values.extend(point)
        curves, points = self._limits
        if len(values) > 3 * points:
            kept = [*range(0, len(values) - 3, 6), len(values) - 3]
            values = array("d", [each for n in kept for each in values[n : n + 3]])
        self._known[uid] = (training, values)
        while len(self._known) > curves:
            self._known.popitem(last=False)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class WebPage:
    """Serves the page, where the settings have a port for it."""

    def __init__(
        self,
        settings: Settings,
        shown: Shown,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings = settings
        self._shown = shown
        self._curves = LossCurves()
        self._now = now
        address = settings.web_address
        self._address = None if address == EVERY_ADDRESS else address
        self._local = self._address is not None and ipaddress.ip_address(address).is_loopback
        self._templates = _environment()
        self._style = _file("style.css")

    def note(self, raw: JsonObject) -> None:
        """Take up what an event shows of a FineTuneJob."""
        if self._settings.web_port is not None:
            self._curves.note(raw)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        """Listen until the end of the block."""
        if self._settings.web_port is None:
            yield
            return
        app = web.Application(middlewares=[self._answer_in_html])
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/", self._list)
        app.router.add_get("/jobs/{namespace}/{name}", self._job)
        app.router.add_get("/style.css", self._stylesheet)
        app.router.add_get("/icon.svg", self._icon)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._address, self._settings.web_port).start()
            yield
        finally:
            await runner.cleanup()

    @web.middleware
    async def _answer_in_html(
        self, request: web.Request, handler: Callable[[web.Request], Any]
    ) -> web.StreamResponse:
        # A page elsewhere could otherwise read this one by a name that leads to this machine.
        if self._local and _host(request) not in THIS_MACHINE:
            return self._problem(
                request,
                HTTPStatus.MISDIRECTED_REQUEST,
                "This page is served to this machine alone: open it as localhost, or serve it to "
                "others (web.service.enabled of the chart).",
            )
        try:
            response: web.StreamResponse = await handler(request)
        except web.HTTPException as error:
            words = {404: "There is no such page.", 405: "This page is for reading only."}
            answer = self._problem(
                request, HTTPStatus(error.status), words.get(error.status, error.reason)
            )
            if hdrs.ALLOW in error.headers:
                answer.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
            return answer
        except OperatorError as error:
            return self._problem(request, HTTPStatus.SERVICE_UNAVAILABLE, f"Not yet: {error}.")
        return response

    async def _list(self, request: web.Request) -> web.Response:
        filters = Filters.of(request.query)
        return self._html("list", request, page=list_page(self._visible(), filters, self._now()))

    async def _job(self, request: web.Request) -> web.Response:
        where = (request.match_info["namespace"], request.match_info["name"])
        for raw in self._visible():
            if (raw["metadata"]["namespace"], raw["metadata"]["name"]) == where:
                curve = self._curves.of(raw["metadata"]["uid"])
                page = job_page(raw, curve, self._settings.web_report_url, self._now())
                return self._html("job", request, page=page)
        return self._problem(
            request, HTTPStatus.NOT_FOUND, "There is no such FineTuneJob, or not any more."
        )

    async def _stylesheet(self, _: web.Request) -> web.Response:
        return web.Response(text=self._style, content_type="text/css")

    async def _icon(self, _: web.Request) -> web.Response:
        return web.Response(text=_file("icon.svg"), content_type="image/svg+xml")

    def _visible(self) -> list[JsonObject]:
        """The FineTuneJobs that may be shown, the newest first."""
        wanted = self._settings.web_namespaces
        found = [
            raw for raw in self._shown() if not wanted or raw["metadata"]["namespace"] in wanted
        ]
        return sorted(found, key=_age, reverse=True)

    def _problem(self, request: web.Request, status: HTTPStatus, message: str) -> web.Response:
        title = f"{status.value} {status.phrase}"
        root = _root(request)
        text = self._render("problem", title=title, message=message, root=root, refresh=None)
        return web.Response(status=status, text=text, content_type="text/html")

    def _html(self, name: str, request: web.Request, **values: Any) -> web.Response:
        refresh = _refresh(request.query)
        others = [(key, value) for key, value in request.query.items() if key != "refresh"]
        text = self._render(
            name,
            root=_root(request),
            refresh=refresh,
            here=f"?{urlencode(others)}",
            refreshing=f"?{urlencode([*others, ('refresh', '15')])}",
            **values,
        )
        return web.Response(text=text, content_type="text/html")

    def _render(self, name: str, **values: Any) -> str:
        version = hashlib.sha256(self._style.encode()).hexdigest()[:8]
        template = self._templates.get_template(f"{name}.html.jinja")
        return template.render(style_version=version, now=self._now(), **values)


def _root(request: web.Request) -> str:
    """The way up to the list: relative, since a proxy may serve all of it below another path."""
    return "../" * (request.rel_url.raw_path.count("/") - 1) or "./"


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers[name] = value


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__name__),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def visible(value: object) -> object:
    """What is put on a page: no credential of a URL, nothing that can't be seen or that turns the
    direction of what follows, and not without end."""
    if value is None:
        return ""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = value[:TEXT_LIMIT]
    if "://" in text:
        text = redact(text)
    return "".join(_seen(each) for each in text) + ("…" if len(value) > TEXT_LIMIT else "")


def _seen(character: str) -> str:
    if character == "\n" or character.isprintable():
        return character
    hidden = character in BIDIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs")
    return f"<U+{ord(character):04X}>" if hidden else character


def _host(request: web.Request) -> str:
    host = request.host.lower()
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _refresh(query: Mapping[str, str]) -> int | None:
    """Seconds after which the browser is to load the page again, where that is asked for."""
    asked = query.get("refresh", "")
    if not (asked.isascii() and asked.isdigit() and len(asked) < 6):
        return None
    return min(max(int(asked), SHORTEST_REFRESH), LONGEST_REFRESH)


def _age(raw: JsonObject) -> tuple[str, str, str]:
    meta = raw["metadata"]
    return str(meta.get("creationTimestamp", "")), str(meta["namespace"]), str(meta["name"])


def _file(name: str) -> str:
    return (files(__name__) / "templates" / name).read_text(encoding="utf-8")
