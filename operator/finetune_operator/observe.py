"""What the cluster's objects say, parsed once into frozen values.

Only this module and `pods` know how Kubernetes writes conditions, states and the kubelet's reasons,
so that `plan` contains decisions alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from finetune_operator.api import (
    ATTEMPT_LABEL,
    KIND,
    POD_SETTINGS_ANNOTATION,
    QUEUE_LABEL,
    RETRY_ANNOTATION,
    STAGE_KEY_ANNOTATION,
    STAGE_LABEL,
    TRAINER_CONTAINER,
    WOKEN_ANNOTATION,
    JsonObject,
)
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import NO_GENERATION, FineTuneJobStatus, StageState
from finetune_operator.pods import (
    ENDED,
    ObservedPod,
    created_at,
    metadata_in_brief,
    moment,
    observe_pod,
    trainer_image,
    true_conditions,
)
from finetune_trainer.contract import (
    Notice,
    Stage,
    describe,
    read_known,
    read_readable,
)

WORKSPACE = "workspace"  # one of two kinds, whose fields don't go together
REQUEST_LIMIT = 256  # characters of a request to try again, which status repeats
KNOWN_STATES = {*StageState, None}


class Finish(StrEnum):
    """How a Job ended; the value is the type of its condition."""

    COMPLETE = "Complete"
    FAILED = "Failed"


@dataclass(frozen=True)
class QueueState:
    """What Kueue says of a Job that waits."""

    message: str
    admissible: bool = True
    """Whether its turn will come if nobody changes anything."""

    preempted: bool = False
    """Whether it had to make room for another one."""


@dataclass(frozen=True)
class ObservedJob:
    """One attempt at a stage: a batch/v1 Job with its newest pod."""

    name: str
    uid: str
    stage: Stage
    stage_key: str
    """The stage's fingerprint; for `prepare`, the generation and which look it is."""

    attempt: int
    pod_settings: str
    """Digest of the settings of its pods."""

    image: str
    created: datetime
    taken_up: datetime | None = None
    """When the Job controller first looked at it, or began again after it was suspended."""

    woken: datetime | None = None
    """When the operator last touched it, so that its controller looks at it."""

    refusal: str | None = None
    """Why its controller can't create a pod, in the API server's words."""

    finished: Finish | None = None
    finished_at: datetime | None = None
    failed_by_exit_code: bool = False
    """Whether an exit code in its podFailurePolicy failed it, which no further pod can change."""

    suspended: bool = False
    """Whether it may have no pod for now, as a queue of Jobs wants it."""

    queue: str | None = None
    """Kueue's LocalQueue that it was put in."""

    queue_state: QueueState | None = None
    """What Kueue says of it, while it waits there."""

    deadline_seconds: int | None = None
    """How long it may take."""

    past_deadline: bool = False
    """Whether it took longer, so that its pods are stopped or have been."""

    deleting: bool = False
    pod: ObservedPod | None = None
    earlier_pods: tuple[ObservedPod, ...] = ()
    """Those that `pod` took the place of, oldest first."""

    @property
    def lacks_pod(self) -> bool:
        """Whether its controller has it in hand, but there is no pod."""
        waits = self.pod is None and self.finished is None and not self.suspended
        return waits and self.taken_up is not None and not self.deleting

    @property
    def waits_in_queue(self) -> bool:
        """Whether Kueue holds it back."""
        return self.suspended and self.queue is not None and self.finished is None

    @property
    def pods_at_work(self) -> tuple[ObservedPod, ...]:
        """Its pods that still run."""
        latest = (self.pod,) if self.pod is not None else ()
        return tuple(pod for pod in (*self.earlier_pods, *latest) if pod.at_work)

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
        return self.active or bool(self.pods_at_work)


@dataclass(frozen=True)
class ReportedProgress:
    """The part of the trainer's `status.progress` that the operator reads."""

    job: str | None = None
    """The Job whose pod reports."""

    notices: tuple[Notice, ...] = ()
    at: datetime | None = None
    """When it did, by the clock of its node."""

    heartbeat_seconds: int | None = None
    """How often it does, as long as it lives; None where nothing says so."""


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
    retry_requested: str = ""
    """What the user wrote to have `prepare` look again; another value is another request."""

    deleting: bool = False


def observe_finetunejob(raw: JsonObject, stages: JsonObject | None = None) -> ObservedFineTuneJob:
    """Parse a FineTuneJob, which another version may have written.

    `stages` are the operator's settings for the pods of every FineTuneJob. An invalid spec, which
    an older or newer CRD may admit, becomes `spec_error`.
    """
    meta = raw["metadata"]
    spec, error = None, None
    not_understood: list[str] = []
    try:
        known = read_known(FineTuneJobSpec, _with_defaults(raw.get("spec") or {}, stages or {}))
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
        retry_requested=((meta.get("annotations") or {}).get(RETRY_ANNOTATION) or "")[
            :REQUEST_LIMIT
        ],
        deleting="deletionTimestamp" in meta,
    )


def _with_defaults(spec: JsonObject, stages: JsonObject) -> JsonObject:
    return {**spec, "stages": merged(stages, spec.get("stages") or {})} if stages else spec


