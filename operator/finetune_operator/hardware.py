"""The hardware of the training's pod, as far as spec and node labels tell. Pure.

`prepare` plans the training with it. No fingerprint and no digest of pod settings depends on it, so
a change of the nodes restarts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kubernetes.utils import parse_quantity

from finetune_operator.api.finetunejob import FineTuneJobSpec, PodSettings
from finetune_trainer.contract import Hardware

Labels = Mapping[str, str]

# The device plugins' resources: whole GPUs, shared ones, and NVIDIA's slices (MIG).
GPU_RESOURCE = re.compile(r"(nvidia\.com/(gpu|mig-)|amd\.com/gpu)")
# NVIDIA's GPU feature discovery labels a node with the memory of one GPU or slice in MiB, as
# <resource>.memory. There is no such label for a shared GPU.
MEMORY_RESOURCE = re.compile(r"nvidia\.com/(gpu|mig-[^/]+)")
MEBIBYTE = 1 << 20


def training_hardware(spec: FineTuneJobSpec, nodes: Iterable[Labels] = ()) -> Hardware:
    """Read the limits of stages.train, and of stages.export the disk.

    `nodes` are the labels of the nodes with GPUs.
    """
    pod = spec.stages.train
    limits = pod.resources.limits
    gpus = sum(_as_integer(limits[name]) or 0 for name in _gpu_resources(pod))
    return Hardware(
        gpus=gpus,
        gpu_memory_bytes=_gpu_memory(spec, nodes) if gpus else None,
        memory_bytes=_as_integer(limits.get("memory")),
        ephemeral_storage_bytes=_disk(pod),
        export_storage_bytes=_disk(spec.stages.export),
    )


def _disk(pod: PodSettings) -> int | None:
    """Bytes that the pod may write, if that is limited."""
    if pod.workspace.storage is not None:
        return _as_integer(pod.workspace.storage)
    limits = (pod.workspace.size_limit, pod.resources.limits.get("ephemeral-storage"))
    sizes = [size for each in limits if (size := _as_integer(each)) is not None]
    return min(sizes, default=None)


def memory_label(spec: FineTuneJobSpec) -> str | None:
    """The node label with the GPU memory; None if it isn't needed or couldn't be relied on."""
    pod = spec.stages.train
    resources = _gpu_resources(pod)
    if spec.training.gpu_memory is not None or len(resources) != 1:
        return None
    if not MEMORY_RESOURCE.fullmatch(resources[0]) or _requires_affinity(pod):
        return None
    return f"{resources[0]}.memory"


def _gpu_memory(spec: FineTuneJobSpec, nodes: Iterable[Labels]) -> int | None:
    if spec.training.gpu_memory is not None:
        return _as_integer(spec.training.gpu_memory)
    label, selector = memory_label(spec), spec.stages.train.node_selector
    if label is None:
        return None
    fitting = [node for node in nodes if selector.items() <= node.items()]
    sizes = [int(node[label]) for node in fitting if node.get(label, "").isdecimal()]
    return min(sizes, default=0) * MEBIBYTE or None


def _gpu_resources(pod: PodSettings) -> list[str]:
    return [name for name in pod.resources.limits if GPU_RESOURCE.match(name)]


def _requires_affinity(pod: PodSettings) -> bool:
    """Whether node affinity limits the choice of nodes.

    It isn't evaluated here, so the smallest GPU found might be one that the pod can't get.
    """
    rules: Mapping[str, Any] = pod.affinity or {}
    of_node = rules.get("nodeAffinity")
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    return isinstance(of_node, Mapping) and bool(of_node.get(required))


def _as_integer(quantity: int | str | None) -> int | None:
    """A quantity such as 16Gi as an integer; None if it is malformed, which the server reports."""
    if quantity is None:
        return None
    try:
        return int(parse_quantity(quantity))
    except (ValueError, ArithmeticError):
        return None
