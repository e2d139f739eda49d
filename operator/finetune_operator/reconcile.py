"""One pass over one FineTuneJob: observe, plan, apply, status.

A pass is level-based: it looks at what is, not at what happened, and a pass that finds nothing to
change calls nothing. All memory of what was decided is in the object's status. What is kept here
only bridges the moment until the watches show what this process itself has written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.cluster import (
    AlreadyExistsError,
    Cluster,
    ClusterError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
)
from finetune_operator.hardware import Labels, memory_label, training_hardware
from finetune_operator.manifests import StageObjects, pod_settings_digest, stage_objects
from finetune_operator.monitoring import Metrics
from finetune_operator.observe import (
    ObservedFineTuneJob,
    ObservedJob,
    controller_uid,
    observe_finetunejob,
    observe_jobs,
    stages_at_work,
)
from finetune_operator.plan import Event, Plan, Policy, StartStage, StopJob, plan, refuse
from finetune_operator.settings import Settings
from finetune_operator.status import status_patch
from finetune_trainer.contract import Reason, Stage

logger = logging.getLogger(__name__)

SOON = 1.0  # seconds until a pass that found the object changed under its hands is repeated
BRIDGE_SECONDS = 60.0  # no watch is that late; whoever is, is not believed any more

Raw = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What the watches have seen of one FineTuneJob and its children."""

    finetunejob: Raw
    jobs: tuple[Raw, ...]
    pods: tuple[Raw, ...]
    earlier_pods: tuple[Raw, ...] = ()
    """Pods of another FineTuneJob that had this name before."""


@dataclass
class _Bridge:
    """What this process wrote for one key and the watches may not show yet."""

    uid: str
    outdated: str | None = None
    """The resourceVersion that our last status patch replaced."""

    created: dict[str, Raw] = field(default_factory=dict)
    """Jobs that we made, by name."""

    until: float = 0.0


Lookup = Callable[[str], Snapshot | None]


