"""What the cluster's objects say, parsed once into frozen values.

Only this module knows how Kubernetes writes conditions, container states and the kubelet's reasons,
so that `plan` contains decisions alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from finetune_operator.api import (
    ATTEMPT_LABEL,
    KIND,
    POD_SETTINGS_ANNOTATION,
    STAGE_KEY_ANNOTATION,
    STAGE_LABEL,
    TRAINER_CONTAINER,
    JsonObject,
)
from finetune_operator.api.finetunejob import FineTuneJobSpec, FineTuneJobStatus, StageState
from finetune_trainer.contract import (
    Notice,
    Stage,
    StageResult,
    describe,
    read_known,
    read_readable,
)

# Reasons in a pod's status for which the container is not to blame: the node or the control plane
# removed the pod or did not admit it. `OutOf<resource>` is another, for any resource.
DISRUPTIONS = {
    "Evicted",
    "NodeAffinity",
    "NodeLost",
    "NodeShutdown",
    "Preempted",
    "Preempting",
    "Shutdown",
    "Terminated",
    "UnexpectedAdmissionError",
}
# The kubelet also evicts a pod that exceeds its own limits, and then the pod is to blame.
OVERGROWN = re.compile(r"exceeds the (total )?limit|exceeded its local ephemeral storage limit")
ENDED = {"Succeeded", "Failed"}  # phases of a pod
KNOWN_STATES = {*StageState, None}
LOG_LINE_LIMIT = 300  # characters of a log line that is quoted to the user


@dataclass(frozen=True)
class Waiting:
    """Why a container doesn't run yet."""

    reason: str
    message: str


@dataclass(frozen=True)
class ObservedPod:
    """A pod of a stage's Job."""

    name: str
    phase: str
    since: datetime
    """When the kubelet accepted it, or else when it was created."""

    image: str
    started: bool = False
    """Whether the trainer runs or has run."""

    waiting: Waiting | None = None
    exit_code: int | None = None
    finished_at: datetime | None = None
    result: StageResult | None = None
    last_log_line: str = ""
    """The last line of the log, if the container left no StageResult."""

    oom_killed: bool = False
    out_of_disk: str | None = None
    """The kubelet's message, if the pod exceeded its ephemeral storage."""

    disruption: str | None = None
    """Who removed the pod and why, if the trainer is not to blame."""

    unschedulable: str | None = None
    """The scheduler's message, while no node fits."""

    deleting: bool = False
    delete_by: datetime | None = None
    """When a pod that is being deleted should be gone, its grace period included."""

    node: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether its trainer has ended, or never ran and never will."""
        return self.exit_code is not None or self.phase in ENDED

    @property
    def at_work(self) -> bool:
        """Whether its trainer still runs, maybe in the grace period of a deleted pod."""
        return self.started and self.exit_code is None and self.phase not in ENDED

    @property
    def may_work(self) -> bool:
        """Whether its trainer runs or may yet be started; a deleted pod is not started any more."""
        begins = not self.started and not self.deleting and self.phase not in ENDED
        return self.at_work or begins


def observe_pod(raw: JsonObject) -> ObservedPod:
    meta, status = raw["metadata"], raw.get("status") or {}
    state = _trainer_state(status)
    ended = state.get("terminated") or {}
    waiting = state.get("waiting")
    result = StageResult.from_message(ended.get("message", ""))
    return ObservedPod(
        name=meta["name"],
        phase=status.get("phase", "Pending"),
        since=moment(status.get("startTime")) or created_at(raw),
        image=trainer_image(raw["spec"]),
        started="running" in state or "terminated" in state,
        waiting=_waiting(waiting) if waiting else None,
        exit_code=ended.get("exitCode"),
        finished_at=moment(ended.get("finishedAt")),
        result=result,
        last_log_line="" if result else _last_log_line(ended.get("message", "")),
        oom_killed=ended.get("reason") == "OOMKilled",
        out_of_disk=_out_of_disk(status),
        disruption=_disruption(status),
        unschedulable=_unschedulable(status),
        deleting="deletionTimestamp" in meta,
        delete_by=moment(meta.get("deletionTimestamp")),
        node=raw["spec"].get("nodeName"),
    )


def _trainer_state(status: JsonObject) -> JsonObject:
    """The state of the trainer's container; injected sidecars don't count."""
    for container in status.get("containerStatuses") or []:
        if container["name"] == TRAINER_CONTAINER:
            return container.get("state") or {}
    return {}


def _waiting(state: JsonObject) -> Waiting:
    return Waiting(state.get("reason", ""), state.get("message", ""))


def _last_log_line(message: str) -> str:
    """The last line of a log: in a stack trace, the one with the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:LOG_LINE_LIMIT] if lines else ""


def _out_of_disk(status: JsonObject) -> str | None:
    message = status.get("message") or ""
    return message if status.get("reason") == "Evicted" and OVERGROWN.search(message) else None


