"""The volumes of a stage's pod, and where its container mounts them."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.finetunejob import PodSettings
from finetune_trainer.contract import Hardware, Stage

CONFIG_FOLDER = "/etc/finetune"
WORKSPACE = "/workspace"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a path
TOKEN_SECONDS = 3607  # the kubelet renews the token long before
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the kernel's name
SHARED_MEMORY_MIB = 8192
MEBIBYTE = 1 << 20


def mounts(pod: PodSettings, shared_memory: int | None) -> list[dict[str, Any]]:
    """The container's volumeMounts."""
    found: list[dict[str, Any]] = [
        {"name": "workspace", "mountPath": WORKSPACE},
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "token", "mountPath": TOKEN_FOLDER, "readOnly": True},
    ]
    if shared_memory is not None:
        found.append({"name": "shared-memory", "mountPath": SHARED_MEMORY})
    for number, volume in enumerate(pod.volumes):
        mount = {"name": f"claim-{number}", "mountPath": volume.mount_path}
        found.append(mount | ({"readOnly": True} if volume.read_only else {}))
    return found


def volumes(pod: PodSettings, config_map: str, shared_memory: int | None) -> list[dict[str, Any]]:
    """The pod's volumes."""
    namespace = {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
    root = {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
        {"configMap": root},
        {"downwardAPI": {"items": [{"path": "namespace", **namespace}]}},
    ]
    found: list[dict[str, Any]] = [
        {"name": "workspace", "emptyDir": {}},
        {"name": "config", "configMap": {"name": config_map}},
        {"name": "token", "projected": {"sources": sources}},
    ]
    if shared_memory is not None:
        folder = {"medium": "Memory", "sizeLimit": f"{shared_memory}Mi"}
        found.append({"name": "shared-memory", "emptyDir": folder})
    for number, volume in enumerate(pod.volumes):
        claim = {"claimName": volume.claim_name}
        found.append({"name": f"claim-{number}", "persistentVolumeClaim": claim})
    return found


def shared_memory_mib(stage: Stage, pod: PodSettings, hardware: Hardware) -> int | None:
    """MiB of /dev/shm that several GPUs get, through which their processes talk (NCCL, gloo).

    A container's own 64 MiB are too few. What is written there counts against the pod's memory
    limit, hence no more than a quarter of that.
    """
    mounted = {volume.mount_path.rstrip("/") for volume in pod.volumes}
    if stage is not Stage.TRAIN or hardware.gpus <= 1 or SHARED_MEMORY in mounted:
        return None
    if hardware.memory_bytes is None:
        return SHARED_MEMORY_MIB
    return max(min(SHARED_MEMORY_MIB, hardware.memory_bytes // 4 // MEBIBYTE), 1)
