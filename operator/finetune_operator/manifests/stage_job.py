"""The Job of one attempt at a stage: its pod, with environment and volumes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_operator.api import (
    FINETUNEJOB_NAME_ANNOTATION,
    GPUS_ANNOTATION,
    POD_SETTINGS_ANNOTATION,
    QUEUE_LABEL,
    STAGE_KEY_ANNOTATION,
    TRAINER_CONTAINER,
    EnvVar,
    JsonObject,
    ResourceClaim,
    Workspace,
)
from finetune_operator.api.finetunejob import FineTuneJobSpec, PodSettings
from finetune_operator.manifests.children import (
    child_name,
    digest,
    from_secret,
    metadata,
    service_account_name,
    stage_labels,
    store_references,
    store_variables,
)
from finetune_operator.manifests.volumes import (
    CACHE_FOLDER,
    CONFIG_FOLDER,
    MEBIBYTE,
    WORKSPACE,
    shared_memory_mib,
    stage_mounts,
    stage_volumes,
)
from finetune_operator.observe import ObservedFineTuneJob
from finetune_operator.settings import Settings
from finetune_trainer.contract import (
    MODEL_CACHE,
    Base,
    ExitCode,
    Hardware,
    Needs,
    Stage,
)

USER = 65532
# What `prepare` requests: it imports transformers, and has the dataset on its disk and in memory.
PREPARE_MEMORY, PREPARE_DISK = 512 << 20, 1 << 30
# How long a stopped stage may take to report; a training also uploads a checkpoint.
GRACE_SECONDS = {Stage.PREPARE: 60, Stage.TRAIN: 120, Stage.EXPORT: 60}
# A Job that is deleted as soon as it ends may take its result with it.
SHORTEST_TTL_SECONDS = 60

# Exit codes that no further pod can change. (After any other, backoffLimit 0 ends the Job as well.)
FINAL_EXIT_CODES = [
    int(code)
    for code in (
        ExitCode.BAD_INPUT,
        ExitCode.BAD_CONFIG,
        ExitCode.OUT_OF_GPU_MEMORY,
        ExitCode.OUT_OF_DISK,
        ExitCode.QUALITY_GATE,
        ExitCode.OUT_OF_MEMORY,
        ExitCode.GPU_UNAVAILABLE,
    )
]


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage, and what its pod depends on."""

    stage: Stage
    stage_key: str
    number: int
    config_map: str
    hardware: Hardware
    """The hardware of the training's pod."""

    needs: Needs | None = None
    """What `prepare` predicts for the pods of the later stages."""


def stage_job(
    owner: ObservedFineTuneJob, spec: FineTuneJobSpec, attempt: Attempt, settings: Settings
) -> JsonObject:
    """A batch/v1 Job that runs one pod once. The operator itself decides on further attempts."""
    pod_settings = pod_settings_digest(spec, attempt.stage, settings)
    deadline = spec.pod_settings(attempt.stage).active_deadline_seconds
    parts = (attempt.stage_key, pod_settings, attempt.number)
    meta = metadata(owner, child_name(owner, attempt.stage, *parts))
    meta["labels"] = {
        **stage_labels(owner, attempt.stage, attempt.number),
        **({QUEUE_LABEL: spec.queue_name} if spec.queue_name else {}),
    }
    meta["annotations"] = {
        FINETUNEJOB_NAME_ANNOTATION: owner.name,
        STAGE_KEY_ANNOTATION: attempt.stage_key,
        POD_SETTINGS_ANNOTATION: pod_settings,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {
            "backoffLimit": 0,
            # Kueue lets it go on when there is quota; until then it has no pod.
            **({"suspend": True} if spec.queue_name else {}),
            **({"activeDeadlineSeconds": deadline} if deadline is not None else {}),
            "ttlSecondsAfterFinished": _ttl_seconds(spec, attempt.stage),
            "podFailurePolicy": _pod_failure_policy(),
            "template": _pod_template(owner, spec, attempt, settings, meta["name"]),
        },
    }