def _disruption(status: JsonObject) -> str | None:
    if _out_of_disk(status) is not None:
        return None
    reason, message = status.get("reason") or "", status.get("message") or ""
    if reason in DISRUPTIONS or reason.startswith("OutOf"):
        return f"{reason}: {message}" if message else reason
    for condition in true_conditions(status):
        if condition["type"] == "DisruptionTarget":
            why, text = condition.get("reason") or "Disrupted", condition.get("message") or ""
            return f"{why}: {text}" if text else why
    return None


def _unschedulable(status: JsonObject) -> str | None:
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return str(condition.get("message") or "no node fits")
    return None


def true_conditions(status: JsonObject) -> list[JsonObject]:
    """The conditions of any object's status that are True."""
    return [c for c in status.get("conditions") or [] if c.get("status") == "True"]


def trainer_image(pod_spec: JsonObject) -> str:
    """The image of the trainer's container."""
    for container in pod_spec["containers"]:
        if container["name"] == TRAINER_CONTAINER:
            return str(container["image"])
    return ""


def created_at(raw: JsonObject) -> datetime:
    return moment(raw["metadata"].get("creationTimestamp")) or datetime.min.replace(tzinfo=UTC)


def moment(text: str | None) -> datetime | None:
    """Parse a time as Kubernetes writes it."""
    return datetime.fromisoformat(text) if text else None


class Finish(StrEnum):
    """How a Job ended; the value is the type of its condition."""

    COMPLETE = "Complete"
    FAILED = "Failed"


@dataclass(frozen=True)
class ObservedJob:
    """One attempt at a stage: a batch/v1 Job with its newest pod."""

    name: str
    uid: str
    stage: Stage
    stage_key: str
    """The stage's fingerprint; for `prepare`, the generation."""

    attempt: int
    pod_settings: str
    """Digest of the settings of its pods."""

    image: str
    created: datetime
    finished: Finish | None = None
    finished_at: datetime | None = None
    failed_by_exit_code: bool = False
    """Whether an exit code in its podFailurePolicy failed it, which no further pod can change."""

    deleting: bool = False
    pod: ObservedPod | None = None
    earlier_pods: tuple[ObservedPod, ...] = ()
    """Those that `pod` took the place of, oldest first."""

    @property
    def earlier_pod_at_work(self) -> bool:
        """Whether an earlier pod of it still runs."""
        return any(pod.at_work for pod in self.earlier_pods)

    @property
    def active(self) -> bool:
        """Whether it hasn't ended."""
        if self.deleting:
            return True
        ended = self.pod is not None and self.pod.exit_code is not None
        return self.finished is None and not ended

    @property
    def outlives_trainer(self) -> bool:
        """Whether something goes on beside a trainer that has ended, e.g. a service mesh's sidecar.

        The pod then keeps its resources, and the Job doesn't end.
        """
        pod = self.pod
        going = self.finished is None and not self.deleting
        return going and pod is not None and pod.exit_code is not None and pod.phase not in ENDED

    @property
    def may_have_pod_at_work(self) -> bool:
        """Whether one of its pods may be running: in a failed Job, the pod may still write a
        checkpoint during its grace period."""
        return (
            self.active or self.earlier_pod_at_work or (self.pod is not None and self.pod.at_work)
        )


@dataclass(frozen=True)
class ReportedProgress:
    """The part of the trainer's `status.progress` that the operator reads."""

    job: str | None = None
    """The Job whose pod reports."""

    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True)
class ObservedFineTuneJob:
    """A FineTuneJob as the API server holds it."""

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str
    spec: FineTuneJobSpec | None
    spec_error: str | None
    """Why the spec is invalid; `spec` is None then."""

    status: FineTuneJobStatus
    """Without `progress`, which belongs to the trainer."""

    not_understood: tuple[str, ...] = ()
    """Fields of spec and status that come from another version, and are left out of account."""

    reported: ReportedProgress = ReportedProgress()
    deleting: bool = False


def observe_finetunejob(raw: JsonObject) -> ObservedFineTuneJob:
    """Parse a FineTuneJob, which another version may have written.

    An invalid spec, which an older or newer CRD may admit, becomes `spec_error`.
    """
    meta = raw["metadata"]
    spec, error = None, None
    not_understood: list[str] = []
    try:
        known = read_known(FineTuneJobSpec, raw.get("spec") or {})
    except ValidationError as problem:
        error = describe(problem, prefix="spec.")
    else:
        spec = known.value
        not_understood += (f"spec.{path}" for path in known.unknown)
    status, unreadable = _status(raw)
    not_understood += (f"status.{path}" for path in unreadable)
    return ObservedFineTuneJob(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=meta.get("generation", 1),
        resource_version=meta["resourceVersion"],
        spec=spec,
        spec_error=error,
        status=status,
        not_understood=tuple(not_understood),
        reported=_reported(raw),
        deleting="deletionTimestamp" in meta,
    )