class Reconciler:
    """Makes passes; its call is what the work queue calls."""

    def __init__(
        self, cluster: Cluster, lookup: Lookup, settings: Settings, metrics: Metrics
    ) -> None:
        self._cluster = cluster
        self._lookup = lookup
        self._settings = settings
        self._metrics = metrics
        self._policy = Policy(secret_grace=timedelta(seconds=settings.secret_grace_seconds))
        self._bridges: dict[str, _Bridge] = {}

    async def __call__(self, key: str) -> float | None:
        """Make one pass over `namespace/name`; the seconds after which to make another."""
        start = time.monotonic()
        result = "error"
        try:
            result, again = await self._pass(key)
        finally:
            self._metrics.reconciled(result, time.monotonic() - start)
        return again

    async def _pass(self, key: str) -> tuple[str, float | None]:
        snapshot = self._lookup(key)
        if snapshot is None:
            self._forget(key)
            return "gone", None
        job = observe_finetunejob(snapshot.finetunejob)
        bridge = self._bridge(key, job)
        if bridge.outdated == job.resource_version:
            return "stale", SOON  # the watch will bring what we have written ourselves
        runs = observe_jobs(job.uid, _jobs(snapshot, bridge), snapshot.pods)
        self._metrics.in_phase(key, job.status.phase)
        decided = self._plan(job, runs, stages_at_work(snapshot.earlier_pods))
        try:
            return await self._carry_out(key, job, runs, decided, bridge)
        except ConflictError:
            return "stale", SOON
        except NotFoundError:
            self._forget(key)
            return "gone", None

    def _plan(
        self,
        job: ObservedFineTuneJob,
        runs: tuple[ObservedJob, ...],
        occupied: frozenset[Stage],
    ) -> Plan:
        spec = job.spec
        digests = (
            {stage: pod_settings_digest(spec, stage, self._settings) for stage in Stage}
            if spec is not None
            else {}
        )
        return plan(job, runs, digests, self._policy, datetime.now(UTC), occupied=occupied)

    async def _carry_out(
        self,
        key: str,
        job: ObservedFineTuneJob,
        runs: tuple[ObservedJob, ...],
        decided: Plan,
        bridge: _Bridge,
    ) -> tuple[str, float | None]:
        try:
            await self._apply(job, decided, bridge)
        except InvalidError as error:
            # E.g. a quantity that is none: only the server that makes pods of it can tell.
            decided = refuse(job, runs, Reason.INVALID_SPEC, error.detail, datetime.now(UTC))
            await self._apply(job, decided, bridge)
        except ForbiddenError as error:
            # E.g. a quota: it may be raised, so the queue tries again, and the user learns why.
            await self._record(key, job, (Event("Warning", "Forbidden", error.detail),))
            raise
        # Before the status, which says that they were posted: none is lost, and one that is posted
        # again after a crash is the same Event by its name.
        await self._record(key, job, decided.notices)
        changed = await self._write_status(key, job, decided, bridge)
        await self._record(key, job, decided.events)
        result = "changed" if changed or decided.actions else "unchanged"
        return result, decided.requeue_after

    async def _apply(self, job: ObservedFineTuneJob, decided: Plan, bridge: _Bridge) -> None:
        for action in decided.actions:
            match action:
                case StopJob():
                    await self._cluster.delete_job(job.namespace, action.name, action.uid)
                    bridge.created.pop(action.name, None)
                case StartStage():
                    await self._start(job, action, bridge)

    async def _start(self, job: ObservedFineTuneJob, action: StartStage, bridge: _Bridge) -> None:
        if job.spec is None:
            raise ValueError("a stage can't be started without a spec")
        nodes = await self._gpu_nodes(job, job.spec) if action.stage is Stage.PREPARE else ()
        objects: StageObjects = stage_objects(
            job,
            job.spec,
            self._settings,
            stage=action.stage,
            key=action.key,
            attempt=action.attempt,
            resolved=action.resolved,
            hardware=training_hardware(job.spec, nodes),
        )
        made: Raw = {}
        for body in objects:
            made = await self._ensure(job, body)
        bridge.created[made["metadata"]["name"]] = made
        bridge.until = time.monotonic() + BRIDGE_SECONDS

    async def _gpu_nodes(
        self, job: ObservedFineTuneJob, spec: FineTuneJobSpec
    ) -> tuple[Labels, ...]:
        """Labels of the nodes with GPUs, where they are needed and may be read."""
        label = memory_label(spec)
        if label is None:
            return ()
        try:
            return await self._cluster.node_labels(label)
        except ForbiddenError:
            # By design where only some namespaces are watched; spec.training.gpuMemory helps.
            key = f"{job.namespace}/{job.name}"
            logger.info("No right to read the nodes' GPU memory.", extra={"finetunejob": key})
            return ()

    async def _ensure(self, job: ObservedFineTuneJob, body: Raw) -> Raw:
        """Create an object; one that is there already must be ours."""
        try:
            return await self._cluster.create(body)
        except AlreadyExistsError:
            meta = body["metadata"]
            found = await self._cluster.get(body["kind"], meta["namespace"], meta["name"])
            if controller_uid(found) != job.uid:
                message = f"{body['kind']} {meta['name']} exists and belongs to someone else"
                raise ForbiddenError(message) from None
            return found

    async def _write_status(
        self, key: str, job: ObservedFineTuneJob, decided: Plan, bridge: _Bridge
    ) -> bool:
        patch = status_patch(job.status, decided.status)
        if not patch:
            return False
        version = job.resource_version
        written = await self._cluster.patch_status(job.namespace, job.name, version, patch)
        if written["metadata"]["resourceVersion"] != version:
            bridge.outdated = version
            bridge.until = time.monotonic() + BRIDGE_SECONDS
        self._metrics.in_phase(key, decided.status.phase)
        return True

    async def _record(self, key: str, job: ObservedFineTuneJob, events: Iterable[Event]) -> None:
        """Post the Events; they are news, not state, so losing one is no failure."""
        about = {"namespace": job.namespace, "name": job.name, "uid": job.uid}
        for event in events:
            level = logging.WARNING if event.type == "Warning" else logging.INFO
            logger.log(level, "%s: %s", event.reason, event.message, extra={"finetunejob": key})
            try:
                await self._cluster.record_event(
                    about, event.type, event.reason, event.message, event.scope
                )
            except ClusterError as error:
                logger.warning("An event got lost: %s", error, extra={"finetunejob": key})

    def _bridge(self, key: str, job: ObservedFineTuneJob) -> _Bridge:
        """The bridge of this object, empty where there is none or it is too old to be needed."""
        bridge = self._bridges.get(key)
        expired = bridge is not None and bridge.until < time.monotonic()
        if bridge is None or bridge.uid != job.uid or expired:
            bridge = self._bridges[key] = _Bridge(job.uid)
        return bridge

    def _forget(self, key: str) -> None:
        self._bridges.pop(key, None)
        self._metrics.forget(key)


def _jobs(snapshot: Snapshot, bridge: _Bridge) -> list[Raw]:
    """The Jobs seen, and those that we made a moment ago and the watch doesn't show yet."""
    seen = {job["metadata"]["name"] for job in snapshot.jobs}
    for name in seen & bridge.created.keys():
        del bridge.created[name]
    return [*snapshot.jobs, *bridge.created.values()]