def merged(default: Any, own: Any) -> Any:
    """Both; what is said in both is as in `own`. Lists are joined, by name or mountPath."""
    if isinstance(default, Mapping) and isinstance(own, Mapping):
        both = {
            key: merged(default[key], own[key]) for key in default.keys() & own.keys() - {WORKSPACE}
        }
        return {**default, **own, **both}
    if isinstance(default, list) and isinstance(own, list):
        taken = {_named(each) for each in own} - {None}
        return [*(each for each in default if _named(each) not in taken), *own]
    return own


def _named(item: Any) -> str | None:
    """What tells an item of a list from others, if something does."""
    found = item.get("name") or item.get("mountPath") if isinstance(item, Mapping) else None
    return str(found) if found else None


def finetunejob_in_brief(raw: JsonObject) -> JsonObject:
    """The part of a FineTuneJob that is read here."""
    return {
        "metadata": metadata_in_brief(raw),
        "spec": raw.get("spec"),
        "status": raw.get("status"),
    }


def job_in_brief(raw: JsonObject) -> JsonObject:
    """The part of a Job that is read here: of its pods, the image alone."""
    spec = raw["spec"]
    image = trainer_image(spec["template"]["spec"])
    kept = {key: spec[key] for key in ("suspend", "activeDeadlineSeconds") if key in spec}
    kept["template"] = {"spec": {"containers": [{"name": TRAINER_CONTAINER, "image": image}]}}
    return {"metadata": metadata_in_brief(raw), "spec": kept, "status": raw.get("status") or {}}


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


def observe_queue(workload: JsonObject) -> QueueState | None:
    """What Kueue's Workload says of why its Job waits; None if it waits no longer."""
    told = (workload.get("status") or {}).get("conditions") or []
    conditions = {each["type"]: each for each in told}
    evicted = conditions.get("Evicted", {})
    if evicted.get("status") == "True":
        preempted = evicted.get("reason") == "Preempted"
        return QueueState(str(evicted.get("message", "")), preempted=preempted)
    quota = conditions.get("QuotaReserved", {})
    if quota.get("status") != "False":
        return None
    admissible = quota.get("reason") != "Inadmissible"
    return QueueState(str(quota.get("message", "")), admissible=admissible)


def pods_without_job(
    jobs: Iterable[ObservedJob], pods: Iterable[JsonObject]
) -> tuple[JsonObject, ...]:
    """The pods of no Job: one that was deleted is gone before its pod has stopped."""
    known = {job.uid for job in jobs}
    return tuple(pod for pod in pods if controller_uid(pod, "Job") not in known)


def stages_at_work(pods: Iterable[JsonObject]) -> dict[Stage, ObservedPod]:
    """The stages that one of these pods runs, or may yet begin to run, each with its oldest one."""
    found: dict[Stage, ObservedPod] = {}
    for raw in sorted(pods, key=created_at):
        stage, pod = (raw["metadata"].get("labels") or {}).get(STAGE_LABEL), observe_pod(raw)
        if stage in set(Stage) and pod.may_work:
            found.setdefault(Stage(stage), pod)
    return found


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
    if fields.get("observedGeneration") == NO_GENERATION:
        del fields["observedGeneration"]
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
        job=progress.get("job"),
        notices=tuple(each.value for each in notices if each is not None),
        at=_reported_at(progress.get("lastUpdateTime")),
        heartbeat_seconds=progress.get("heartbeatSeconds"),
    )


def _reported_at(text: str | None) -> datetime | None:
    """A time that a pod wrote, if it is one."""
    try:
        found = moment(text)
    except ValueError:
        return None
    return found if found is not None and found.tzinfo is not None else None


def _is_stage_job(raw: JsonObject) -> bool:
    meta = raw["metadata"]
    known, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    return (
        known.get(STAGE_LABEL) in set(Stage)
        and str(known.get(ATTEMPT_LABEL, "")).isdigit()
        and STAGE_KEY_ANNOTATION in notes
    )


def _woken(text: str | None) -> datetime | None:
    """The operator's own words, unless somebody has changed them."""
    try:
        found = moment(text)
    except ValueError:
        return None
    return found if found is not None and found.tzinfo else None


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
        taken_up=moment(status.get("startTime")),
        woken=_woken(meta["annotations"].get(WOKEN_ANNOTATION)),
        finished=Finish(ended["type"]) if ended else None,
        finished_at=moment(ended.get("lastTransitionTime")) if ended else None,
        failed_by_exit_code=ended is not None and ended.get("reason") == "PodFailurePolicy",
        suspended=bool(raw["spec"].get("suspend")),
        queue=meta["labels"].get(QUEUE_LABEL),
        deadline_seconds=raw["spec"].get("activeDeadlineSeconds"),
        past_deadline=any(c.get("reason") == "DeadlineExceeded" for c in true_conditions(status)),
        deleting="deletionTimestamp" in meta,
        pod=observe_pod(pods[-1]) if pods else None,
        earlier_pods=tuple(observe_pod(pod) for pod in pods[:-1]),
    )
