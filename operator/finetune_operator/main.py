"""Start-up of the operator: settings, logging, probes, and the watches with their workers."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import kopf
from aiohttp import web

from finetune_operator.cluster import Cluster
from finetune_operator.errors import ClusterError, NotFoundError, OperatorError
from finetune_operator.handlers import Watches, kopf_settings
from finetune_operator.metrics import Metrics
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import PREFIX, Settings, SettingsError
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0  # for so long an answer of the API server counts as fresh


def run() -> None:
    """Console entry: run until SIGTERM or SIGINT."""
    _parser().parse_args()
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as problem:
        sys.exit(f"finetune-operator: {problem}")
    configure_logging(settings)
    try:
        asyncio.run(serve(settings))
    except* OperatorError as failed:
        for error in failed.exceptions:
            logger.critical("The operator can't go on: %s", error)
        sys.exit(1)


async def serve(settings: Settings) -> None:
    """Watch and reconcile until told to stop."""
    metrics = Metrics()
    async with Cluster.connect(settings.request_timeout_seconds) as cluster:
        await _check(cluster, settings)
        operator = _Operator(cluster, settings, metrics)
        async with operator.probes():
            await operator.work()


async def _check(cluster: Cluster, settings: Settings) -> None:
    """Fail at once where the API server is out of reach or doesn't know the Kind."""
    try:
        await cluster.any_finetunejob(settings.namespaces)
    except NotFoundError as error:
        raise OperatorError(
            "The CustomResourceDefinition of FineTuneJob isn't installed"
        ) from error


class _Operator:
    """The running parts, wired together."""

    def __init__(self, cluster: Cluster, settings: Settings, metrics: Metrics) -> None:
        self._cluster = cluster
        self._settings = settings
        self._metrics = metrics
        self._watches = Watches(cluster, self._add)
        reconciler = Reconciler(cluster, self._watches.snapshot, settings, metrics)
        self._queue = WorkQueue(reconciler, expected=(OperatorError,))
        self._probed = (0.0, "")

    async def work(self) -> None:
        """Run Kopf, the workers and the resync; if one of them fails, all end."""
        namespaces = self._settings.namespaces
        config = kopf.OperatorSettings()
        kopf_settings(config, self._settings.request_timeout_seconds)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._queue.run(self._settings.workers))
            resync = group.create_task(self._resync())
            # Kopf ends all tasks that begin after it does: these two begin before.
            await asyncio.sleep(0)
            try:
                await kopf.operator(
                    registry=self._watches.registry,
                    settings=config,
                    clusterwide=not namespaces,
                    namespaces=namespaces,
                )
            finally:
                resync.cancel()
                self._queue.stop()
        logger.info("Stopped.")

    @asynccontextmanager
    async def probes(self) -> AsyncIterator[None]:
        """Serve /healthz, /readyz and /metrics."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._render_metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, port=self._settings.health_port).start()
            yield
        finally:
            await runner.cleanup()

    def _add(self, key: str) -> None:
        self._queue.add(key)

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._settings.resync_seconds)
            try:
                await self._watches.resync(self._settings.namespaces)
            except ClusterError as error:
                logger.warning("The resync has to wait: %s", error)

    async def _healthz(self, _: web.Request) -> web.Response:
        # That the event loop answers is the point: a failed part ends the process.
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        problem = await self._problem()
        if problem:
            return web.Response(status=503, text=f"{problem}\n")
        return web.Response(text="ok\n")

    async def _render_metrics(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._metrics.render(), headers=headers)

    async def _problem(self) -> str:
        """Why the operator isn't ready; empty when it is."""
        when, problem = self._probed
        if problem or time.monotonic() - when > PROBE_SECONDS:
            problem = await self._look_for_problem()
            self._probed = (time.monotonic(), problem)
        return problem

    async def _look_for_problem(self) -> str:
        try:
            some = await self._cluster.any_finetunejob(self._settings.namespaces)
        except ClusterError as error:
            return str(error)
        if some and not self._watches.synced:
            return "the first lists of the watches are not in yet"
        return ""


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `job` is the FineTuneJob's namespace/name."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if job := _job(record):
            line["job"] = job
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class PlainFormatter(logging.Formatter):
    """Text for people; what concerns one FineTuneJob begins with its namespace/name."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Render a record's line."""
        if job := _job(record):
            record.message = f"[{job}] {record.message}"
        return super().formatMessage(record)


def configure_logging(settings: Settings) -> None:
    """Log to standard error in the format asked for."""
    handler = logging.StreamHandler()
    json_wanted = settings.log_format == "json"
    handler.setFormatter(JsonFormatter() if json_wanted else PlainFormatter())
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    # Kopf reports each call of each handler; what they lead to is logged by `reconcile`.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("kopf.activities").setLevel(logging.WARNING)


def _job(record: logging.LogRecord) -> str | None:
    job: str | None = getattr(record, "job", None)
    reference = getattr(record, "k8s_ref", None)  # where Kopf logs about an object
    if job is None and reference:
        return f"{reference.get('namespace')}/{reference.get('name')}"
    return job


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(
        f"  {PREFIX}{name.upper():26}{field.description}"
        for name, field in Settings.model_fields.items()
    )
    return argparse.ArgumentParser(
        prog="finetune-operator",
        description="Makes the object store converge to the FineTuneJobs of a cluster.",
        epilog=f"environment:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    run()
