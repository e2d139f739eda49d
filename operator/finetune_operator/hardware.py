"""What the training's pod will have, as far as the spec and the nodes' labels tell. Pure.

`prepare` plans the training with it. It is no part of any fingerprint or of the pods' settings, so
a node that comes or goes restarts nothing.
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
# NVIDIA's GPU feature discovery labels a node with the memory of one GPU or slice, in MiB, as
# <resource>.memory. A shared GPU has no such label of its own.
MEMORY_RESOURCE = re.compile(r"nvidia\.com/(gpu|mig-[^/]+)")
MEBIBYTE = 1 << 20


def training_hardware(spec: FineTuneJobSpec, nodes: Iterable[Labels] = ()) -> Hardware:
    """Read the limits of stages.train; `nodes` are the labels of nodes that may tell GPU memory."""
    pod = spec.stages.train
    limits = pod.resources.limits
    gpus = sum(_whole(limits[name]) or 0 for name in _gpu_resources(pod))
    return Hardware(
        gpus=gpus,
        gpu_memory_bytes=_gpu_memory(spec, nodes) if gpus else None,
        memory_bytes=_whole(limits.get("memory")),
        ephemeral_storage_bytes=_whole(limits.get("ephemeral-storage")),
    )


def memory_label(spec: FineTuneJobSpec) -> str | None:
    """The node label that tells GPU memory; None where the nodes need not or can't be asked."""
    pod = spec.stages.train
    resources = _gpu_resources(pod)
    if spec.training.gpu_memory is not None or len(resources) != 1:
        return None
    if not MEMORY_RESOURCE.fullmatch(resources[0]) or _requires_affinity(pod):
        return None
    return f"{resources[0]}.memory"


def _gpu_memory(spec: FineTuneJobSpec, nodes: Iterable[Labels]) -> int | None:
    if spec.training.gpu_memory is not None:
        return _whole(spec.training.gpu_memory)
    label, selector = memory_label(spec), spec.stages.train.node_selector
    if label is None:
        return None
    fitting = [node for node in nodes if selector.items() <= node.items()]
    sizes = [int(node[label]) for node in fitting if node.get(label, "").isdecimal()]
    return min(sizes, default=0) * MEBIBYTE or None


def _gpu_resources(pod: PodSettings) -> list[str]:
    return [name for name in pod.resources.limits if GPU_RESOURCE.match(name)]


def _requires_affinity(pod: PodSettings) -> bool:
    """Whether the node is chosen by more than labels that are equal, which isn't worked out here:
    a GPU that the pod can't get might be the smallest."""
    rules: Mapping[str, Any] = pod.affinity or {}
    of_node = rules.get("nodeAffinity")
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    return isinstance(of_node, Mapping) and bool(of_node.get(required))


def _whole(quantity: int | str | None) -> int | None:
    """A quantity such as 16Gi as a whole number; None where it is none (the API server says so)."""
    if quantity is None:
        return None
    try:
        return int(parse_quantity(quantity))
    except (ValueError, ArithmeticError):
        return None
