"""What the cluster's objects say, parsed once into frozen values.

Everything that knows how Kubernetes spells things is here and in `pods`, so that `plan` reads like
the decision that it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from pydantic import ValidationError

from finetune_operator.api import labels
from finetune_operator.api.finetunejob import FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.pods import (
    ObservedPod,
    Raw,
    created_at,
    moment,
    observe_pod,
    trainer_image,
    true_conditions,
)
from finetune_trainer.contract import Notice, Stage, describe


class Finish(StrEnum):
    """How a Job ended, named as its condition."""

    COMPLETE = "Complete"
    FAILED = "Failed"


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
    broke_rule: bool = False
    """Whether its podFailurePolicy failed it, for an exit code that no further pod can change."""

    deleting: bool = False
    pod: ObservedPod | None = None
    lingers: bool = False
    """Whether an earlier pod of it still runs."""

    @property
    def active(self) -> bool:
        """Whether it has not come to its end."""
        if self.deleting:
            return True
        ended = self.pod is not None and self.pod.exit_code is not None
        return self.finished is None and not ended

    @property
    def occupied(self) -> bool:
        """Whether a pod of it may be at work. A Job may have failed while its pod, on its way out,
        still writes a checkpoint."""
        return self.active or self.lingers or (self.pod is not None and self.pod.at_work)


@dataclass(frozen=True)
class Reported:
    """What the operator reads of the trainer's `status.progress`."""

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
    """Why the spec can't be used (it is None then)."""

    status: FineTuneJobStatus
    """Without `progress`, which belongs to the trainer."""

    reported: Reported = Reported()
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
        reported=_reported(raw),
        deleting="deletionTimestamp" in meta,
    )


def observe_jobs(owner: str, jobs: Iterable[Raw], pods: Iterable[Raw]) -> tuple[ObservedJob, ...]:
    """The stage Jobs that a FineTuneJob (its uid) owns, oldest first, each with its newest pod."""
    of_job: dict[str, list[Raw]] = {}
    for pod in sorted(pods, key=created_at):
        of_job.setdefault(controller_uid(pod), []).append(pod)
    found = [
        _job(job, of_job.get(job["metadata"]["uid"], []))
        for job in jobs
        if controller_uid(job) == owner and _is_stage_job(job)
    ]
    return tuple(sorted(found, key=lambda job: (job.created, job.name)))


def stages_at_work(pods: Iterable[Raw]) -> frozenset[Stage]:
    """The stages of which one of these pods still runs."""
    known = [(pod["metadata"].get("labels") or {}, pod) for pod in pods]
    return frozenset(
        Stage(bears[labels.STAGE])
        for bears, pod in known
        if bears.get(labels.STAGE) in set(Stage) and observe_pod(pod).at_work
    )


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


def _reported(raw: Raw) -> Reported:
    progress = (raw.get("status") or {}).get("progress") or {}
    notices = (_notice(each) for each in progress.get("notices") or [])
    return Reported(progress.get("job"), tuple(each for each in notices if each is not None))


def _notice(raw: Raw) -> Notice | None:
    try:
        return Notice.model_validate(raw)
    except ValidationError:
        return None  # of a newer trainer; it stands in the progress and in the log


def _is_stage_job(raw: Raw) -> bool:
    meta = raw["metadata"]
    known, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    return (
        known.get(labels.STAGE) in set(Stage)
        and str(known.get(labels.ATTEMPT, "")).isdigit()
        and labels.KEY in notes
    )


def _job(raw: Raw, pods: list[Raw]) -> ObservedJob:
    """Its pods come oldest first."""
    meta, status = raw["metadata"], raw.get("status") or {}
    ended = next((c for c in true_conditions(status) if c["type"] in set(Finish)), None)
    return ObservedJob(
        name=meta["name"],
        uid=meta["uid"],
        stage=Stage(meta["labels"][labels.STAGE]),
        key=meta["annotations"][labels.KEY],
        attempt=int(meta["labels"][labels.ATTEMPT]),
        pod_settings=meta["annotations"].get(labels.POD_SETTINGS, ""),
        image=trainer_image(raw["spec"]["template"]["spec"]),
        created=created_at(raw),
        finished=Finish(ended["type"]) if ended else None,
        finished_at=moment(ended.get("lastTransitionTime")) if ended else None,
        broke_rule=ended is not None and ended.get("reason") == "PodFailurePolicy",
        deleting="deletionTimestamp" in meta,
        pod=observe_pod(pods[-1]) if pods else None,
        lingers=any(observe_pod(pod).at_work for pod in pods[:-1]),
    )
