"""What the operator tells of itself: its log, metrics for Prometheus, and probes for the kubelet.

A line of the log is text for people, or JSON with the names of the trainer's log: time (UTC),
level, logger, message, where there is one the traceback as `exception`, and as `finetunejob` the
namespace/name of the FineTuneJob that it is about.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

# Most passes make no request; one that starts a stage makes half a dozen.
BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)
UNKNOWN = "Unknown"
READINESS_SECONDS = 5.0  # the readiness probe reuses a good answer for this long

KOPF_ATTRIBUTES = ["k8s_ref", "k8s_skip", "settings"]  # Kopf's own, of no use to a reader


def configure_logging(log_format: str, level: str) -> None:
    """Log to standard error, as `human` or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLine() if log_format == "json" else HumanLine())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Kopf reports each call of each handler; what they lead to is logged by `reconcile`.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("kopf.activities").setLevel(logging.WARNING)


class HumanLine(logging.Formatter):
    """What concerns one FineTuneJob begins with its namespace/name."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        if finetunejob := _finetunejob(record):
            record.message = f"[{finetunejob}] {record.message}"
        return super().formatMessage(record)


class JsonLine(JsonFormatter):
    """One JSON object a line; what is passed as `extra` becomes fields of it."""

    def __init__(self) -> None:
        super().__init__(
            "{levelname}{name}{message}",
            style="{",
            timestamp="time",
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            reserved_attrs=[*RESERVED_ATTRS, *KOPF_ATTRIBUTES],
            json_ensure_ascii=False,
        )

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        super().add_fields(log_data, record, message_dict)
        log_data["level"] = record.levelname.lower()
        if finetunejob := _finetunejob(record):
            log_data["finetunejob"] = finetunejob


def _finetunejob(record: logging.LogRecord) -> str | None:
    finetunejob: str | None = getattr(record, "finetunejob", None)
    reference = getattr(record, "k8s_ref", None)  # where Kopf logs about an object
    if finetunejob is None and reference:
        return f"{reference.get('namespace')}/{reference.get('name')}"
    return finetunejob


class Metrics:
    """Counts passes and FineTuneJobs, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._phases: dict[str, str] = {}
        self._reconciles = Counter(
            "finetune_reconciles",
            "Passes over a FineTuneJob, by result",
            ["result"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "finetune_reconcile_duration_seconds",
            "Time of one pass",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._finetunejobs = Gauge(
            "finetune_jobs", "FineTuneJobs, by phase", ["phase"], registry=self.registry
        )

        self._watch_restarts = Counter(
            "finetune_watch_restarts",
            "Times that the watches failed and began anew",
            registry=self.registry,
        )

        self._leading = Gauge(
            "finetune_leader",
            "1 in the operator that acts, 0 in one that waits for it to end",
            registry=self.registry,
        )

    def leading(self, leads: bool) -> None:
        """Say whether this operator acts."""
        self._leading.set(leads)

    def watches_failed(self) -> None:
        """Count that the watches begin anew."""
        self._watch_restarts.inc()

    def reconciled(self, result: str, seconds: float) -> None:
        """Count one pass: `changed`, `unchanged`, `stale`, `gone` or `error`."""
        self._reconciles.labels(result).inc()
        self._duration.observe(seconds)

    def in_phase(self, key: str, phase: str | None) -> None:
        phase = phase or UNKNOWN
        if self._phases.get(key) != phase:
            self.forget(key)
            self._phases[key] = phase
            self._finetunejobs.labels(phase).inc()

    def forget(self, key: str) -> None:
        """Stop counting a FineTuneJob that is gone."""
        phase = self._phases.pop(key, None)
        if phase is not None:
            self._finetunejobs.labels(phase).dec()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class Probes:
    """Serves /healthz, /readyz and /metrics.

    `find_problem` says why the operator isn't ready, `find_death` why it needs a new process.
    """

    def __init__(
        self,
        port: int,
        metrics: Metrics,
        find_problem: Callable[[], Awaitable[str]],
        find_death: Callable[[], str],
    ) -> None:
        self._port = port
        self._metrics = metrics
        self._find_problem = find_problem
        self._find_death = find_death
        self._problem = ""
        self._looked_at: float | None = None

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._render_metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, port=self._port).start()
            yield
        finally:
            await runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        # An answer proves that the event loop works; a failure of the workers ends the process.
        if dead := self._find_death():
            return web.Response(status=503, text=f"{dead}\n")
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        now = time.monotonic()
        fresh = self._looked_at is not None and now - self._looked_at <= READINESS_SECONDS
        if self._problem or not fresh:
            self._problem = await self._find_problem()
            self._looked_at = time.monotonic()
        if self._problem:
            return web.Response(status=503, text=f"{self._problem}\n")
        return web.Response(text="ok\n")

    async def _render_metrics(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._metrics.render(), headers=headers)