def observe_jobs(
    owner: ObservedFineTuneJob, jobs: Iterable[JsonObject], pods: Iterable[JsonObject]
) -> tuple[ObservedJob, ...]:
    """The stage Jobs of a FineTuneJob, oldest first, each with its pods.

    Uids alone prove nothing: whoever may create pods in another namespace could write them there.
    """
    of_job: dict[str, list[JsonObject]] = {}
    for pod in sorted(pods, key=created_at):
        if pod["metadata"]["namespace"] == owner.namespace:
            of_job.setdefault(controller_uid(pod, "Job"), []).append(pod)
    found = [
        _job(job, of_job.get(job["metadata"]["uid"], []))
        for job in jobs
        if is_controlled_by(job, owner) and _is_stage_job(job)
    ]
    return tuple(sorted(found, key=lambda job: (job.created, job.name)))


def pods_without_job(
    jobs: Iterable[ObservedJob], pods: Iterable[JsonObject]
) -> tuple[JsonObject, ...]:
    """The pods of no Job: one that was deleted is gone before its pod has stopped."""
    known = {job.uid for job in jobs}
    return tuple(pod for pod in pods if controller_uid(pod, "Job") not in known)


def stages_at_work(pods: Iterable[JsonObject]) -> frozenset[Stage]:
    """The stages that one of these pods runs, or may yet begin to run."""
    known = [(pod["metadata"].get("labels") or {}, pod) for pod in pods]
    return frozenset(
        Stage(bears[STAGE_LABEL])
        for bears, pod in known
        if bears.get(STAGE_LABEL) in set(Stage) and observe_pod(pod).may_work
    )


def is_controlled_by(raw: Mapping[str, Any], owner: ObservedFineTuneJob) -> bool:
    """Whether an object belongs to a FineTuneJob: in its namespace, and by its uid."""
    here = raw["metadata"].get("namespace") == owner.namespace
    return here and controller_uid(raw, KIND) == owner.uid


def controller_uid(raw: Mapping[str, Any], kind: str) -> str:
    """The uid of the object's controller if it is of this kind, or an empty string."""
    for owner in raw["metadata"].get("ownerReferences") or []:
        if owner.get("controller") and owner.get("kind") == kind:
            return str(owner["uid"])
    return ""


def _status(raw: JsonObject) -> tuple[FineTuneJobStatus, tuple[str, ...]]:
    """The status, and the paths of values in it that only another version understands."""
    written = raw.get("status") or {}
    fields = {key: value for key, value in written.items() if key != "progress"}
    states = [each.get("state") for each in fields.get("stages") or []]
    if any(state not in KNOWN_STATES for state in states):
        fields["stages"] = [_with_known_state(each) for each in fields["stages"]]
    read = read_readable(FineTuneJobStatus, fields)
    if read is None:  # nothing in it is required
        return FineTuneJobStatus(), ("stages",)
    unknown = (f"stages.{n}.state" for n, each in enumerate(states) if each not in KNOWN_STATES)
    return read.value, (*read.unreadable, *unknown)


def _with_known_state(stage: JsonObject) -> JsonObject:
    """A stage in a state of a newer operator's: if it has begun and not ended, its Job will tell
    how it is."""
    if stage.get("state") in KNOWN_STATES:
        return stage
    at_work = stage.get("attempt") and not stage.get("completionTime")
    return {**stage, "state": StageState.RUNNING if at_work else StageState.PENDING}


def _reported(raw: JsonObject) -> ReportedProgress:
    progress = (raw.get("status") or {}).get("progress") or {}
    # What is left out of a newer trainer's notices is in progress and log.
    notices = (read_readable(Notice, each) for each in progress.get("notices") or [])
    return ReportedProgress(
        progress.get("job"), tuple(each.value for each in notices if each is not None)
    )


def _is_stage_job(raw: JsonObject) -> bool:
    meta = raw["metadata"]
    known, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    return (
        known.get(STAGE_LABEL) in set(Stage)
        and str(known.get(ATTEMPT_LABEL, "")).isdigit()
        and STAGE_KEY_ANNOTATION in notes
    )


def _job(raw: JsonObject, pods: list[JsonObject]) -> ObservedJob:
    """Parse a Job; `pods` are its pods, oldest first."""
    meta, status = raw["metadata"], raw.get("status") or {}
    ended = next((c for c in true_conditions(status) if c["type"] in set(Finish)), None)
    return ObservedJob(
        name=meta["name"],
        uid=meta["uid"],
        stage=Stage(meta["labels"][STAGE_LABEL]),
        stage_key=meta["annotations"][STAGE_KEY_ANNOTATION],
        attempt=int(meta["labels"][ATTEMPT_LABEL]),
        pod_settings=meta["annotations"].get(POD_SETTINGS_ANNOTATION, ""),
        image=trainer_image(raw["spec"]["template"]["spec"]),
        created=created_at(raw),
        finished=Finish(ended["type"]) if ended else None,
        finished_at=moment(ended.get("lastTransitionTime")) if ended else None,
        failed_by_exit_code=ended is not None and ended.get("reason") == "PodFailurePolicy",
        deleting="deletionTimestamp" in meta,
        pod=observe_pod(pods[-1]) if pods else None,
        earlier_pods=tuple(observe_pod(pod) for pod in pods[:-1]),
    )
