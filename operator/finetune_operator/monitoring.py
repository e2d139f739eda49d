"""Metrics for Prometheus, and probes for the kubelet."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Most passes make no request; one that starts a stage makes half a dozen.
BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)
UNKNOWN = "Unknown"
READINESS_SECONDS = 5.0  # the readiness probe reuses a good answer for this long


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
    """Serves /healthz, /readyz and /metrics; `find_problem` says why the operator isn't ready."""

    def __init__(
        self, port: int, metrics: Metrics, find_problem: Callable[[], Awaitable[str]]
    ) -> None:
        self._port = port
        self._metrics = metrics
        self._find_problem = find_problem
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
        # An answer proves that the event loop works; a failure elsewhere ends the process.
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
