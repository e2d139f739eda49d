"""From `kubectl apply` to the artifacts, and from `kubectl delete` to nothing."""

from __future__ import annotations

import time

import pytest

from finetune_trainer.contract import Reason, Stage
from hack.operator_process import Operator
from tests.integration.operator.stage import (
    EXPORTED_VERSION,
    VERSION_FOLDER,
    Namespace,
    exported,
    prepared,
    trained,
)

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
LONG_AGO = "2026-01-01T00:00:00Z"


def test_a_job_runs_its_three_stages_in_order_and_shows_its_artifacts(here: Namespace) -> None:
    here.apply()
    here.wait_phase("Preparing")
    here.start_pod(PREPARE)
    here.succeed(prepared())
    here.wait_phase("Training")
    here.wait("its Job", lambda: here.jobs() == [("prepare", 1), ("train", 1)])
    here.succeed(trained())
    here.wait_phase("Exporting")
    here.succeed(exported())
    status = here.wait_phase("Succeeded")

    assert here.jobs() == [("prepare", 1), ("train", 1), ("export", 1)]
    assert status["artifacts"] == [
        {"uri": f"{VERSION_FOLDER}/gguf/model-F16.gguf", "bytes": 10, "sha256": "aa"}
    ]
    assert status["version"] == EXPORTED_VERSION
    assert status["manifestUri"] == f"{VERSION_FOLDER}/manifest.json"
    columns = here.plane.kubectl("get", "ftj/support", "-n", here.name).splitlines()
    shown = columns[0].index("VERSION")
    assert columns[1][shown:].split()[0] == EXPORTED_VERSION
    assert status["metrics"] == {"trainLoss": 0.5}
    assert status["lineage"] == {
        "datasetETag": "etag",
        "datasetRows": 120,
        "evalRows": 6,
        "modelRevision": "abc",
        "image": "trainer:test",
    }
    assert here.condition("Ready")[0] == "True"
    assert here.condition("Degraded")[0] == "False"
    assert [here.stage(stage)["fingerprint"] for stage in Stage] == [
        "prepare-a",
        "train-a",
        "export-a",
    ]
    assert ("Normal", "Succeeded") in here.events()
    wait = ("wait", "--for=condition=Ready", "ftj/support", "-n", here.name, "--timeout=5s")
    assert "condition met" in here.plane.kubectl(*wait)


def test_the_same_yaml_again_starts_nothing(here: Namespace) -> None:
    before = here.run_all()
    here.apply()
    here.apply(name="another")  # when this one is at work, the first one has been looked at
    here.wait("the other job", lambda: len(here.children("jobs")) == 4)
    assert here.status() == before


def test_a_job_created_anew_runs_prepare_only(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared(PREPARE, TRAIN, EXPORT))
    status = here.wait_phase("Succeeded")
    assert here.jobs() == [("prepare", 1)]
    assert [here.stage(stage).get("cached", False) for stage in Stage] == [False, True, True]
    assert status["version"] == EXPORTED_VERSION
    assert status["manifestUri"] == f"{VERSION_FOLDER}/manifest.json"


def test_a_finished_job_does_not_need_its_jobs(here: Namespace) -> None:
    before = here.run_all()
    here.plane.kubectl("delete", "jobs", "--all", "-n", here.name)
    here.apply(name="another")
    here.wait("the other job", lambda: here.children("jobs"))
    assert here.jobs() == [("prepare", 1)]
    assert here.status() == before


def test_a_training_whose_job_was_deleted_by_hand_starts_again_when_its_pod_has_stopped(
    here: Namespace,
) -> None:
    here.apply()
    here.succeed(prepared())
    pod = here.pod(TRAIN)
    here.bind(pod, "a-node")  # from now on it has its grace period
    here.start_pod(TRAIN)
    here.wait("train", lambda: here.stage(TRAIN).get("state") == "Running")
    time.sleep(1.1)  # starts within one second would be one Event
    here.plane.kubectl("delete", "jobs", "-n", here.name, "-l", "finetune.dev/stage=train")
    # The Job is gone at once, its pod is not: it saves its last checkpoint.
    here.wait("the operator to wait", lambda: here.condition("Progressing")[1] == "Stopping")
    assert here.jobs() == [("prepare", 1)]
    here.remove_pod(pod)
    here.wait("a new pod", lambda: here.pod(TRAIN)["metadata"]["uid"] != pod["metadata"]["uid"])
    assert here.stage(TRAIN).get("failures", 0) == 0
    here.wait("its event", lambda: here.times_told("Started train, attempt 1.") == 2)


def test_the_trainers_progress_is_left_alone(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    here.start_pod(TRAIN)
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{here.name}/finetunejobs/support/status"
    here.merge_patch(path, {"status": {"progress": {"stage": "train", "percent": "35%"}}})
    here.succeed(trained())
    status = here.wait_phase("Exporting")
    assert status["progress"] == {"stage": "train", "percent": "35%"}


def test_a_name_as_long_as_names_may_be(here: Namespace) -> None:
    name = "long." + "x" * 240
    here.apply(name=name)
    (job,) = here.wait("its job", lambda: here.children("jobs"))
    assert len(job["metadata"]["name"]) <= 63
    assert here.pod(PREPARE)["metadata"]["annotations"]["finetune.dev/job-name"] == name


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_answer(here: Namespace, operator: Operator, path: str) -> None:
    del here
    assert operator.get(path).text == "ok\n"


def test_metrics_count_the_jobs_by_phase(here: Namespace, operator: Operator) -> None:
    here.apply()
    here.fail(PREPARE, Reason.DATASET_EMPTY, "no rows")
    here.wait_phase("Failed")
    failure = f'namespace="{here.name}",reason="DatasetEmpty",stage="prepare"'
    for line in (
        f'finetune_jobs{{namespace="{here.name}",phase="Failed"}} 1.0',
        f"finetune_stage_failures_total{{{failure}}} 1.0",
        f'finetune_stage_attempts_total{{namespace="{here.name}",stage="prepare"}} 1.0',
        'finetune_api_requests_total{code="200",verb="PATCH"}',
        "finetune_leader 1.0",
        "finetune_queue_depth 0.0",
        'finetune_reconciles_total{result="changed"}',
    ):
        here.wait(line, lambda line=line: line in operator.get("/metrics").text)  # type: ignore[misc]


def test_a_sidecar_that_goes_on_does_not_keep_the_pod(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    pod = here.pod(TRAIN)
    ended = {"exitCode": 0, "message": trained().to_message().decode(), "finishedAt": LONG_AGO}
    here.set_pod(pod, "Running", {"terminated": {**ended, "startedAt": LONG_AGO}})
    here.wait_phase("Exporting")
    here.wait("the pod to go", lambda: pod["metadata"]["uid"] not in uids(here))
    here.wait("the event", lambda: ("Normal", "SidecarStopped") in here.events())
    here.succeed(exported())
    here.wait_phase("Succeeded")


def uids(here: Namespace) -> set[str]:
    pods = (each["metadata"] for each in here.children("pods"))
    return {meta["uid"] for meta in pods if "deletionTimestamp" not in meta}
