"""Short ways to write down a FineTuneJob, its Jobs and Pods, and the Plan that should follow.

Every text that a user reads is spelled out here or in the tests, never taken from the code.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.api import Condition
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import (
    ArtifactStatus,
    FineTuneJobStatus,
    Lineage,
    Phase,
    PlannedStatus,
    StageState,
    StageStatus,
)
from finetune_operator.observe import Finish, ObservedFineTuneJob, ObservedJob
from finetune_operator.pods import ObservedPod
from finetune_trainer.contract import Artifact, Fingerprints, Reason, Resolved, Stage, StageResult

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SETTINGS = dict.fromkeys(Stage, "settings-1")
PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
FOLDER = "s3://models/support"
IMAGE = "trainer:1"

SPEC: dict[str, Any] = {
    "model": {"source": "org/base"},
    "dataset": {"source": "s3://data/faq.csv"},
    "output": {"uri": FOLDER},
}


def at(seconds: float) -> datetime:
    """So many seconds after NOW."""
    return NOW + timedelta(seconds=seconds)


def stamp(seconds: float) -> str:
    """The same as Kubernetes writes it."""
    return at(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def spec(**fields: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate({**SPEC, **fields})


def spec_of(generation: int) -> FineTuneJobSpec:
    """The spec of a generation: each edit touches the training."""
    return spec() if generation == 1 else spec(training={"seed": generation})


def planned(generation: int) -> PlannedStatus:
    """What the stages of a generation are planned for."""
    given = spec_of(generation)
    return PlannedStatus(
        generation=generation, inputs=given.inputs_digest, hardware=given.hardware_digest
    )


def resolved(train: str = "train-a", export: str = "export-a") -> Resolved:
    fingerprints = Fingerprints(prepare="prepare-a", train=train, export=export)
    return Resolved(
        fingerprints=fingerprints,
        dataset_etag="etag",
        dataset_rows=120,
        eval_rows=6,
        model_revision="abc",
    )


# Stages in status


def pending(stage: Stage, **fields: Any) -> StageStatus:
    return StageStatus(name=stage, **fields)


def running(stage: Stage, attempt: int = 1, since: float = 0, **fields: Any) -> StageStatus:
    return StageStatus(
        name=stage,
        state=StageState.RUNNING,
        attempt=attempt,
        start_time=stamp(since),
        **fields,
    )


def succeeded(stage: Stage, since: float = -60, until: float = 0, **fields: Any) -> StageStatus:
    texts: dict[str, Any] = {"attempt": 1, "message": f"{stage} is done", **fields}
    return StageStatus(
        name=stage,
        state=StageState.SUCCEEDED,
        start_time=stamp(since),
        completion_time=stamp(until),
        **texts,
    )


def cached(stage: Stage, fingerprint: str, **fields: Any) -> StageStatus:
    return StageStatus(
        **fields,
        name=stage,
        state=StageState.SUCCEEDED,
        fingerprint=fingerprint,
        cached=True,
        message="The object store already holds the result.",
        completion_time=stamp(0),
    )


def failing(stage: Stage, reason: Reason, message: str, **fields: Any) -> StageStatus:
    """A stage that failed; with state=PENDING, one that will be tried again."""
    given: dict[str, Any] = {"state": StageState.FAILED, "attempt": 1, "failures": 1, **fields}
    return StageStatus(
        name=stage,
        reason=reason,
        message=message,
        start_time=stamp(-60),
        completion_time=stamp(0),
        **given,
    )


LOST: dict[str, Any] = {"disruptions": 1, "lost_pod": "pod"}
"""Fields of a stage that lost its first pod."""


# Conditions and status

Claim = tuple[bool, str, str]
FINE: Claim = (False, "AsExpected", "Nothing needs attention.")
NOT_YET = "The artifacts are not there yet."
EARLIER = "The artifacts in status are those of an earlier spec."


def conditions(
    ready: Claim,
    progressing: Claim,
    degraded: Claim,
    generation: int = 1,
    ready_since: int | None = None,
) -> tuple[Condition, ...]:
    """With `ready_since`, the artifacts are those of that generation."""
    claims = {"Ready": ready, "Progressing": progressing, "Degraded": degraded}
    if progressing[0]:
        claims["Reconciling"] = progressing
    elif degraded[0]:
        claims["Stalled"] = degraded
    return tuple(
        Condition(
            type=kind,
            status="True" if holds else "False",
            reason=reason,
            message=message,
            observed_generation=ready_since or generation if kind == "Ready" else generation,
            last_transition_time=stamp(0),
        )
        for kind, (holds, reason, message) in claims.items()
    )


def status(phase: Phase, stage: Stage | None, *stages: StageStatus, **fields: Any) -> Any:
    """A status whose conditions are the given ones, or those of a stage at work."""
    generation = fields.pop("generation", 1)
    if "conditions" not in fields and stage is not None:
        shown = {each.name: each for each in stages}[stage]
        lost = " It lost its pod once." if shown.disruptions == 1 else ""
        fields["conditions"] = conditions(
            ready=(False, phase, EARLIER if fields.get("artifacts") else NOT_YET),
            progressing=(True, phase, f"{stage} is at work, attempt {shown.attempt}.{lost}"),
            degraded=FINE,
            generation=generation,
        )
    reason = shown_reason(phase, fields.get("conditions", ()))
    fields = {"planned": planned(generation), "reason": reason, **fields}
    return FineTuneJobStatus(
        observed_generation=generation, phase=phase, stage=stage, stages=stages, **fields
    )


def shown_reason(phase: Phase, given: Iterable[Condition]) -> str | None:
    """What the column says: what is waited for, or else why it is degraded."""
    of = {each.type: each for each in given}
    if phase in {Phase.QUEUED, Phase.WAITING}:
        return of["Progressing"].reason
    return of["Degraded"].reason if "Degraded" in of and of["Degraded"].status == "True" else None


def trouble(
    phase: Phase,
    progressing: tuple[str, str],
    degraded: tuple[str, str] | None,
    generation: int = 1,
) -> tuple[Condition, ...]:
    """Conditions of a job that goes on, though something is to be said about it."""
    return conditions(
        ready=(False, phase, NOT_YET),
        progressing=(True, *progressing),
        degraded=(True, *degraded) if degraded else FINE,
        generation=generation,
    )


def dead(reason: str, message: str, generation: int = 1) -> tuple[Condition, ...]:
    """Conditions of a job that has failed."""
    no_more = "No further attempt is made until the spec changes"
    asked = ", or the annotation finetune.dev/retry-requested-at asks for one"
    return conditions(
        ready=(False, reason, message),
        progressing=(False, reason, f"{no_more}{'' if reason == 'InvalidSpec' else asked}."),
        degraded=(True, reason, message),
        generation=generation,
    )


EXPORTED_VERSION = "0123456789ab"
VERSION_FOLDER = f"{FOLDER}/versions/{EXPORTED_VERSION}"
FINISHED: dict[str, Any] = {
    "version": EXPORTED_VERSION,
    "artifacts": (
        ArtifactStatus(uri=f"{VERSION_FOLDER}/gguf/model-F16.gguf", bytes=10, sha256="aa"),
    ),
    "manifest_uri": f"{VERSION_FOLDER}/manifest.json",
    "metrics": {"trainLoss": 0.5},
    "lineage": Lineage(
        dataset_etag="etag", dataset_rows=120, eval_rows=6, model_revision="abc", image="trainer:1"
    ),
    "resolved": resolved(),
}
ARTIFACTS = (Artifact(path="gguf/model-F16.gguf", bytes=10, sha256="aa"),)
DONE_MESSAGE = f"The artifacts are in {VERSION_FOLDER}; {VERSION_FOLDER}/manifest.json lists them."


def finished_status(
    *stages: StageStatus, generation: int = 1, message: str = DONE_MESSAGE, **fields: Any
) -> Any:
    """The status of a job whose artifacts are there."""
    return status(
        Phase.SUCCEEDED,
        EXPORT,
        *stages,
        generation=generation,
        conditions=conditions(
            ready=(True, "Succeeded", message),
            progressing=(False, "Succeeded", "There is nothing to do."),
            degraded=FINE,
            generation=generation,
        ),
        **{**FINISHED, **fields},
    )


ALL_DONE = (
    succeeded(PREPARE, fingerprint="prepare-a"),
    succeeded(TRAIN, fingerprint="train-a"),
    succeeded(EXPORT, fingerprint="export-a"),
)


# What is observed


def finetunejob(
    status: FineTuneJobStatus | None = None, generation: int = 1, **fields: Any
) -> ObservedFineTuneJob:
    values: dict[str, Any] = {
        "name": "support",
        "namespace": "ml",
        "uid": "uid-1",
        "generation": generation,
        "resource_version": "7",
        "spec": spec_of(generation),
        "spec_error": None,
        "status": status or FineTuneJobStatus(),
        **fields,
    }
    return ObservedFineTuneJob(**values)


def job(stage: Stage, attempt: int = 1, key: str | None = None, **fields: Any) -> ObservedJob:
    """One attempt's Job; its name is <stage>-<attempt>."""
    values: dict[str, Any] = {
        "name": f"{stage}-{attempt}",
        "uid": f"uid-{stage}-{attempt}",
        "stage": stage,
        "stage_key": key or {PREPARE: "1", TRAIN: "train-a", EXPORT: "export-a"}[stage],
        "attempt": attempt,
        "pod_settings": "settings-1",
        "image": IMAGE,
        "created": at(-60),
        "pod": pod(),
        **fields,
    }
    return ObservedJob(**values)


