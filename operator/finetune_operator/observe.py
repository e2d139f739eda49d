"""What the cluster's objects say, parsed once into frozen values.

Everything that knows how Kubernetes spells things (container states, conditions, the kubelet's
reasons) is here, so that `plan` reads like the decision that it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from finetune_operator.api import labels
from finetune_operator.api.finetunejob import FineTuneJobSpec, FineTuneJobStatus
from finetune_trainer.config import Stage, describe
from finetune_trainer.outcome import StageResult

Raw = Mapping[str, Any]

# Reasons in a pod's status with which the node or the control plane took the pod away, or did not
# let it in: nothing that the container did. Any `OutOf<resource>` belongs here as well.
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
# The kubelet evicts as well when a pod outgrows its own limits: that is the pod's doing.
OVERGROWN = re.compile(r"exceeds the (total )?limit|exceeded its local ephemeral storage limit")
LAST_WORDS_LIMIT = 300  # characters of a log line that is quoted to the user


class Finish(StrEnum):
    """How a Job ended, named as its condition."""

    COMPLETE = "Complete"
    FAILED = "Failed"


@dataclass(frozen=True)
class Waiting:
    """Why a container doesn't run yet."""

    reason: str
    message: str


@dataclass(frozen=True)
class ObservedPod:
    """The newest pod of a stage's Job."""

    name: str
    phase: str
    since: datetime
    """When the kubelet took it on; before that, when it was created."""

    image: str
    started: bool = False
    """Whether the trainer runs or has run."""

    waiting: Waiting | None = None
    exit_code: int | None = None
    finished_at: datetime | None = None
    result: StageResult | None = None
    last_words: str = ""
    """The last line of the log, where the container left no StageResult."""

    oom_killed: bool = False
    out_of_disk: str | None = None
    """The kubelet's words, where the pod outgrew its ephemeral storage."""

    disruption: str | None = None
    """Who took the pod away and why, where the trainer is not to blame."""

    unschedulable: str | None = None
    """The scheduler's words, while there is no node for it."""

    deleting: bool = False


@dataclass(frozen=True)
class ObservedJob:
    """One attempt at a stage: a batch/v1 Job with its newest pod."""

    name: str
    uid: str
    stage: Stage
    key: str
    """The stage's fingerprint; for `prepare`, the generation."""

    attempt: int
    pod_settings: str
    """Digest of the settings that its pods are made with."""

    image: str
    created: datetime
    finished: Finish | None = None
    finished_at: datetime | None = None
    deleting: bool = False
    pod: ObservedPod | None = None

    @property
    def active(self) -> bool:
        """Whether something of it may still be at work."""
        if self.deleting:
            return True
        ended = self.pod is not None and self.pod.exit_code is not None
        return self.finished is None and not ended


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
    """Why the spec can't be used (it is None then)."""

    status: FineTuneJobStatus
    """Without `progress`, which belongs to the trainer."""

    deleting: bool = False


def observe_finetunejob(raw: Raw) -> ObservedFineTuneJob:
    """Parse a FineTuneJob; a spec that an older CRD let through becomes `spec_error`."""
    meta = raw["metadata"]
    spec, error = None, None
    try:
        spec = FineTuneJobSpec.model_validate(raw.get("spec") or {})
    except ValidationError as problem:
        error = describe(problem, prefix="spec.")
    return ObservedFineTuneJob(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=meta.get("generation", 1),
        resource_version=meta["resourceVersion"],
        spec=spec,
        spec_error=error,
        status=_status(raw),
        deleting="deletionTimestamp" in meta,
    )


def observe_jobs(owner: str, jobs: Iterable[Raw], pods: Iterable[Raw]) -> tuple[ObservedJob, ...]:
    """The stage Jobs that a FineTuneJob (its uid) owns, oldest first, each with its newest pod."""
    newest: dict[str, Raw] = {}
    for pod in sorted(pods, key=_created):
        newest[controller_uid(pod)] = pod
    found = [
        _job(job, newest.get(job["metadata"]["uid"]))
        for job in jobs
        if controller_uid(job) == owner and _is_stage_job(job)
    ]
    return tuple(sorted(found, key=lambda job: (job.created, job.name)))


def controller_uid(raw: Raw) -> str:
    """The uid of the object's controller, or an empty string."""
    for owner in raw["metadata"].get("ownerReferences") or []:
        if owner.get("controller"):
            return str(owner["uid"])
    return ""


