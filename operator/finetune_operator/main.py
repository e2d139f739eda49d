"""Start-up of the operator: settings, log, probes, and the watches with their workers."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys

import kopf

from finetune_operator.api import JsonObject
from finetune_operator.cluster import (
    Cluster,
    ClusterError,
    ForbiddenError,
    NotFoundError,
    OperatorError,
    UnavailableError,
)
from finetune_operator.handlers import Watches, kopf_settings
from finetune_operator.leadership import Leadership
from finetune_operator.monitoring import Metrics, Probes, configure_logging
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import PREFIX, Settings, SettingsError
from finetune_operator.web import WebPage
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

START_RETRY_SECONDS = 2.0


def run() -> None:
    """Console entry: run until SIGTERM or SIGINT."""
    _parser().parse_args()
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as problem:
        sys.exit(f"finetune-operator: {problem}")
    configure_logging(settings.log_format, settings.log_level)
    try:
        asyncio.run(serve(settings))
    except* OperatorError as failed:
        for error in failed.exceptions:
            logger.critical("The operator can't go on: %s", error)
        sys.exit(1)


async def serve(settings: Settings) -> None:
    """Watch and reconcile until told to stop."""
    metrics = Metrics()
    async with Cluster.connect(settings.request_timeout_seconds, metrics.requested) as cluster:
        operator = _Operator(cluster, settings, metrics)
        async with operator.probes.serve(), operator.page.serve():
            await _wait_for_api_server(cluster, settings)
            await operator.work()


async def _wait_for_api_server(cluster: Cluster, settings: Settings) -> None:
    """Wait out an outage at the start as any later one; raises OperatorError if the Kind isn't
    installed.

    An operator that ended instead would be started anew after ever longer pauses. For a moment
    after its start, the API server forbids everything.
    """
    while True:
        try:
            await cluster.any_finetunejob(settings.namespaces)
        except NotFoundError as error:
            raise OperatorError(
                "The CustomResourceDefinition of FineTuneJob isn't installed"
            ) from error
        except (UnavailableError, ForbiddenError) as error:
            logger.warning("Waiting for the API server: %s", error)
            await asyncio.sleep(START_RETRY_SECONDS)
        else:
            return


class _Operator:
    """Connects the watches, the work queue, the reconciler and the probes."""

    def __init__(self, cluster: Cluster, settings: Settings, metrics: Metrics) -> None:
        self._cluster = cluster
        self._settings = settings
        self._metrics = metrics
        self._watches = Watches(cluster, self._add, self._show, settings.namespaces)
        self.page = WebPage(settings, self._watches.finetunejobs)
        self._leadership = _leadership(cluster, settings)
        self._reconciler = Reconciler(
            cluster, self._watches.snapshot, settings, metrics, self._leads
        )
        self._queue = WorkQueue(self._reconciler, expected=(OperatorError,))
        self._began_to_lead = asyncio.Event()
        metrics.watch_queue(lambda: self._queue.depth, lambda: self._queue.age)
        metrics.watch_events(lambda: self._watches.silence, lambda: self._watches.outdated)
        self.probes = Probes(
            settings.health_port,
            metrics,
            self._watches.problem,
            lambda: self._watches.dead,
        )

    async def work(self) -> None:
        """Run Kopf, the workers and the resync; if the workers or the resync fail, all end."""
        # Kopf cancels all tasks that start after it, so let the others start first.
        async with asyncio.TaskGroup() as group:
            group.create_task(self._queue.run(self._settings.workers))
            others = [
                group.create_task(self._resync()),
                group.create_task(self._look_back()),
            ]
            if self._leadership is not None:
                self._queue.pause()
                others.append(group.create_task(self._take_part(self._leadership)))
            else:
                self._metrics.leading(True)
                self._began_to_lead.set()
            await asyncio.sleep(0)
            try:
                await self._watches.keep_watching(self._watch, self._metrics.watches_failed)
            finally:
                for each in others:
                    each.cancel()
                self._queue.stop()
        if self._leadership is not None:
            await self._leadership.release()
        logger.info("Stopped.")

    def _leads(self) -> bool:
        return self._leadership is None or self._leadership.leads

    async def _take_part(self, leadership: Leadership) -> None:
        """Let the workers work while this operator leads.

        One that doesn't lead watches all the same, so that it can go on at once.
        """
        while True:
            await leadership.acquire()
            self._reconciler.step_down()  # what was learnt before is old
            self._metrics.leading(True)
            self._watches.queue_all()
            self._queue.resume()
            self._began_to_lead.set()
            await leadership.hold()
            self._queue.pause()
            self._reconciler.step_down()
            self._metrics.leading(False)

    async def _watch(self) -> None:
        namespaces = self._settings.namespaces
        config = kopf.OperatorSettings()
        kopf_settings(config, self._settings.request_timeout_seconds)
        await kopf.operator(
            registry=self._watches.registry,
            settings=config,
            clusterwide=not namespaces,
            namespaces=namespaces,
            stop_flag=self._watches.stop,
        )

    def _add(self, key: str) -> None:
        self._queue.add(key)

    async def _look_back(self) -> None:
        """Whenever this operator begins to lead, see what others have left."""
        while True:
            await self._began_to_lead.wait()
            self._began_to_lead.clear()
            try:
                left = await self._reconciler.take_over()
            except ClusterError as error:
                logger.warning("What is there already can't be listed: %s", error)
                await asyncio.sleep(self._settings.resync_seconds)
                if self._leads():
                    self._began_to_lead.set()
                continue
            if self._watches.synced:  # else a pass over each follows anyway
                for key in left:
                    self._queue.add(key)

    def _show(self, raw: JsonObject) -> None:
        self.page.note(raw)

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._settings.resync_seconds)
            try:
                await self._watches.resync()
            except ClusterError as error:
                logger.warning("The resync has to wait: %s", error)


def _leadership(cluster: Cluster, settings: Settings) -> Leadership | None:
    if not settings.lease:
        return None
    return Leadership(cluster, settings.lease, settings.identity, settings.lease_seconds)


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
