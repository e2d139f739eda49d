"""What a stage's pod mounts: workspace, run.json, keys and certificates, base models, and what its
user names."""

from __future__ import annotations

from finetune_operator.api import CaBundle, JsonObject, ModelCache, Volume
from finetune_operator.api.finetunejob import AnyStorageSpec, FineTuneJobSpec, PodSettings
from finetune_trainer.contract import (
    MODEL_IMAGE,
    MODEL_IMAGE_FOLDER,
    REGISTRY_FILE,
    SIGNING_KEY_FILE,
    Hardware,
    Stage,
)

CONFIG_FOLDER = "/etc/finetune"
WORKSPACE = "/workspace"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a path
TOKEN_SECONDS = 3607  # the kubelet renews the token long before
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the kernel's name
SHARED_MEMORY_MIB = 8192
MEBIBYTE = 1 << 20
GROUP_TOO = 0o040
OWNER_ONLY = 0o400  # to which the kubelet adds the pod's group
SIGNING_MOUNT = {
    "name": "signing-key",
    "mountPath": SIGNING_KEY_FILE.rsplit("/", 1)[0],
    "readOnly": True,
}
REGISTRY_MOUNT = {
    "name": "registry",
    "mountPath": REGISTRY_FILE.rsplit("/", 1)[0],
    "readOnly": True,
}
CERTIFICATES_FOLDER = "/etc/finetune-ca"
CERTIFICATES_FILE = "ca.crt"
CACHE_FOLDER = "/var/cache/finetune-models"


def stage_mounts(
    spec: FineTuneJobSpec, stage: Stage, cache: ModelCache | None, shared_memory: int | None
) -> list[JsonObject]:
    """Where the trainer's container finds each volume."""
    return [
        *mounts(spec.pod_settings(stage), shared_memory),
        *_model_mounts(spec, cache),
        *certificate_mounts(spec, stage),
        *([SIGNING_MOUNT] if _signing_volumes(spec, stage) else []),
        *([REGISTRY_MOUNT] if _registry_volumes(spec, stage) else []),
    ]


def stage_volumes(
    spec: FineTuneJobSpec,
    stage: Stage,
    cache: ModelCache | None,
    shared_memory: int | None,
    config_map: str,
) -> list[JsonObject]:
    """All volumes of a stage's pod; `config_map` holds run.json."""
    return [
        *volumes(spec.pod_settings(stage), config_map, shared_memory),
        *_model_volumes(spec, cache),
        *certificate_volumes(spec, stage),
        *_signing_volumes(spec, stage),
        *_registry_volumes(spec, stage),
    ]


def mounts(pod: PodSettings, shared_memory: int | None) -> list[JsonObject]:
    found: list[JsonObject] = [
        {"name": "workspace", "mountPath": WORKSPACE},
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "token", "mountPath": TOKEN_FOLDER, "readOnly": True},
    ]
    if shared_memory is not None:
        found.append({"name": "shared-memory", "mountPath": SHARED_MEMORY})
    for number, volume in enumerate(pod.volumes):
        mount = {"name": _volume_name(volume, number), "mountPath": volume.mount_path}
        read_only = volume.read_only or volume.claim_name is None
        found.append(mount | ({"readOnly": True} if read_only else {}))
    return found


