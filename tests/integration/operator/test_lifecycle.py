"""A FineTuneJob is suspended, at whatever moment, and goes on."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.contract import Reason, Stage, StageResult
from tests.integration.operator.stage import (
    Namespace,
    Raw,
    exported,
    prepared,
    resolved,
    trained,
)

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
STOPPED = StageResult(stage=TRAIN, reason=Reason.STOPPED, message="It goes on from step 12.")
NODE = "node-of-the-test"


def conditions(here: Namespace) -> dict[str, str]:
    """Status of each condition, by type."""
    return {each["type"]: each["status"] for each in here.status()["conditions"]}


def train_on_a_node(here: Namespace, **spec: Any) -> Raw:
    """A training whose pod has a grace period, as on every node."""
    here.apply(**spec)
    here.succeed(prepared())
    here.bind(here.pod(TRAIN), NODE)
    pod = here.start_pod(TRAIN)
    here.wait("the start to be seen", lambda: here.condition("Progressing")[1] == "Training")
    return pod


def leaving(here: Namespace, pod: Raw) -> bool:
    """Whether the pod has been told to stop."""
    (found,) = [each for each in here.children("pods") if _uid(each) == _uid(pod)]
    return "deletionTimestamp" in found["metadata"]


def _uid(raw: Raw) -> str:
    uid: str = raw["metadata"]["uid"]
    return uid


def end_leaving_pod(here: Namespace, pod: Raw, code: int, result: StageResult) -> None:
    """What the kubelet does with a pod that stops within its grace period."""
    state = {"exitCode": code, "message": result.to_message().decode()}
    here.set_pod(pod, "Failed" if code else "Succeeded", {"terminated": state})


def test_a_training_is_suspended_and_goes_on(here: Namespace) -> None:
    pod = train_on_a_node(here)
    here.apply(suspend=True)
    here.wait("SIGTERM", lambda: leaving(here, pod))
    here.wait("the reason", lambda: here.condition("Progressing")[1] == "Suspending")
    assert "Suspended" not in conditions(here)  # while it saves its last step
    end_leaving_pod(here, pod, 14, STOPPED)
    here.remove_pod(pod)
    status = here.wait_phase("Suspended")
    assert conditions(here) == {
        "Ready": "False",
        "Progressing": "False",
        "Degraded": "False",
        "Suspended": "True",
    }
    assert {each["observedGeneration"] for each in status["conditions"]} == {2}
    assert here.jobs() == [("prepare", 1)]
    here.apply()
    here.succeed(trained(), attempt=2)
    here.succeed(exported())
    here.wait_phase("Succeeded")
    train = here.stage(TRAIN)
    assert (train["attempt"], train["failures"], train["disruptions"]) == (2, 0, 0)
    told = [reason for _, reason in here.events()]
    assert told.count("Suspended") == told.count("Resumed") == 1
    assert {kind for kind, _ in here.events()} == {"Normal"}


def test_a_training_that_ends_well_in_its_grace_period_is_not_lost(here: Namespace) -> None:
    pod = train_on_a_node(here)
    here.apply(suspend=True)
    here.wait("SIGTERM", lambda: leaving(here, pod))
    end_leaving_pod(here, pod, 0, trained())
    here.wait("the result", lambda: here.stage(TRAIN)["state"] == "Succeeded")
    here.remove_pod(pod)
    here.wait_phase("Suspended")
    assert here.status()["metrics"] == {"trainLoss": 0.5}
    here.apply()
    here.succeed(exported())
    here.wait_phase("Succeeded")
    assert here.stage(TRAIN)["attempt"] == 1


@pytest.mark.parametrize("stage", [PREPARE, EXPORT])
def test_another_stage_is_suspended_and_starts_again(here: Namespace, stage: Stage) -> None:
    here.apply()
    if stage is EXPORT:
        here.succeed(prepared())
        here.succeed(trained())
    here.start_pod(stage)
    here.wait("it to run", lambda: here.stage(stage).get("state") == "Running")
    here.apply(suspend=True)
    here.wait_phase("Suspended")
    here.wait("no Job of it", lambda: not any(each[0] == str(stage) for each in here.jobs()))
    here.apply()
    here.pod(stage, attempt=2)
    assert here.stage(stage)["failures"] == 0


def test_nothing_begins_before_it_is_resumed(here: Namespace) -> None:
    here.apply(suspend=True)
    here.wait_phase("Suspended")
    here.apply(suspend=True, training={"seed": 7})
    here.wait_phase("Suspended")
    assert here.jobs() == []
    here.apply(training={"seed": 7})
    here.pod(PREPARE)


def test_a_finished_model_stays_ready(here: Namespace) -> None:
    before = here.run_all()
    here.apply(suspend=True)
    status = here.wait_phase("Suspended")
    assert conditions(here)["Ready"] == "True"
    wait = ("wait", "--for=condition=Ready", "ftj/support", "-n", here.name, "--timeout=5s")
    here.plane.kubectl(*wait)
    assert status["artifacts"] == before["artifacts"]
    here.apply()
    here.wait_phase("Succeeded")
    assert here.jobs() == [("prepare", 1), ("train", 1), ("export", 1)]


def test_a_trainer_that_reports_no_more_is_stopped(here: Namespace) -> None:
    pod = train_on_a_node(here, training={"stallTimeout": "1s"})
    here.report(pod, heartbeatSeconds=1, lastUpdateTime="2026-01-01T00:00:00Z")
    here.wait("it to be told", lambda: here.condition("Degraded")[1] == "Stalled")
    assert pod["metadata"]["name"] in here.condition("Degraded")[2]
    here.wait("SIGTERM", lambda: leaving(here, pod))
    here.remove_pod(pod)
    here.start_pod(TRAIN, attempt=2)
    assert here.stage(TRAIN)["failures"] == 1
    assert ("Warning", "Stalled") in here.events()


def test_an_attempt_that_takes_too_long_is_ended(here: Namespace) -> None:
    limit = {"train": {"activeDeadlineSeconds": 3}}
    here.apply(stages=limit)
    here.succeed(prepared())
    pod = here.pod(TRAIN)
    here.bind(pod, NODE)
    here.start_pod(TRAIN)
    here.wait("SIGTERM", lambda: leaving(here, pod))
    assert here.stage(TRAIN)["state"] == "Running"  # it saves its last step
    end_leaving_pod(here, pod, 14, STOPPED)
    here.remove_pod(pod)
    here.wait_phase("Failed")
    kind, reason, message = here.condition("Degraded")
    assert (kind, reason) == ("True", "DeadlineExceeded")
    assert "spec.stages.train.activeDeadlineSeconds" in message
    train = here.stage(TRAIN)
    assert (train["attempt"], train.get("disruptions", 0)) == (1, 0)
    here.apply()  # without the limit
    here.succeed(prepared(PREPARE))
    here.start_pod(TRAIN, attempt=2)


def ask(here: Namespace, value: str) -> None:
    """What a user does after a remedy that lies outside the spec."""
    request = f"finetune.dev/retry-requested-at={value}"
    here.plane.kubectl("annotate", "ftj/support", request, "--overwrite", "-n", here.name)


def test_a_new_file_under_the_same_key_is_looked_at_on_request(here: Namespace) -> None:
    here.run_all()
    ask(here, "monday")
    here.wait("another look", lambda: here.status().get("lastHandledRetryAt") == "monday")
    here.wait("prepare", lambda: here.stage(PREPARE)["state"] == "Running")
    assert conditions(here)["Ready"] == "True"
    here.succeed(prepared(PREPARE, found=resolved(train="train-b", export="export-b")))
    here.succeed(trained())
    here.succeed(exported())
    status = here.wait_phase("Succeeded")
    assert status["generation"] == status["observedGeneration"] == 1
    assert [each["fingerprint"] for each in status["stages"]] == [
        "prepare-a",
        "train-b",
        "export-b",
    ]
    ask(here, "monday")
    here.apply(ttlSecondsAfterFinished=4000)  # when this is seen, the annotation has been
    here.wait_phase("Succeeded")
    assert here.jobs().count(("prepare", 1)) == 2


def test_a_failed_stage_is_tried_again_on_request(here: Namespace) -> None:
    here.apply(backoffLimit=0)
    here.fail(PREPARE, Reason.MODEL_ACCESS_DENIED, "Accept its licence.")
    here.wait_phase("Failed")
    ask(here, "monday")
    here.succeed(prepared())
    here.fail(TRAIN, Reason.INTERNAL_ERROR, "no luck")
    here.wait_phase("Failed")
    assert here.stage(TRAIN)["failures"] == 1
    ask(here, "tuesday")
    here.succeed(prepared(PREPARE))
    here.succeed(trained(), attempt=2)
    here.succeed(exported())
    here.wait_phase("Succeeded")
    assert here.stage(TRAIN)["failures"] == 0
    assert [reason for _, reason in here.events()].count("RetryRequested") == 2
