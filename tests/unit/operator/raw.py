"""Jobs and Pods as the API server writes them, and what is read from them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_operator.observe import ObservedJob, observe_jobs
from finetune_operator.pods import ObservedPod
from finetune_trainer.contract import Reason, Stage, StageResult
from tests.unit.operator.build import finetunejob

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
            "namespace": "ml",
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
    (job,) = observe_jobs(finetunejob(), [raw_job(**status)], pods)
    return job


def observed_pod(**status: Any) -> ObservedPod:
    pod = observed(raw_pod(**status)).pod
    assert pod is not None
    return pod


def expected_pod(**fields: Any) -> ObservedPod:
    made = moment("12:00:01")
    values = {"name": "pod-1", "phase": "Pending", "since": made, "created": made, **fields}
    values.setdefault("uid", f"uid-{values['name']}")
    if "exit_code" in fields:
        values.setdefault("started_at", moment("12:00:05"))
    return ObservedPod(image="trainer:1", **values)


RUNS = {"phase": "Running", **container(running={})}