def pod_settings_digest(spec: FineTuneJobSpec, stage: Stage, settings: Settings) -> str:
    """Digest of the settings of a stage's pods that can't change its result."""
    pod = spec.pod_settings(stage)
    return digest(
        pod.model_dump(mode="json", exclude_none=True, exclude=_untouched(pod)),
        _image(pod, settings),
        settings.image_pull_policy,
        settings.image_pull_secrets,
        settings.trainer_log_format,
        spec.service_account_name,
        _dump(spec.storage.secret_ref),
        _dump(spec.model.token_secret_ref),
        *_publishing(spec, stage),
        *store_references(spec, stage),
        *([{"queue": spec.queue_name}] if spec.queue_name else []),
        *([{"cache": _dump(settings.model_cache)}] if settings.model_cache else []),
    )


def _untouched(pod: PodSettings) -> set[str]:
    """Fields that came later than the digest, which they leave as it was where they aren't used."""
    later = {"workspace": Workspace(), "resource_claims": ()}
    return {name for name, unused in later.items() if getattr(pod, name) == unused}


def _ttl_seconds(spec: FineTuneJobSpec, stage: Stage) -> int:
    """How long an ended pod is kept: one that looks at an interval, no longer than until the next
    look, so that they don't pile up."""
    longest = spec.ttl_seconds_after_finished
    if stage is Stage.PREPARE and spec.refresh_interval is not None:
        longest = min(longest, int(spec.refresh_interval.total_seconds()))
    return max(longest, SHORTEST_TTL_SECONDS)


def _publishing(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    parts = (spec.export.signing, spec.output.hub, spec.output.oci) if stage is Stage.EXPORT else ()
    return [part.model_dump(mode="json") for part in parts if part is not None]


def _image(pod: PodSettings, settings: Settings) -> str:
    return pod.image or settings.trainer_image


def _dump(value: Base | None) -> JsonObject | None:
    return value.model_dump(mode="json", exclude_none=True) if value is not None else None


def _pod_failure_policy() -> JsonObject:
    """What the Job controller decides itself."""
    codes = {
        "containerName": TRAINER_CONTAINER,
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
    owner: ObservedFineTuneJob,
    spec: FineTuneJobSpec,
    attempt: Attempt,
    settings: Settings,
    name: str,
) -> JsonObject:
    pod = spec.pod_settings(attempt.stage)
    shared_memory = shared_memory_mib(attempt.stage, pod, attempt.hardware)
    own = stage_labels(owner, attempt.stage, attempt.number)
    return {
        "metadata": {
            "labels": {**pod.labels, **own},
            "annotations": {
                **pod.annotations,
                **_gpus_told(pod),
                FINETUNEJOB_NAME_ANNOTATION: owner.name,
            },
        },
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": service_account_name(owner, spec.service_account_name),
            # Every container would see that token; a volume gives one to the trainer's alone.
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
            "containers": [_container(spec, attempt, settings, name, shared_memory)],
            "volumes": stage_volumes(
                spec, attempt.stage, settings.model_cache, shared_memory, attempt.config_map
            ),
            **_pull_secrets(settings),
            **_placement(pod),
        },
    }


