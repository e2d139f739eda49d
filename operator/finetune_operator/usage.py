"""What a FineTuneJob has used so far: GPU and CPU time, time spent waiting, attempts. Pure.

Each pod counts once, when it ends. Status keeps the pods that run and those that were counted
last, so a restart of the operator counts none twice and forgets none. A pod that vanished without a
word counts until its Job ended, or else until somebody looked. One clock, the node's, tells start
and end of a pod; where another one is compared with it, no time is less than nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from kubernetes.utils import parse_quantity

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
from finetune_trainer.contract import Stage

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
            gpus=round(sum(_amounts(pod, GPU))),
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
