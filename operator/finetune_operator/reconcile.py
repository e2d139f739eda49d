"""One pass over one FineTuneJob: observe, plan, apply, status.

A pass is level-based: it looks at the current state, not at what happened. A pass that finds
nothing to change makes no request. Decisions are remembered in the object's status only. The
process itself remembers its own writes until the watches show them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial

from finetune_operator.api import (
    KIND,
    JsonObject,
)
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.cluster import (
    Cluster,
    ClusterError,
    ConflictError,
    DeniedError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
)
from finetune_operator.manifests import StageObjects, pod_settings_digest, stage_objects
from finetune_operator.monitoring import Metrics
from finetune_operator.observe import (
    ObservedFineTuneJob,
    ObservedJob,
    QueueState,
    observe_finetunejob,
    observe_jobs,
    observe_queue,
    pods_without_job,
    stages_at_work,
)
from finetune_operator.plan import (
    Event,
    Plan,
    Policy,
    StartStage,
    StopJob,
    has_ended,
    plan,
    refuse,
)
from finetune_operator.pods import ObservedPod, observe_pod
from finetune_operator.resources import Labels, memory_label, training_hardware, with_usage
from finetune_operator.settings import Settings
from finetune_operator.starting import Starts
from finetune_operator.status import occasion, older_phase, status_patch, timestamp
from finetune_trainer.contract import Reason, Stage

logger = logging.getLogger(__name__)

STALE_RETRY_SECONDS = 1.0  # until the next pass, if the object changed during this one
STALE_RETRY_CAP_SECONDS = 30.0  # the pause doubles as long as it goes on changing, up to this
# The API server sends a bookmark every minute, so a watch that is silent for longer is dead. Its
# cache reaches back 75 seconds, and a watch that resumes within them misses nothing.
WATCH_SILENCE_SECONDS = 70.0
# After this time the watches show an own write: a dead one was noticed and began anew.
OWN_WRITES_SECONDS = 2 * WATCH_SILENCE_SECONDS
DOUBTS = {Reason.REQUEST_DENIED, Reason.INVALID_SPEC}  # what the API server had against a Job


@dataclass(frozen=True)
class Snapshot:
    """What the watches have seen of one FineTuneJob and its children."""

    finetunejob: JsonObject
    jobs: tuple[JsonObject, ...]
    pods: tuple[JsonObject, ...]
    earlier_pods: tuple[JsonObject, ...] = ()
    """Pods of an earlier FineTuneJob of the same name."""


@dataclass
class _OwnWrites:
    """What this process wrote about one FineTuneJob; the watches may not show it yet."""

    uid: str
    outdated: str | None = None
    """The resourceVersion that our last status patch replaced."""

    created: dict[str, JsonObject] = field(default_factory=dict)
    """Jobs that we created, by name."""

    until: float = 0.0
    """When to forget them, on the monotonic clock."""

    stale: int = 0
    """Passes in a row that found the object changed."""

    def pause(self) -> float:
        """How long to wait after a pass that found the object changed."""
        self.stale += 1
        return min(STALE_RETRY_SECONDS * 2.0 ** min(self.stale - 1, 16), STALE_RETRY_CAP_SECONDS)


Lookup = Callable[[str], Snapshot | None]


class Reconciler:
    """Makes the passes; the work queue calls it with a key."""

    def __init__(
        self,
        cluster: Cluster,
        lookup: Lookup,
        settings: Settings,
        metrics: Metrics,
        may_act: Callable[[], bool],
    ) -> None:
        self._cluster = cluster
        self._lookup = lookup
        self._settings = settings
        self._metrics = metrics
        self._may_act = may_act
        self._starts = Starts(cluster, may_act)
        self._policy = Policy(
            secret_grace=timedelta(seconds=settings.secret_grace_seconds),
            disruption_limit=settings.disruption_limit,
        )
        self._own_writes: dict[str, _OwnWrites] = {}

    async def take_over(self) -> set[str]:
        """Learn what there is when this operator begins to lead; the FineTuneJobs, as
        `namespace/name`, that may have something to be tidied up."""
        return await self._starts.take_over(self._settings.namespaces)

    def step_down(self) -> None:
        """Another operator may lead from now on."""
        self._starts.step_down()

    async def __call__(self, key: str) -> float | None:
        """Make one pass over `namespace/name`; return the seconds until the next one."""
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
        finetunejob = observe_finetunejob(snapshot.finetunejob, self._settings.stages)
        own_writes = self._own_writes_of(key, finetunejob)
        if own_writes.outdated == finetunejob.resource_version:
            return "stale", own_writes.pause()  # the watch doesn't show our last write yet
        observed = observe_jobs(finetunejob, _jobs(snapshot, own_writes), snapshot.pods)
        jobs = tuple([await self._explained(finetunejob, job) for job in observed])
        loose = pods_without_job(jobs, snapshot.pods)
        others = (*snapshot.earlier_pods, *loose)
        at_work = any(each.may_have_pod_at_work for each in jobs) or bool(stages_at_work(loose))
        self._metrics.in_phase(key, finetunejob.status.phase)
        decide = partial(
            self._plan, finetunejob, jobs, stages_at_work(others), tuple(map(observe_pod, loose))
        )
        try:
            result = await self._carry_out(key, finetunejob, decide, own_writes, at_work=at_work)
        except ConflictError:
            return "stale", own_writes.pause()
        except NotFoundError:
            self._forget(key)
            return "gone", None
        own_writes.stale = 0
        return result

    def _plan(
        self,
        finetunejob: ObservedFineTuneJob,
        jobs: tuple[ObservedJob, ...],
        old_pods: Mapping[Stage, ObservedPod],
        loose_pods: tuple[ObservedPod, ...],
        denial: str | None = None,
    ) -> Plan:
        spec = finetunejob.spec
        digests = (
            {stage: pod_settings_digest(spec, stage, self._settings) for stage in Stage}
            if spec is not None
            else {}
        )
        now = datetime.now(UTC)
        made = plan(
            finetunejob,
            jobs,
            digests,
            self._policy,
            now,
            old_pods=old_pods,
            denial=denial,
        )
        if finetunejob.deleting:
            return made
        return replace(made, status=with_usage(made.status, jobs, loose_pods, now))

    async def _carry_out(
        self,
        key: str,
        finetunejob: ObservedFineTuneJob,
        decide: Callable[..., Plan],
        own_writes: _OwnWrites,
        *,
        at_work: bool,
    ) -> tuple[str, float | None]:
        """Write the status that explains the actions, and act only once it stands.

        So no action rests on a status that was out of date, and of several operators at most one
        acts. A crash in between costs nothing: the status says what is missing.
        """
        decided: Plan = decide()
        job, denied = None, None
        try:
            job = await self._make_ready(finetunejob, decided)
        except InvalidError as error:
            # E.g. a malformed quantity, which only the API server detects.
            decided = refuse(finetunejob, Reason.INVALID_SPEC, error.detail, datetime.now(UTC))
        except DeniedError as error:
            # E.g. a quota or a policy. It may be mended, so tell the user and let the queue try
            # again.
            decided, denied = decide(denial=error.detail), error
        # Post notices before the status that says so: after a crash in between they are posted
        # again, and the same name makes it the same Event.
        await self._record(finetunejob, decided, decided.notices)
        changed = await self._write_status(key, finetunejob, decided, own_writes)
        if decided.actions and not changed:
            await self._make_sure_of(finetunejob)
        await self._act(finetunejob, decided, job, own_writes)
        await self._record(finetunejob, decided, decided.events)
        if denied is not None:
            raise denied
        tidied = not at_work and await self._tidy(finetunejob, decided, changed)
        result = "changed" if changed or decided.actions or tidied else "unchanged"
        return result, decided.requeue_after

    async def _tidy(self, finetunejob: ObservedFineTuneJob, decided: Plan, changed: bool) -> bool:
        """Delete what no stage of a settled FineTuneJob needs any more; whether there was any."""
        over = has_ended(decided.status, finetunejob.generation) and not decided.actions
        if not over or not self._starts.has_supports(finetunejob):
            return False
        if not changed:
            await self._make_sure_of(finetunejob)
        await self._starts.tidy(finetunejob)
        return True

    async def _explained(self, finetunejob: ObservedFineTuneJob, job: ObservedJob) -> ObservedJob:
        """The Job with what its controller says of a pod that it can't create, the kubelet of one
        that it can't start, or Kueue of why it waits."""
        pod, namespace = job.pod, finetunejob.namespace
        waiting = datetime.now(UTC) - (job.taken_up or datetime.now(UTC))
        try:
            if pod is not None and pod.mounts_secrets:
                words = await self._cluster.failed_mount(namespace, pod.uid)
                return replace(job, pod=replace(pod, mount_failure=words))
            if job.waits_in_queue:
                return replace(job, queue_state=await self._queue_state(namespace, job))
            if job.lacks_pod and waiting >= self._policy.pod_grace:
                words = await self._cluster.failed_create(namespace, job.uid)
                job = replace(job, refusal=words)
                await self._wake(namespace, job)
        except ForbiddenError:
            pass  # this version's rights are not there yet
        return job

    async def _queue_state(self, namespace: str, job: ObservedJob) -> QueueState | None:
        try:
            workload = await self._cluster.workload(namespace, job.uid)
        except NotFoundError:
            return QueueState("The cluster has no Kueue.", admissible=False)
        return observe_queue(workload) if workload is not None else None

    async def _wake(self, namespace: str, job: ObservedJob) -> None:
        """Remind the Job controller of a Job that should have a pod."""
        now = datetime.now(UTC)
        last = job.woken or job.taken_up or now
        if now - last >= self._policy.wake_interval:
            await self._cluster.wake_job(namespace, job.name, timestamp(now))

    async def _make_ready(
        self, finetunejob: ObservedFineTuneJob, decided: Plan
    ) -> JsonObject | None:
        """Create what the Job of a stage to start needs; return the Job, which the API server
        would accept."""
        for action in decided.actions:
            if isinstance(action, StartStage):
                objects = await self._objects(finetunejob, action)
                doubtful = finetunejob.status.reason in DOUBTS
                await self._starts.make_ready(finetunejob, objects, doubtful=doubtful)
                return objects.job
        return None

    async def _make_sure_of(self, finetunejob: ObservedFineTuneJob) -> None:
        """Raise ConflictError unless the API server still holds what the watch shows."""
        found = await self._cluster.get(KIND, finetunejob.namespace, finetunejob.name)
        if found["metadata"]["resourceVersion"] != finetunejob.resource_version:
            raise ConflictError(f"{finetunejob.namespace}/{finetunejob.name} has changed")

    async def _act(
        self,
        finetunejob: ObservedFineTuneJob,
        decided: Plan,
        job: JsonObject | None,
        own_writes: _OwnWrites,
    ) -> None:
        for action in decided.actions:
            if not self._may_act():
                raise ConflictError("another operator leads by now")
            if isinstance(action, StopJob):
                await self._cluster.delete_job(finetunejob.namespace, action.name, action.uid)
                own_writes.created.pop(action.name, None)
            elif job is not None:
                made = await self._starts.create_job(finetunejob, job)
                own_writes.created[made["metadata"]["name"]] = made
                own_writes.until = time.monotonic() + OWN_WRITES_SECONDS

    async def _objects(self, finetunejob: ObservedFineTuneJob, action: StartStage) -> StageObjects:
        if finetunejob.spec is None:
            raise ValueError("a stage can't be started without a spec")
        nodes = (
            await self._gpu_nodes(finetunejob, finetunejob.spec)
            if action.stage is Stage.PREPARE
            else ()
        )
        return stage_objects(
            finetunejob,
            finetunejob.spec,
            self._settings,
            stage=action.stage,
            stage_key=action.stage_key,
            attempt=action.attempt,
            resolved=action.resolved,
            hardware=training_hardware(finetunejob.spec, nodes),
        )

    async def _gpu_nodes(
        self, finetunejob: ObservedFineTuneJob, spec: FineTuneJobSpec
    ) -> tuple[Labels, ...]:
        """Labels of the nodes with GPUs, if they are needed and may be read."""
        label = memory_label(spec)
        if label is None:
            return ()
        try:
            return await self._cluster.node_labels(label)
        except ForbiddenError:
            # Expected if only some namespaces are watched; spec.training.gpuMemory replaces it.
            key = f"{finetunejob.namespace}/{finetunejob.name}"
            logger.info("No right to read the nodes' GPU memory.", extra={"finetunejob": key})
            return ()

    async def _write_status(
        self, key: str, finetunejob: ObservedFineTuneJob, decided: Plan, own_writes: _OwnWrites
    ) -> bool:
        patch = status_patch(finetunejob.status, decided.status)
        if not patch:
            return False
        name = (finetunejob.namespace, finetunejob.name, finetunejob.resource_version)
        version = finetunejob.resource_version
        try:
            written = await self._cluster.patch_status(*name, patch)
        except InvalidError:
            if "phase" not in patch:
                raise
            patch["phase"] = older_phase(decided.status)  # an older definition knows fewer words
            written = await self._cluster.patch_status(*name, patch)
        if written["metadata"]["resourceVersion"] != version:
            own_writes.outdated = version
            own_writes.until = time.monotonic() + OWN_WRITES_SECONDS
        self._metrics.in_phase(key, decided.status.phase)
        self._metrics.wrote(key, finetunejob.status, decided.status)
        return True

    async def _record(
        self, finetunejob: ObservedFineTuneJob, decided: Plan, events: Iterable[Event]
    ) -> None:
        """Post the Events. They are news and not state, so losing one is no failure."""
        about = {
            "namespace": finetunejob.namespace,
            "name": finetunejob.name,
            "uid": finetunejob.uid,
        }
        details = _log_fields(finetunejob, decided)
        for event in events:
            level = logging.WARNING if event.type == "Warning" else logging.INFO
            logger.log(level, "%s: %s", event.reason, event.message, extra=details)
            scope = event.scope or occasion(decided.status)
            try:
                await self._cluster.record_event(
                    about, event.type, event.reason, event.message, scope
                )
            except ClusterError as error:
                logger.warning("An event got lost: %s", error, extra=details)

    def _own_writes_of(self, key: str, finetunejob: ObservedFineTuneJob) -> _OwnWrites:
        """The own writes about this object; none if there were none, or if they have expired."""
        own_writes = self._own_writes.get(key)
        expired = own_writes is not None and own_writes.until < time.monotonic()
        if own_writes is None or own_writes.uid != finetunejob.uid:
            own_writes = self._own_writes[key] = _OwnWrites(finetunejob.uid)
        elif expired:
            stale = own_writes.stale
            own_writes = self._own_writes[key] = _OwnWrites(finetunejob.uid, stale=stale)
        return own_writes

    def _forget(self, key: str) -> None:
        self._own_writes.pop(key, None)
        self._starts.forget(key)
        self._metrics.forget(key)


def _log_fields(finetunejob: ObservedFineTuneJob, decided: Plan) -> dict[str, object]:
    """What a line of the log is about."""
    attempts = {each.name: each.attempt for each in decided.status.stages}
    stage = decided.status.stage
    return {
        "finetunejob": f"{finetunejob.namespace}/{finetunejob.name}",
        "uid": finetunejob.uid,
        "generation": finetunejob.generation,
        "stage": stage and str(stage),
        "attempt": attempts.get(stage) if stage else None,
    }


def _jobs(snapshot: Snapshot, own_writes: _OwnWrites) -> list[JsonObject]:
    """The Jobs that the watch shows, and our own new ones that it doesn't show yet."""
    seen = {job["metadata"]["name"] for job in snapshot.jobs}
    for name in seen & own_writes.created.keys():
        del own_writes.created[name]
    return [*snapshot.jobs, *own_writes.created.values()]