def _container(
    spec: FineTuneJobSpec,
    attempt: Attempt,
    settings: Settings,
    job_name: str,
    shared_memory: int | None,
) -> JsonObject:
    stage, pod = attempt.stage, spec.pod_settings(attempt.stage)
    fixed = {
        "HOME": WORKSPACE,
        "TMPDIR": WORKSPACE,
        "FINETUNE_JOB": job_name,
        "FINETUNE_GRACE_SECONDS": str(GRACE_SECONDS[stage]),
    }
    config = f"{CONFIG_FOLDER}/run.json"
    container: JsonObject = {
        "name": TRAINER_CONTAINER,
        "image": _image(pod, settings),
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["finetune-trainer"],
        "args": [str(stage), "--config", config, "--workspace", WORKSPACE],
        "workingDir": WORKSPACE,
        "env": environment(spec, stage, pod, settings, fixed),
        "volumeMounts": stage_mounts(spec, stage, settings.model_cache, shared_memory),
        # If a container ends without a StageResult, the end of its log helps a person.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    resources = {name: value for name, value in pod.resources.model_dump().items() if value}
    if predicted := _predicted_requests(spec, attempt):
        resources["requests"] = {**pod.resources.requests, **predicted}
    if pod.resource_claims:
        resources["claims"] = [{"name": claim.name} for claim in pod.resource_claims]
    if resources:
        container["resources"] = resources
    return container


def _predicted_requests(spec: FineTuneJobSpec, attempt: Attempt) -> dict[str, str]:
    """Memory and disk as predicted, of which the spec says nothing.

    In a queue only the spec counts: its quota may cover neither.
    """
    if spec.queue_name:
        return {}
    stage, needs, pod = attempt.stage, attempt.needs, spec.pod_settings(attempt.stage)
    memory, disk = None, None
    if stage is Stage.PREPARE:
        memory, disk = PREPARE_MEMORY, PREPARE_DISK
    elif needs is not None and stage is Stage.TRAIN:
        memory, disk = needs.train_memory_bytes, needs.train_storage_bytes
    elif needs is not None:
        memory, disk = needs.export_memory_bytes, needs.export_storage_bytes
    if pod.workspace.storage is not None:
        disk = None  # a volume of its own
    said = {**pod.resources.limits, **pod.resources.requests}
    return {
        name: f"{math.ceil(size / MEBIBYTE)}Mi"
        for name, size in (("memory", memory), ("ephemeral-storage", disk))
        if size is not None and name not in said
    }


def _gpus_told(pod: PodSettings) -> dict[str, str]:
    """Nothing in a pod says how many devices its claims come to."""
    return {GPUS_ANNOTATION: str(pod.claimed_gpus)} if pod.claimed_gpus else {}


def _pull_secrets(settings: Settings) -> JsonObject:
    if not settings.image_pull_secrets:
        return {}
    return {"imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets]}


def _placement(pod: PodSettings) -> JsonObject:
    """Where the pod may run, and how urgently."""
    return {
        key: value
        for key, value in {
            "resourceClaims": [_claim(each) for each in pod.resource_claims],
            "nodeSelector": pod.node_selector,
            "tolerations": [_dump(each) for each in pod.tolerations],
            "affinity": pod.affinity,
            "priorityClassName": pod.priority_class_name,
            "runtimeClassName": pod.runtime_class_name,
        }.items()
        if value
    }


def _claim(claim: ResourceClaim) -> JsonObject:
    return claim.model_dump(mode="json", exclude_none=True, exclude={"gpus"})


def environment(
    spec: FineTuneJobSpec,
    stage: Stage,
    pod: PodSettings,
    settings: Settings,
    fixed: dict[str, str],
) -> list[JsonObject]:
    """The user's variables, those in `fixed`, and the credentials by reference."""
    own = [{"name": name, "value": value} for name, value in fixed.items()]
    if settings.model_cache is not None:
        own.append({"name": MODEL_CACHE, "value": CACHE_FOLDER})
    own += _credentials(spec, stage)
    own += _credentials_of_export(spec) if stage is Stage.EXPORT else []
    # The user can't override the operator's own variables: they are part of the contract between
    # operator and trainer.
    taken = {each["name"] for each in own}
    users = [_variable(each) for each in pod.env if each.name not in taken]
    return [*_defaults(settings, users), *users, *own]


def _defaults(settings: Settings, users: list[JsonObject]) -> list[JsonObject]:
    """Variables that the user may override."""
    defaults = {"FINETUNE_LOG_FORMAT": settings.trainer_log_format}
    given = {each["name"] for each in users}
    return [{"name": name, "value": text} for name, text in defaults.items() if name not in given]


def _credentials(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    found = store_variables(spec, stage)
    if spec.model.token_secret_ref is not None:
        token = spec.model.token_secret_ref
        found.append(from_secret("HF_TOKEN", token.name, token.key))
    return found


def _credentials_of_export(spec: FineTuneJobSpec) -> list[JsonObject]:
    found: list[JsonObject] = []
    if spec.output.hub is not None:
        token = spec.output.hub.token_secret_ref
        found.append(from_secret("FINETUNE_HUB_TOKEN", token.name, token.key))
    return found


def _variable(given: EnvVar) -> JsonObject:
    if given.value_from is None:
        return {"name": given.name, "value": given.value}
    secret = given.value_from.secret_key_ref
    return from_secret(given.name, secret.name, secret.key, optional=secret.optional)
