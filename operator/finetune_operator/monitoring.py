"""How others see whether the operator works: Prometheus metrics, and the kubelet's probes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Most passes only look; one that starts a stage makes half a dozen requests.
BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)
UNKNOWN = "Unknown"
READINESS_SECONDS = 5.0  # for so long the answer to the readiness probe counts


class Metrics:
    """What a person on call asks first: is it working, is it failing, what is waiting."""

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
        self._jobs = Gauge(
            "finetune_jobs", "FineTuneJobs, by phase", ["phase"], registry=self.registry
        )

    def reconciled(self, result: str, seconds: float) -> None:
        """Count one pass: `changed`, `unchanged`, `stale`, `gone` or `error`."""
        self._reconciles.labels(result).inc()
        self._duration.observe(seconds)

    def in_phase(self, key: str, phase: str | None) -> None:
        """Remember the phase that a FineTuneJob is in."""
        phase = phase or UNKNOWN
        if self._phases.get(key) != phase:
            self.forget(key)
            self._phases[key] = phase
            self._jobs.labels(phase).inc()

    def forget(self, key: str) -> None:
        """Stop counting a FineTuneJob that is gone."""
        phase = self._phases.pop(key, None)
        if phase is not None:
            self._jobs.labels(phase).dec()

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
        """Answer for as long as the context lasts."""
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
        # That the event loop answers is the point: a failed part ends the process.
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