def _status(raw: Raw) -> FineTuneJobStatus:
    # A status that can't be read (written by a newer operator) is like none: everything is looked
    # at anew, and what the object store already holds is not done again.
    fields = {key: value for key, value in (raw.get("status") or {}).items() if key != "progress"}
    try:
        return FineTuneJobStatus.model_validate(fields)
    except ValidationError:
        return FineTuneJobStatus()


def _is_stage_job(raw: Raw) -> bool:
    meta = raw["metadata"]
    known, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    return (
        known.get(labels.STAGE) in set(Stage)
        and str(known.get(labels.ATTEMPT, "")).isdigit()
        and labels.KEY in notes
    )


def _job(raw: Raw, pod: Raw | None) -> ObservedJob:
    meta, status = raw["metadata"], raw.get("status") or {}
    ended = next((c for c in _true_conditions(status) if c["type"] in set(Finish)), None)
    return ObservedJob(
        name=meta["name"],
        uid=meta["uid"],
        stage=Stage(meta["labels"][labels.STAGE]),
        key=meta["annotations"][labels.KEY],
        attempt=int(meta["labels"][labels.ATTEMPT]),
        pod_settings=meta["annotations"].get(labels.POD_SETTINGS, ""),
        image=_image(raw["spec"]["template"]["spec"]),
        created=_created(raw),
        finished=Finish(ended["type"]) if ended else None,
        finished_at=_time(ended.get("lastTransitionTime")) if ended else None,
        deleting="deletionTimestamp" in meta,
        pod=_pod(pod) if pod is not None else None,
    )


def _pod(raw: Raw) -> ObservedPod:
    meta, status = raw["metadata"], raw.get("status") or {}
    state = _trainer_state(status)
    ended = state.get("terminated") or {}
    waiting = state.get("waiting")
    result = StageResult.from_message(ended.get("message", ""))
    return ObservedPod(
        name=meta["name"],
        phase=status.get("phase", "Pending"),
        since=_time(status.get("startTime")) or _created(raw),
        image=_image(raw["spec"]),
        started="running" in state or "terminated" in state,
        waiting=_waiting(waiting) if waiting else None,
        exit_code=ended.get("exitCode"),
        finished_at=_time(ended.get("finishedAt")),
        result=result,
        last_words="" if result else _last_words(ended.get("message", "")),
        oom_killed=ended.get("reason") == "OOMKilled",
        out_of_disk=_out_of_disk(status),
        disruption=_disruption(status),
        unschedulable=_unschedulable(status),
        deleting="deletionTimestamp" in meta,
    )


def _trainer_state(status: Raw) -> Raw:
    """State of the trainer's container; sidecars that others injected don't count."""
    for container in status.get("containerStatuses") or []:
        if container["name"] == labels.CONTAINER:
            return container.get("state") or {}
    return {}


def _waiting(state: Raw) -> Waiting:
    return Waiting(state.get("reason", ""), state.get("message", ""))


def _last_words(message: str) -> str:
    """The last line of a log: of a stack trace, the one that says what happened."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:LAST_WORDS_LIMIT] if lines else ""


def _out_of_disk(status: Raw) -> str | None:
    message = status.get("message") or ""
    return message if status.get("reason") == "Evicted" and OVERGROWN.search(message) else None


def _disruption(status: Raw) -> str | None:
    if _out_of_disk(status) is not None:
        return None
    reason, message = status.get("reason") or "", status.get("message") or ""
    if reason in DISRUPTIONS or reason.startswith("OutOf"):
        return f"{reason}: {message}" if message else reason
    for condition in _true_conditions(status):
        if condition["type"] == "DisruptionTarget":
            why, text = condition.get("reason") or "Disrupted", condition.get("message") or ""
            return f"{why}: {text}" if text else why
    return None


def _unschedulable(status: Raw) -> str | None:
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return str(condition.get("message") or "no node fits")
    return None


def _true_conditions(status: Raw) -> list[Raw]:
    return [c for c in status.get("conditions") or [] if c.get("status") == "True"]


def _image(pod_spec: Raw) -> str:
    for container in pod_spec["containers"]:
        if container["name"] == labels.CONTAINER:
            return str(container["image"])
    return ""


def _created(raw: Raw) -> datetime:
    return _time(raw["metadata"].get("creationTimestamp")) or datetime.min.replace(tzinfo=UTC)


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
