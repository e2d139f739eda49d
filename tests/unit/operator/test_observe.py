"""What is read from objects as Kubernetes writes them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobStatus, Phase
from finetune_operator.observe import (
    Finish,
    ObservedJob,
    Reported,
    observe_finetunejob,
    observe_jobs,
    stages_at_work,
)
from finetune_operator.pods import ObservedPod, Waiting
from finetune_trainer.config import Stage
from finetune_trainer.outcome import Notice, NoticeCode, Reason, StageResult
from tests.unit.operator.build import SPEC

OWNER = {"kind": "FineTuneJob", "name": "support", "uid": "uid-1", "controller": True}
FINGERPRINT = "f" * 64
RESULT = StageResult(stage=Stage.TRAIN, reason=Reason.SUCCEEDED, message="trained")


def moment(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-11-24T{text}").replace(tzinfo=UTC)


def raw_job(**status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": "support-train-0123456789",
            "namespace": "ml",
            "uid": "job-uid",
            "creationTimestamp": "2026-11-24T12:00:00Z",
            "ownerReferences": [OWNER],
            "labels": {"finetune.dev/stage": "train", "finetune.dev/attempt": "2"},
            "annotations": {"finetune.dev/key": FINGERPRINT, "finetune.dev/pod-settings": "s1"},
        },
        "spec": {"template": {"spec": {"containers": [{"name": "trainer", "image": "trainer:1"}]}}},
        "status": status,
    }


def raw_pod(name: str = "pod-1", created: str = "12:00:01", **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "creationTimestamp": f"2026-11-24T{created}Z",
            "ownerReferences": [{"kind": "Job", "uid": "job-uid", "controller": True}],
        },
        "spec": {
            "containers": [
                {"name": "istio-proxy", "image": "proxy:1"},
                {"name": "trainer", "image": "trainer:1"},
            ]
        },
        "status": status,
    }


def container(**state: Any) -> dict[str, Any]:
    sidecar = {"name": "istio-proxy", "state": {"running": {}}}
    return {"containerStatuses": [sidecar, {"name": "trainer", "state": state}]}


def terminated(code: int, message: str = "", reason: str = "Error") -> dict[str, Any]:
    state = {
        "exitCode": code,
        "reason": reason,
        "message": message,
        "startedAt": "2026-11-24T12:00:05Z",
        "finishedAt": "2026-11-24T12:09:00Z",
    }
    return container(terminated=state)


FAILED = [{"type": "Failed", "status": "True", "lastTransitionTime": "2026-11-24T12:10:00Z"}]


def observed(*pods: dict[str, Any], **status: Any) -> ObservedJob:
    (job,) = observe_jobs("uid-1", [raw_job(**status)], pods)
    return job


def observed_pod(**status: Any) -> ObservedPod:
    pod = observed(raw_pod(**status)).pod
    assert pod is not None
    return pod


def expected_pod(**fields: Any) -> ObservedPod:
    values = {"name": "pod-1", "phase": "Pending", "since": moment("12:00:01"), **fields}
    return ObservedPod(image="trainer:1", **values)


def test_a_new_job() -> None:
    assert observed() == ObservedJob(
        name="support-train-0123456789",
        uid="job-uid",
        stage=Stage.TRAIN,
        key=FINGERPRINT,
        attempt=2,
        pod_settings="s1",
        image="trainer:1",
        created=moment("12:00:00"),
    )


@pytest.mark.parametrize("finish", list(Finish))
def test_a_job_that_ended(finish: Finish) -> None:
    condition = {
        "type": str(finish),
        "status": "True",
        "lastTransitionTime": "2026-11-24T12:10:00Z",
    }
    job = observed(conditions=[{"type": "SuccessCriteriaMet", "status": "True"}, condition])
    assert (job.finished, job.finished_at) == (finish, moment("12:10:00"))


def test_the_newest_pod_counts() -> None:
    job = observed(raw_pod("late", "12:05:00"), raw_pod("early", "12:01:00"))
    assert job.pod is not None
    assert job.pod.name == "late"


RUNS = {"phase": "Running", **container(running={})}


@pytest.mark.parametrize(
    ("early", "lingers"),
    [
        pytest.param(RUNS, True, id="runs"),
        pytest.param({"phase": "Failed", **terminated(14)}, False, id="has ended"),
        pytest.param({"phase": "Failed"}, False, id="failed before it ran"),
        pytest.param({"phase": "Pending", **container(waiting={})}, False, id="never ran"),
    ],
)
def test_an_earlier_pod_lingers_while_it_runs(early: dict[str, Any], lingers: bool) -> None:
    job = observed(raw_pod("late", "12:05:00"), raw_pod("early", "12:01:00", **early))
    assert job.pod is not None
    assert (job.pod.name, job.lingers) == ("late", lingers)


@pytest.mark.parametrize(
    ("pods", "status", "occupied"),
    [
        pytest.param([], {}, True, id="a Job that may make a pod"),
        pytest.param([RUNS], {"conditions": FAILED}, True, id="a failed Job whose pod runs"),
        pytest.param(
            [{"phase": "Failed", **terminated(14)}], {"conditions": FAILED}, False, id="all ended"
        ),
        pytest.param([], {"conditions": FAILED}, False, id="a failed Job without a pod"),
    ],
)
def test_what_keeps_the_next_attempt_from_starting(
    pods: list[dict[str, Any]], status: dict[str, Any], occupied: bool
) -> None:
    assert observed(*(raw_pod(**each) for each in pods), **status).occupied is occupied


def test_stages_of_pods_that_still_run() -> None:
    pods = [raw_pod("one", **RUNS), raw_pod("two", phase="Failed", **terminated(14)), raw_pod()]
    for pod, stage in zip(pods, ("train", "export", "other"), strict=True):
        pod["metadata"]["labels"] = {"finetune.dev/stage": stage}
    assert stages_at_work(pods) == {Stage.TRAIN}


def test_jobs_of_others_are_not_looked_at() -> None:
    foreign = raw_job()
    foreign["metadata"]["ownerReferences"] = [{**OWNER, "uid": "uid-2"}]
    unmarked = raw_job()
    unmarked["metadata"]["labels"] = {}
    assert observe_jobs("uid-1", [foreign, unmarked], []) == ()


def test_jobs_come_oldest_first() -> None:
    young, old = raw_job(), raw_job()
    old["metadata"] = {
        **old["metadata"],
        "name": "old",
        "creationTimestamp": "2026-11-23T12:00:00Z",
    }
    assert [job.name for job in observe_jobs("uid-1", [young, old], [])] == [
        "old",
        "support-train-0123456789",
    ]


PODS = [
    pytest.param({}, expected_pod(), id="a pod without a status"),
    pytest.param(
        {
            "phase": "Pending",
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/1 nodes are available",
                }
            ],
        },
        expected_pod(unschedulable="0/1 nodes are available"),
        id="a pod that no node takes",
    ),
    pytest.param(
        {
            "phase": "Pending",
            "startTime": "2026-11-24T12:01:00Z",
            **container(
                waiting={
                    "reason": "CreateContainerConfigError",
                    "message": 'secret "bucket" not found',
                }
            ),
        },
        expected_pod(
            since=moment("12:01:00"),
            waiting=Waiting("CreateContainerConfigError", 'secret "bucket" not found'),
        ),
        id="a container that waits for its Secret",
    ),
    pytest.param(
        {"phase": "Running", **container(running={"startedAt": "2026-11-24T12:00:05Z"})},
        expected_pod(phase="Running", started=True),
        id="a container that runs",
    ),
    pytest.param(
        {"phase": "Succeeded", **terminated(0, RESULT.to_message().decode(), "Completed")},
        expected_pod(
            phase="Succeeded",
            started=True,
            exit_code=0,
            finished_at=moment("12:09:00"),
            result=RESULT,
        ),
        id="a container that ended with its result",
    ),
    pytest.param(
        {
            "phase": "Failed",
            **terminated(1, 'Traceback:\n  File "x.py", line 1\nRuntimeError: no luck\n\n'),
        },
        expected_pod(
            phase="Failed",
            started=True,
            exit_code=1,
            finished_at=moment("12:09:00"),
            last_words="RuntimeError: no luck",
        ),
        id="a container that crashed with a stack trace",
    ),
    pytest.param(
        {"phase": "Failed", **terminated(137, reason="OOMKilled")},
        expected_pod(
            phase="Failed",
            started=True,
            exit_code=137,
            finished_at=moment("12:09:00"),
            oom_killed=True,
        ),
        id="a container that used too much memory",
    ),
    pytest.param(
        {
            "phase": "Failed",
            "reason": "Evicted",
            "message": "The node was low on resource: memory.",
        },
        expected_pod(phase="Failed", disruption="Evicted: The node was low on resource: memory."),
        id="a pod evicted from a node in need",
    ),
    pytest.param(
        {
            "phase": "Failed",
            "reason": "Evicted",
            "message": 'Usage of EmptyDir volume "workspace" exceeds the limit "1Gi". ',
        },
        expected_pod(
            phase="Failed",
            out_of_disk='Usage of EmptyDir volume "workspace" exceeds the limit "1Gi". ',
        ),
        id="a pod evicted for its own greed",
    ),
    pytest.param(
        {"phase": "Failed", "reason": "OutOfnvidia.com/gpu", "message": "Node didn't have enough"},
        expected_pod(phase="Failed", disruption="OutOfnvidia.com/gpu: Node didn't have enough"),
        id="a pod that its node did not let in",
    ),
    pytest.param(
        {
            "phase": "Failed",
            "conditions": [
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "PreemptionByScheduler",
                    "message": "preempted by a greater pod",
                }
            ],
        },
        expected_pod(
            phase="Failed", disruption="PreemptionByScheduler: preempted by a greater pod"
        ),
        id="a pod that was preempted",
    ),
]


@pytest.mark.parametrize(("status", "expected"), PODS)
def test_pods(status: dict[str, Any], expected: ObservedPod) -> None:
    assert observed_pod(**status) == expected


def test_a_pod_that_is_being_deleted() -> None:
    pod = raw_pod(phase="Running")
    pod["metadata"]["deletionTimestamp"] = "2026-11-24T12:02:00Z"
    assert observed(pod).pod == expected_pod(phase="Running", deleting=True)


@pytest.mark.parametrize(
    ("job", "active"),
    [
        pytest.param(observed(), True, id="no pod yet"),
        pytest.param(observed(raw_pod(phase="Running", **container(running={}))), True, id="runs"),
        pytest.param(observed(raw_pod(**terminated(1))), False, id="the trainer has ended"),
        pytest.param(
            observed(conditions=[{"type": "Failed", "status": "True"}]), False, id="has failed"
        ),
    ],
)
def test_what_may_still_be_at_work(job: ObservedJob, active: bool) -> None:
    assert job.active is active


def raw_finetunejob(spec: Any = None, status: Any = None, **meta: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "support",
            "namespace": "ml",
            "uid": "uid-1",
            "generation": 4,
            "resourceVersion": "99",
            **meta,
        },
        "spec": spec or SPEC,
        "status": status or {},
    }


def test_a_new_finetunejob_has_an_empty_status() -> None:
    job = observe_finetunejob(raw_finetunejob())
    assert job.spec is not None
    assert (job.generation, job.resource_version, job.deleting) == (4, "99", False)
    assert job.status == FineTuneJobStatus()


def test_a_spec_that_is_wrong_is_explained_by_field() -> None:
    wrong = json.loads(json.dumps(SPEC))
    wrong["training"] = {"epochs": 0}
    job = observe_finetunejob(raw_finetunejob(wrong))
    assert job.spec is None
    assert job.spec_error is not None
    assert job.spec_error.startswith("spec.training.epochs")
    assert "must be a whole number from 1 to 1000" in job.spec_error


NOTICE = {"code": "LossRising", "step": 40, "evidence": "1.2, then 3.4", "remedy": "Lower it."}


@pytest.mark.parametrize(
    ("progress", "reported"),
    [
        pytest.param(None, Reported(), id="none"),
        pytest.param({"percent": "10%"}, Reported(), id="without a word"),
        pytest.param(
            {"job": "train-1", "notices": [NOTICE]},
            Reported(
                "train-1",
                (
                    Notice(
                        code=NoticeCode.LOSS_RISING,
                        step=40,
                        evidence="1.2, then 3.4",
                        remedy="Lower it.",
                    ),
                ),
            ),
            id="a notice",
        ),
        pytest.param(
            {"job": "train-1", "notices": [{**NOTICE, "code": "Unheard"}, {"code": "Resumed"}]},
            Reported("train-1"),
            id="what a newer trainer says",
        ),
    ],
)
def test_of_progress_the_notices_are_read(progress: Any, reported: Reported) -> None:
    status = {"progress": progress} if progress else {}
    assert observe_finetunejob(raw_finetunejob(status=status)).reported == reported


def test_progress_is_not_read_since_another_trainer_may_write_it() -> None:
    status = {"phase": "Training", "progress": {"fieldOfTheFuture": 1}}
    assert observe_finetunejob(raw_finetunejob(status=status)).status == FineTuneJobStatus(
        phase=Phase.TRAINING
    )


def test_a_status_that_cannot_be_read_is_like_none() -> None:
    status = {"phase": "Training", "fieldOfTheFuture": 1}
    assert observe_finetunejob(raw_finetunejob(status=status)).status == FineTuneJobStatus()


def test_a_finetunejob_that_is_being_deleted() -> None:
    raw = raw_finetunejob(deletionTimestamp="2026-11-24T12:02:00Z")
    assert observe_finetunejob(raw).deleting
