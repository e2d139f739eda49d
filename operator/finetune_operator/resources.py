"""What pods will have and have used: the training's hardware, and GPU and CPU time so far. Pure.

`prepare` plans the training with the hardware, as far as spec and node labels tell. No fingerprint
and no digest of pod settings depends on it, so a change of the nodes restarts nothing.

Of what was used, each pod counts once, when it ends. Status keeps the pods that run and those that
were counted last, so a restart of the operator counts none twice and forgets none. A pod that
vanished without a word counts until its Job ended, or else until somebody looked. One clock, the
node's, tells start and end of a pod; where another one is compared with it, no time is less than
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kubernetes.utils import parse_quantity

from finetune_operator.api.finetunejob import FineTuneJobSpec, PodSettings
from finetune_operator.api.observed import (
    FineTuneJobStatus,
    Phase,
    PodUsage,
    StageUsage,
    UsageStatus,
)
from finetune_operator.observe import ObservedJob
from finetune_operator.pods import ObservedPod
from finetune_operator.status import timestamp
from finetune_trainer.contract import Hardware, Stage

Labels = Mapping[str, str]

# The device plugins' resources: whole GPUs, shared ones, and NVIDIA's slices (MIG).
GPU_RESOURCE = re.compile(r"(nvidia\.com/(gpu|mig-)|amd\.com/gpu)")
# NVIDIA's GPU feature discovery labels a node with the memory of one GPU or slice in MiB, as
# <resource>.memory. There is no such label for a shared GPU.
MEMORY_RESOURCE = re.compile(r"nvidia\.com/(gpu|mig-[^/]+)")
# A slice is named for its compute units and its memory, rounded up: nvidia.com/mig-3g.20gb has
# 19.5 GiB, mig-1g.5gb 4.75 GiB, and of an H200 mig-1g.18gb 16 GiB (NVIDIA's MIG user guide). So
# seven eighths of the figure are there for certain, but for one that several pods share.
SLICE = re.compile(r"nvidia\.com/mig-\d+g\.(?P<gib>\d+)gb(\.(?!.*shared).+)?")
MEBIBYTE = 1 << 20


def training_hardware(spec: FineTuneJobSpec, nodes: Iterable[Labels] = ()) -> Hardware:
    """Read the limits of stages.train, and of stages.export the disk.

    `nodes` are the labels of the nodes with GPUs.
    """
    pod = spec.stages.train
    limits = pod.resources.limits
    gpus = sum(_as_integer(limits[name]) or 0 for name in _gpu_resources(pod))
    gpus += pod.claimed_gpus
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
    if spec.training.gpu_memory is not None or len(resources) != 1 or pod.claimed_gpus:
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
    return min(sizes, default=0) * MEBIBYTE or _named_memory(label)


def _named_memory(label: str) -> int | None:
    """What a slice's name tells, where no node does."""
    named = SLICE.fullmatch(label.removesuffix(".memory"))
    return int(named["gib"]) * 1024 * MEBIBYTE * 7 // 8 if named else None


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


GPU = re.compile(r".+/(gpu(\.shared)?|mig-.+)")  # of any vendor; a slice of one counts as one
REMEMBERED_PODS = 20  # counted pods that are kept although they are gone


def with_usage(
    status: FineTuneJobStatus,
    jobs: Sequence[ObservedJob],
    pods_without_job: Iterable[ObservedPod],
    now: datetime,
) -> FineTuneJobStatus:
    """The status, whose usage knows of each pod.

    What had come to its end before anything was counted stays as it is.
    """
    if status.usage is None and status.phase in {Phase.SUCCEEDED, Phase.FAILED}:
        return status
    count = _Count(status.usage or UsageStatus(), now)
    for job in jobs:
        for pod in _pods_of(job):
            count.see(pod, job)
    for pod in pods_without_job:
        count.see(pod, None)
    found = count.finish({job.name: job for job in jobs})
    return status.model_copy(update={"usage": found}) if found != UsageStatus() else status


@dataclass
class _Sum:
    """The figures of one stage while they are added up."""

    gpu_seconds: int = 0
    cpu_seconds: int = 0
    waiting_seconds: int = 0
    attempts: int = 0


class _Count:
    """Adds what is new to what was counted before."""

    def __init__(self, before: UsageStatus, now: datetime) -> None:
        self._now = now
        self._pods = {pod.name: pod for pod in before.pods}
        self._seen: set[str] = set()
        self._sums = {stage: _Sum() for stage in Stage}
        for stage in before.stages:
            self._sums[stage.name] = _Sum(
                **{name: getattr(stage, name) for name in _Sum.__dataclass_fields__}
            )

    def see(self, pod: ObservedPod, job: ObservedJob | None) -> None:
        """Count a pod that is there, if it has begun to run."""
        self._seen.add(pod.name)
        if pod.name not in self._pods and pod.started and job is not None:
            self._begin(pod, job)
        if pod.has_ended:
            self._end(pod.name, pod.finished_at or self._now)

    def finish(self, jobs: Mapping[str, ObservedJob]) -> UsageStatus:
        """Count the pods that are gone; the whole then."""
        for name in self._pods.keys() - self._seen:
            job = jobs.get(self._pods[name].job)
            self._end(name, (job.finished_at if job is not None else None) or self._now)
        gone = [name for name in self._pods if name not in self._seen]
        for name in gone[: max(len(gone) - REMEMBERED_PODS, 0)]:
            del self._pods[name]
        stages = tuple(StageUsage(name=stage, **vars(each)) for stage, each in self._sums.items())
        sums = {
            name: sum(getattr(stage, name) for stage in stages)
            for name in _Sum.__dataclass_fields__
        }
        used = tuple(stage for stage in stages if stage != StageUsage(name=stage.name))
        return UsageStatus(**sums, stages=used, pods=tuple(self._pods.values()))

    def _begin(self, pod: ObservedPod, job: ObservedJob) -> None:
        begun, total = pod.started_at or self._now, self._sums[job.stage]
        first = all(each.job != job.name for each in self._pods.values())
        waited_since = job.created if first else pod.created or begun
        total.waiting_seconds += _seconds(waited_since, begun)
        total.attempts += first
        self._pods[pod.name] = PodUsage(
            name=pod.name,
            job=job.name,
            stage=job.stage,
            start_time=timestamp(begun),
            gpus=round(sum(_amounts(pod, GPU))) + pod.claimed_gpus,
            cpus=sum(_amounts(pod, re.compile("cpu"))),
        )

    def _end(self, name: str, when: datetime) -> None:
        pod = self._pods.get(name)
        if pod is None or pod.counted:
            return
        total, ran = self._sums[pod.stage], _seconds(_moment(pod.start_time), when)
        total.gpu_seconds += pod.gpus * ran
        total.cpu_seconds += round(pod.cpus * ran)
        self._pods[name] = pod.model_copy(update={"counted": True})


def _pods_of(job: ObservedJob) -> tuple[ObservedPod, ...]:
    return (*job.earlier_pods, *((job.pod,) if job.pod is not None else ()))


def _amounts(pod: ObservedPod, resource: re.Pattern[str]) -> Iterator[float]:
    """How much the pod has of the resources whose names match."""
    for name, quantity in pod.resources.items():
        if resource.fullmatch(name):
            yield float(parse_quantity(quantity))


def _seconds(begin: datetime, end: datetime) -> int:
    return max(0, round((end - begin).total_seconds()))


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
