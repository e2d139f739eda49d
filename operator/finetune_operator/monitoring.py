"""What the operator tells of itself: its log, metrics for Prometheus, and probes for the kubelet.

A line of the log is text for people, or JSON with the names of the trainer's log: time (UTC),
level, logger, message, where there is one the traceback as `exception`, and as `finetunejob` the
namespace/name of the FineTuneJob that it is about.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from importlib.metadata import version
from typing import Any

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from finetune_operator.api.observed import FineTuneJobStatus, StageState, StageStatus

# Most passes make no request; one that starts a stage makes half a dozen.
PASS_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)
STAGE_BUCKETS = (10, 30, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600)
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
    """What Prometheus scrapes, in a registry of its own.

    Each thing that happened is counted once by the operator that wrote it into a status, so that
    the sum over several operators, and over restarts, is right.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._phases: dict[str, tuple[str, str]] = {}
        self._reconciles = self._counter(
            "reconciles", "Passes over a FineTuneJob, by result", "result"
        )
        self._duration = self._histogram(
            "reconcile_duration_seconds", "Time of one pass", PASS_BUCKETS
        )
        self._finetunejobs = self._gauge(
            "jobs", "FineTuneJobs, by namespace and phase", "namespace", "phase"
        )
        self._attempts = self._counter(
            "stage_attempts", "Attempts begun, by stage", "namespace", "stage"
        )
        self._failures = self._counter(
            "stage_failures", "Attempts that failed, by reason", "namespace", "stage", "reason"
        )
        self._disruptions = self._counter(
            "stage_disruptions", "Pods lost without the stage's doing", "namespace", "stage"
        )
        self._stage_seconds = self._histogram(
            "stage_duration_seconds", "Time of the attempt that ended well", STAGE_BUCKETS, "stage"
        )
        self._gpu_seconds = self._counter(
            "gpu_seconds", "Seconds that ended pods ran, times their GPUs", "namespace", "stage"
        )
        self._requests = self._counter(
            "api_requests", "Requests to the API server, by verb and status code", "verb", "code"
        )
        self._request_seconds = self._histogram(
            "api_request_duration_seconds", "Time of one request", PASS_BUCKETS, "verb"
        )
        self._watch_restarts = self._counter(
            "watch_restarts", "Times that the watches failed and began anew"
        )
        self._leading = self._gauge(
            "leader", "1 in the operator that acts, 0 in one that waits for it to end"
        )
        build = self._gauge(
            "build_info", "Always 1; the label is the operator's version", "version"
        )
        build.labels(version("finetune-operator")).set(1)
        ProcessCollector(registry=self.registry)

    def watch_queue(self, depth: Callable[[], float], age: Callable[[], float]) -> None:
        """Show the work queue: how many keys are ready, and how long the oldest of them is."""
        self._gauge("queue_depth", "FineTuneJobs whose pass is due").set_function(depth)
        name = "queue_age_seconds"
        self._gauge(name, "Time that the longest due pass waits").set_function(age)

    def watch_events(self, age: Callable[[], float], outdated: Callable[[], float]) -> None:
        """Show how far the watches are behind."""
        name = "watch_last_event_age_seconds"
        self._gauge(name, "Time since the watches last showed anything").set_function(age)
        self._gauge(
            "watch_outdated_objects", "Objects whose change the watches didn't show at the resync"
        ).set_function(outdated)

    def leading(self, leads: bool) -> None:
        """Say whether this operator acts."""
        self._leading.set(leads)

    def watches_failed(self) -> None:
        """Count that the watches begin anew."""
        self._watch_restarts.inc()

    def requested(self, verb: str, code: str, seconds: float) -> None:
        """Count a request to the API server; the code is `timeout` or `error` without an answer."""
        self._requests.labels(verb, code).inc()
        self._request_seconds.labels(verb).observe(seconds)

    def reconciled(self, result: str, seconds: float) -> None:
        """Count one pass: `changed`, `unchanged`, `stale`, `gone` or `error`."""
        self._reconciles.labels(result).inc()
        self._duration.observe(seconds)

    def wrote(self, key: str, before: FineTuneJobStatus, after: FineTuneJobStatus) -> None:
        """Count what a status that was written says for the first time."""
        namespace = key.split("/", 1)[0]
        known = {stage.name: stage for stage in before.stages}
        for stage in after.stages:
            self._changed(namespace, known.get(stage.name, StageStatus(name=stage.name)), stage)
        used = {each.name: each.gpu_seconds for each in before.usage.stages} if before.usage else {}
        for each in after.usage.stages if after.usage else ():
            more = each.gpu_seconds - used.get(each.name, 0)
            self._gpu_seconds.labels(namespace, each.name).inc(max(more, 0))

    def _changed(self, namespace: str, was: StageStatus, stage: StageStatus) -> None:
        where = (namespace, stage.name)
        if stage.attempt > was.attempt:
            self._attempts.labels(*where).inc(stage.attempt - was.attempt)
        if stage.disruptions > was.disruptions:
            self._disruptions.labels(*where).inc(stage.disruptions - was.disruptions)
        if stage.completion_time is None or stage.completion_time == was.completion_time:
            return
        if stage.state is not StageState.SUCCEEDED and stage.reason:
            self._failures.labels(*where, stage.reason).inc()
        elif stage.start_time and not stage.cached:
            began, ended = map(datetime.fromisoformat, (stage.start_time, stage.completion_time))
            self._stage_seconds.labels(stage.name).observe(max((ended - began).total_seconds(), 0))

    def in_phase(self, key: str, phase: str | None) -> None:
        now = (key.split("/", 1)[0], phase or UNKNOWN)
        if self._phases.get(key) != now:
            self.forget(key)
            self._phases[key] = now
            self._finetunejobs.labels(*now).inc()

    def forget(self, key: str) -> None:
        """Stop counting a FineTuneJob that is gone."""
        before = self._phases.pop(key, None)
        if before is not None:
            self._finetunejobs.labels(*before).dec()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"finetune_{name}", words, labels, registry=self.registry)

    def _gauge(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"finetune_{name}", words, labels, registry=self.registry)

    def _histogram(
        self, name: str, words: str, buckets: Sequence[float], *labels: str
    ) -> Histogram:
        return Histogram(f"finetune_{name}", words, labels, buckets=buckets, registry=self.registry)


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
