"""The Job of one attempt at a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_operator.api import labels
from finetune_operator.api.finetunejob import FineTuneJobSpec, PodSettings
from finetune_operator.manifests.environment import environment
from finetune_operator.manifests.names import child_name, digest, metadata, stage_labels
from finetune_operator.manifests.progress_access import service_account_name
from finetune_operator.manifests.volumes import (
    CONFIG_FOLDER,
    WORKSPACE,
    mounts,
    shared_memory_mib,
    volumes,
)
from finetune_operator.observe import ObservedFineTuneJob
from finetune_operator.settings import Settings
from finetune_trainer.contract import Base, ExitCode, Hardware, Stage

USER = 65532
# A stopped stage has this long to say so; a training also brings a checkpoint to the store.
GRACE_SECONDS = {Stage.PREPARE: 60, Stage.TRAIN: 120, Stage.EXPORT: 60}
# A Job that vanishes the moment it ends may take its result with it.
SHORTEST_TTL_SECONDS = 60

# Exit codes that no further pod can change; with every other, backoffLimit 0 ends the Job as well.
FINAL_EXIT_CODES = [
    int(code)
    for code in (
        ExitCode.BAD_INPUT,
        ExitCode.BAD_CONFIG,
        ExitCode.OUT_OF_GPU_MEMORY,
        ExitCode.OUT_OF_DISK,
        ExitCode.QUALITY_GATE,
        ExitCode.OUT_OF_MEMORY,
    )
]


@dataclass(frozen=True)
class Attempt:
    """Which attempt at which stage, told what."""

    stage: Stage
    key: str
    number: int
    config_map: str
    hardware: Hardware
    """What the training's pod will have."""


def stage_job(
    job: ObservedFineTuneJob, spec: FineTuneJobSpec, attempt: Attempt, settings: Settings
) -> dict[str, Any]:
    """A batch/v1 Job that runs one pod once; the operator decides on further attempts."""
    pod_settings = pod_settings_digest(spec, attempt.stage, settings)
    parts = (attempt.key, pod_settings, attempt.number)
    meta = metadata(job, child_name(job, attempt.stage, *parts))
    meta["labels"] = stage_labels(job, attempt.stage, attempt.number)
    meta["annotations"] = {
        labels.JOB_NAME: job.name,
        labels.KEY: attempt.key,
        labels.POD_SETTINGS: pod_settings,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": max(spec.ttl_seconds_after_finished, SHORTEST_TTL_SECONDS),
            "podFailurePolicy": _pod_failure_policy(),
            "template": _pod_template(job, spec, attempt, settings, meta["name"]),
        },
    }


def pod_settings_digest(spec: FineTuneJobSpec, stage: Stage, settings: Settings) -> str:
    """Digest of all that the pods of a stage are made with and that can't change its result."""
    pod = _pod_settings(spec, stage)
    return digest(
        pod.model_dump(mode="json", exclude_none=True),
        _image(pod, settings),
        settings.image_pull_policy,
        settings.image_pull_secrets,
        settings.trainer_log_format,
        spec.service_account_name,
        _dump(spec.storage.secret_ref),
        _dump(spec.model.token_secret_ref),
        *_publishing(spec, stage),
    )


def _publishing(spec: FineTuneJobSpec, stage: Stage) -> list[dict[str, Any]]:
    """What an export signs with, and where it pushes to."""
    parts = (spec.export.signing, spec.output.hub) if stage is Stage.EXPORT else ()
    return [part.model_dump(mode="json") for part in parts if part is not None]


def _pod_settings(spec: FineTuneJobSpec, stage: Stage) -> PodSettings:
    settings: PodSettings = getattr(spec.stages, stage)
    return settings


def _image(pod: PodSettings, settings: Settings) -> str:
    return pod.image or settings.trainer_image


def _dump(value: Base | None) -> dict[str, Any] | None:
    return value.model_dump(mode="json", exclude_none=True) if value is not None else None


def _pod_failure_policy() -> dict[str, Any]:
    """What the Job's controller decides itself, on servers that know the field."""
    codes = {
        "containerName": labels.CONTAINER,
        "operator": "In",
        "values": FINAL_EXIT_CODES,
    }
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return {
        "rules": [
            {"action": "FailJob", "onExitCodes": codes},
            {"action": "Ignore", "onPodConditions": [disrupted]},
        ]
    }


def _pod_template(
    job: ObservedFineTuneJob, spec: FineTuneJobSpec, attempt: Attempt, settings: Settings, name: str
) -> dict[str, Any]:
    pod = _pod_settings(spec, attempt.stage)
    shared_memory = shared_memory_mib(attempt.stage, pod, attempt.hardware)
    own = stage_labels(job, attempt.stage, attempt.number)
    return {
        "metadata": {
            "labels": {**pod.labels, **own},
            "annotations": {**pod.annotations, labels.JOB_NAME: job.name},
        },
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": service_account_name(job, spec.service_account_name),
            # The usual token never expires on older servers; the projected volume takes its place.
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS[attempt.stage],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(spec, attempt.stage, settings, name, shared_memory)],
            "volumes": volumes(pod, attempt.config_map, shared_memory),
            **_pull_secrets(settings),
            **_placement(pod),
        },
    }


def _container(
    spec: FineTuneJobSpec,
    stage: Stage,
    settings: Settings,
    job_name: str,
    shared_memory: int | None,
) -> dict[str, Any]:
    pod = _pod_settings(spec, stage)
    told = {
        "HOME": WORKSPACE,
        "TMPDIR": WORKSPACE,
        "FINETUNE_JOB": job_name,
        "FINETUNE_GRACE_SECONDS": str(GRACE_SECONDS[stage]),
    }
    config = f"{CONFIG_FOLDER}/run.json"
    container: dict[str, Any] = {
        "name": labels.CONTAINER,
        "image": _image(pod, settings),
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["finetune-trainer"],
        "args": [str(stage), "--config", config, "--workspace", WORKSPACE],
        "workingDir": WORKSPACE,
        "env": environment(spec, stage, pod, settings, told),
        "volumeMounts": mounts(pod, shared_memory),
        # Where a container ends without its StageResult, the end of its log is a person's clue.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    resources = {name: value for name, value in pod.resources.model_dump().items() if value}
    if resources:
        container["resources"] = resources
    return container


def _pull_secrets(settings: Settings) -> dict[str, Any]:
    if not settings.image_pull_secrets:
        return {}
    return {"imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets]}


def _placement(pod: PodSettings) -> dict[str, Any]:
    """Where the pod may run, and how urgently."""
    return {
        key: value
        for key, value in {
            "nodeSelector": pod.node_selector,
            "tolerations": [_dump(each) for each in pod.tolerations],
            "affinity": pod.affinity,
            "priorityClassName": pod.priority_class_name,
            "runtimeClassName": pod.runtime_class_name,
        }.items()
        if value
    }