def volumes(pod: PodSettings, config_map: str, shared_memory: int | None) -> list[JsonObject]:
    namespace = {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
    root = {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
        {"configMap": root},
        {"downwardAPI": {"items": [{"path": "namespace", **namespace}]}},
    ]
    found: list[JsonObject] = [
        {"name": "workspace", **_workspace(pod)},
        {"name": "config", "configMap": {"name": config_map}},
        {"name": "token", "projected": {"sources": sources}},
    ]
    if shared_memory is not None:
        folder = {"medium": "Memory", "sizeLimit": f"{shared_memory}Mi"}
        found.append({"name": "shared-memory", "emptyDir": folder})
    found += (
        {"name": _volume_name(volume, number), **_source(volume)}
        for number, volume in enumerate(pod.volumes)
    )
    return found


def _volume_name(volume: Volume, number: int) -> str:
    return f"claim-{number}" if volume.claim_name is not None else f"volume-{number}"


def _source(volume: Volume) -> JsonObject:
    if volume.config_map is not None:
        return {"configMap": {"name": volume.config_map.name}}
    if volume.secret is not None:
        mode = OWNER_ONLY | GROUP_TOO  # the container's user isn't root
        return {"secret": {"secretName": volume.secret.secret_name, "defaultMode": mode}}
    if volume.image is not None:
        return {"image": volume.image.model_dump(mode="json", exclude_none=True)}
    return {"persistentVolumeClaim": {"claimName": volume.claim_name}}


def _workspace(pod: PodSettings) -> JsonObject:
    given = pod.workspace
    if given.storage is None:
        return {"emptyDir": {"sizeLimit": given.size_limit} if given.size_limit else {}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": given.storage}},
    }
    if given.storage_class_name is not None:
        claim["storageClassName"] = given.storage_class_name
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def shared_memory_mib(stage: Stage, pod: PodSettings, hardware: Hardware) -> int | None:
    """MiB of /dev/shm for the communication of several GPUs' processes (NCCL, gloo).

    A container's default of 64 MiB is too small. What is written there counts against the pod's
    memory limit, so take at most a quarter of it.
    """
    mounted = {volume.mount_path.rstrip("/") for volume in pod.volumes}
    if stage is not Stage.TRAIN or hardware.gpus <= 1 or SHARED_MEMORY in mounted:
        return None
    if hardware.memory_bytes is None:
        return SHARED_MEMORY_MIB
    return max(min(SHARED_MEMORY_MIB, hardware.memory_bytes // 4 // MEBIBYTE), 1)


def _model_mounts(spec: FineTuneJobSpec, cache: ModelCache | None) -> list[JsonObject]:
    found: list[JsonObject] = []
    if cache is not None:
        claim = cache.persistent_volume_claim
        read_only = claim is None or claim.read_only
        mount = {"name": "model-cache", "mountPath": CACHE_FOLDER}
        found.append(mount | ({"readOnly": True} if read_only else {}))
    if spec.model.source.startswith(MODEL_IMAGE):
        found.append({"name": "model", "mountPath": MODEL_IMAGE_FOLDER, "readOnly": True})
    return found


def _model_volumes(spec: FineTuneJobSpec, cache: ModelCache | None) -> list[JsonObject]:
    """The cache that all FineTuneJobs share, and the base model that is an image."""
    found: list[JsonObject] = []
    if cache is not None:
        source = cache.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        found.append({"name": "model-cache", **source})
    if spec.model.source.startswith(MODEL_IMAGE):
        reference = spec.model.source.removeprefix(MODEL_IMAGE)
        found.append({"name": "model", "image": {"reference": reference}})
    return found


def _signing_volumes(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    """The private key as a file in memory: no variable that every process of the pod has.

    It is not optional. The kubelet starts the pod when the Secret is there, so no attempt is lost.
    """
    signing = spec.export.signing
    if signing is None or stage is not Stage.EXPORT:
        return []
    reference = signing.key_secret_ref
    return [_secret_file(SIGNING_MOUNT, SIGNING_KEY_FILE, reference.name, reference.key)]


def _registry_volumes(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    """The registry's login as a file in memory, as the signing key."""
    oci = spec.output.oci
    if stage is not Stage.EXPORT or oci is None or oci.secret_ref is None:
        return []
    return [_secret_file(REGISTRY_MOUNT, REGISTRY_FILE, oci.secret_ref.name, ".dockerconfigjson")]


def _secret_file(mount: JsonObject, file: str, secret: str, key: str) -> JsonObject:
    """The volume of one key of a Secret, as the file of that name."""
    items = [{"key": key, "path": file.rsplit("/", 1)[1]}]
    source = {"secretName": secret, "items": items, "defaultMode": OWNER_ONLY}
    return {"name": mount["name"], "secret": source}


def certificate_mounts(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    """Where each store's certificates are."""
    return [
        {"name": _certificates(store), "mountPath": _folder(store), "readOnly": True}
        for store, _ in _bundles(spec, stage)
    ]


def certificate_volumes(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    """The ConfigMaps and Secrets that hold them.

    They are optional for the kubelet, which would wait for them for ever: the trainer says at once
    what is missing.
    """
    return [
        {"name": _certificates(store), **_source_of_bundle(bundle)}
        for store, bundle in _bundles(spec, stage)
    ]


def certificate_files(spec: FineTuneJobSpec, stage: Stage) -> list[str]:
    """The field of each bundle, with the file that it is in."""
    return [
        f"{store.field}.caBundle={_folder(store)}/{CERTIFICATES_FILE}"
        for store, _ in _bundles(spec, stage)
    ]


def _source_of_bundle(bundle: CaBundle) -> JsonObject:
    if bundle.config_map_ref is not None:
        reference, kind, name = bundle.config_map_ref, "configMap", "name"
    else:
        assert bundle.secret_ref is not None, "a CaBundle has one of the two"  # noqa: S101
        reference, kind, name = bundle.secret_ref, "secret", "secretName"
    items = [{"key": reference.key, "path": CERTIFICATES_FILE}]
    return {kind: {name: reference.name, "items": items, "optional": True}}


def _bundles(spec: FineTuneJobSpec, stage: Stage) -> list[tuple[AnyStorageSpec, CaBundle]]:
    return [(each, each.ca_bundle) for each in spec.stores(stage) if each.ca_bundle is not None]


def _certificates(store: AnyStorageSpec) -> str:
    # spec.storage, spec.dataset.storage, spec.model.storage
    return "-".join(["ca", *store.field.split(".")[1:]])


def _folder(store: AnyStorageSpec) -> str:
    return f"{CERTIFICATES_FOLDER}/{_certificates(store).removeprefix('ca-')}"