def pod(**fields: Any) -> ObservedPod:
    """A pod that runs."""
    values: dict[str, Any] = {
        "name": "pod",
        "phase": "Running",
        "since": at(-60),
        "image": IMAGE,
        "started": True,
        **fields,
    }
    return ObservedPod(**values)


def waiting_pod(**fields: Any) -> ObservedPod:
    """A pod that doesn't run yet."""
    return pod(phase="Pending", started=False, **fields)


def ended(code: int, result: StageResult | None = None, **fields: Any) -> dict[str, Any]:
    """Fields of a Job whose container has ended."""
    good = code == 0
    return {
        "finished": Finish.COMPLETE if good else Finish.FAILED,
        "finished_at": NOW,
        "pod": pod(
            phase="Succeeded" if good else "Failed",
            exit_code=code,
            finished_at=NOW,
            result=result,
            **fields,
        ),
    }


def said(stage: Stage, reason: Reason = Reason.SUCCEEDED, **fields: Any) -> StageResult:
    message = fields.pop("message", f"{stage} is done")
    return StageResult(stage=stage, reason=reason, message=message, **fields)


def prepared(complete: Iterable[Stage] = (), found: Resolved | None = None, **fields: Any) -> Any:
    """What a successful `prepare` says."""
    found = found or resolved()
    return said(PREPARE, resolved=found, complete=tuple(complete), **fields)


def exported() -> StageResult:
    return said(
        EXPORT,
        artifacts=ARTIFACTS,
        version=EXPORTED_VERSION,
        manifest_uri=f"{VERSION_FOLDER}/manifest.json",
    )
