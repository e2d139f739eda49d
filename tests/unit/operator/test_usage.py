"""What a FineTuneJob used: each pod counts once, whatever happens to it and to the operator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetune_operator.api.observed import (
    FineTuneJobStatus,
    Phase,
    PodUsage,
    StageUsage,
    Usage,
    UsageStatus,
)
from finetune_operator.observe import ObservedJob
from finetune_operator.pods import ObservedPod, observe_pod
from finetune_operator.resources import REMEMBERED_PODS, with_usage
from finetune_trainer.contract import Stage
from tests.unit.operator.build import EXPORT, NOW, TRAIN, at, job, pod, stamp, waiting_pod
from tests.unit.operator.raw import container, observed_pod, raw_pod

GPU = {"nvidia.com/gpu": "2", "cpu": "1500m", "memory": "8Gi"}
AT_WORK = FineTuneJobStatus(phase=Phase.TRAINING)


def at_work(name: str = "train-1-abcde", since: float = 0, **fields: Any) -> ObservedPod:
    """A pod of a training that runs."""
    given = {"created": at(since - 30), "started_at": at(since), "resources": GPU, **fields}
    return pod(name=name, **given)


def ended(name: str = "train-1-abcde", since: float = 0, until: float = 100) -> ObservedPod:
    return at_work(name, since, phase="Succeeded", exit_code=0, finished_at=at(until))


def attempt(*pods: ObservedPod, number: int = 1, **fields: Any) -> ObservedJob:
    """A Job of the training that was created a minute before NOW, with its pods."""
    latest = pods[-1] if pods else None
    return job(TRAIN, number, pod=latest, earlier_pods=pods[:-1], **fields)


def count(
    before: FineTuneJobStatus,
    *jobs: ObservedJob,
    now: float = 200,
    loose: Iterable[ObservedPod] = (),
) -> FineTuneJobStatus:
    return with_usage(before, jobs, loose, at(now))


def sums(status: FineTuneJobStatus) -> tuple[int, int, int, int]:
    """GPU, CPU and waiting seconds, and attempts."""
    assert status.usage is not None
    usage = status.usage
    return usage.gpu_seconds, usage.cpu_seconds, usage.waiting_seconds, usage.attempts


def test_nothing_is_said_before_a_pod_runs() -> None:
    assert count(AT_WORK, attempt(waiting_pod(name="a"))) == AT_WORK


def test_a_pod_that_runs_is_remembered_and_counts_when_it_has_ended() -> None:
    seen = count(AT_WORK, attempt(at_work()))
    remembered = PodUsage(
        name="train-1-abcde", job="train-1", stage=TRAIN, start_time=stamp(0), gpus=2, cpus=1.5
    )
    waited = Usage(waiting_seconds=60, attempts=1).model_dump()
    assert seen.usage == UsageStatus(
        **waited, stages=(StageUsage(name=TRAIN, **waited),), pods=(remembered,)
    )
    assert count(seen, attempt(at_work())) == seen, "and a further look changes nothing"

    done = count(seen, attempt(ended()))
    used = Usage(gpu_seconds=200, cpu_seconds=150, waiting_seconds=60, attempts=1).model_dump()
    assert done.usage == UsageStatus(
        **used,
        stages=(StageUsage(name=TRAIN, **used),),
        pods=(remembered.model_copy(update={"counted": True}),),
    )


def test_a_pod_counts_once_however_often_it_is_seen_and_after_it_is_gone() -> None:
    done = count(AT_WORK, attempt(ended()))
    assert sums(done) == (200, 150, 60, 1)
    assert count(done, attempt(ended()), now=300) == done
    assert count(done, now=90000) == done, "its Job was removed after its time to live"
    assert count(done, attempt(ended()), now=90001) == done, "a late word of it"


def test_an_operator_that_was_away_counts_what_ended_meanwhile() -> None:
    assert sums(count(AT_WORK, attempt(ended()), attempt(ended("b", 150, 160), number=2))) == (
        220,
        165,
        270,
        2,
    )


def test_each_lost_pod_counts_and_so_does_the_wait_for_the_next_one() -> None:
    lost = at_work("a", 0, phase="Failed", exit_code=143, finished_at=at(40))
    again = at_work("b", 100, created=at(50))
    status = count(AT_WORK, attempt(lost, again))
    assert sums(status) == (80, 60, 60 + 50, 1)
    finished = ended("b", 100, 200)
    assert sums(count(status, attempt(lost, finished))) == (280, 210, 110, 1)


def test_a_pod_without_a_last_word_counts_until_somebody_noticed() -> None:
    status = count(AT_WORK, attempt(at_work("a")))
    assert sums(count(status, now=70)) == (140, 105, 60, 1), "deleted by force, with its Job"
    ended_job = attempt(finished_at=at(50))
    assert sums(count(status, ended_job, now=7000)) == (100, 75, 60, 1), "its Job tells"
    evicted = pod(name="a", phase="Failed", started=False, disruption="Evicted")
    assert sums(count(status, attempt(evicted), now=30)) == (60, 45, 60, 1)


def test_a_pod_whose_job_was_deleted_counts_until_it_has_stopped() -> None:
    status = count(AT_WORK, attempt(at_work()))
    leaving = count(status, loose=[at_work()], now=100)
    assert leaving == status
    assert sums(count(leaving, loose=[ended(until=110)], now=120)) == (220, 165, 60, 1)
    unknown = count(status, attempt(at_work()), loose=[ended("somebody")])
    assert unknown == status


def test_a_node_whose_clock_is_slow_makes_no_time_less_than_nothing() -> None:
    slow = attempt(at_work("a", since=-500))
    assert sums(count(AT_WORK, slow)) == (0, 0, 0, 1)
    begun = count(AT_WORK, attempt(at_work("a", since=500)))
    assert sums(count(begun, now=100))[0] == 0, "it began after it vanished"


def test_the_stages_add_up() -> None:
    export = job(EXPORT, pod=ended("e", 300, 310))
    status = count(AT_WORK, attempt(ended()), export)
    assert status.usage is not None
    assert [(each.name, each.gpu_seconds) for each in status.usage.stages] == [
        (Stage.TRAIN, 200),
        (Stage.EXPORT, 20),
    ]
    assert sums(status) == (220, 165, 420, 2)


def test_gpus_of_any_vendor_and_their_slices_count() -> None:
    for name in (
        "amd.com/gpu",
        "nvidia.com/gpu.shared",
        "nvidia.com/mig-1g.10gb",
        "gpu.example.com/gpu",
    ):
        given = attempt(at_work(resources={name: 3}, phase="Failed", exit_code=1))
        status = count(AT_WORK, given, now=10)
        assert sums(status)[:2] == (30, 0), name
    none = attempt(at_work(resources={"memory": "1Gi", "example.com/gpu-memory": 80}))
    assert count(AT_WORK, none).usage.pods[0].gpus == 0  # type: ignore[union-attr]


def test_pods_that_are_gone_are_forgotten_in_time() -> None:
    status = AT_WORK
    for number in range(REMEMBERED_PODS + 5):
        status = count(status, attempt(ended(f"p{number}"), number=number))
    status = count(status)
    assert status.usage is not None
    assert len(status.usage.pods) == REMEMBERED_PODS
    assert status.usage.pods[-1].name == f"p{REMEMBERED_PODS + 4}"
    assert sums(status)[0] == 200 * (REMEMBERED_PODS + 5)


def test_what_was_settled_before_anything_was_counted_is_left_alone() -> None:
    settled = FineTuneJobStatus(phase=Phase.SUCCEEDED)
    assert count(settled, attempt(ended())) == settled


def test_a_pod_tells_what_it_requests_and_when_it_began() -> None:
    raw = raw_pod(phase="Running", **container(running={"startedAt": "2026-11-24T12:00:07Z"}))
    raw["spec"]["containers"][1]["resources"] = {
        "limits": {"cpu": "4", "nvidia.com/gpu": 1},
        "requests": {"cpu": "500m"},
    }
    assert observed_pod(**raw["status"]).started_at == at(7)
    assert observe_pod(raw).resources == {"cpu": "500m", "nvidia.com/gpu": 1}
    assert observe_pod(raw).created == NOW.replace(second=1)
