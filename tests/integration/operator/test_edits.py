"""Editing the YAML reruns what the edit touches, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.contract import Reason, Stage
from hack.process import CommandFailed
from tests.integration.operator.stage import Namespace, exported, prepared, resolved, trained

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
NEW_TRAIN = resolved(train="train-b", export="export-b")
NEW_EXPORT = resolved(export="export-b")


def children(here: Namespace, stage: Stage) -> list[dict[str, Any]]:
    """All Jobs of a stage."""
    return [
        job
        for job in here.children("jobs")
        if job["metadata"]["labels"]["finetune.dev/stage"] == str(stage)
    ]


def test_another_quantization_runs_prepare_and_export(here: Namespace) -> None:
    here.run_all()
    # The Job controller may take a second longer than the operator to see that the pod has ended.
    here.wait(
        "the training's Job to be complete",
        lambda: "completionTime" in children(here, TRAIN)[0]["status"],
    )
    trainings = children(here, TRAIN)
    here.apply(export={"gguf": ["F16", "Q8_0"]})
    here.wait_phase("Preparing")
    # The former version stays Ready, and says of which generation it is.
    ready = here.status()["conditions"][0]
    assert (ready["type"], ready["status"], ready["observedGeneration"]) == ("Ready", "True", 1)
    wait = ("wait", "--for=condition=Ready", "ftj/support", "-n", here.name, "--timeout=2s")
    with pytest.raises(CommandFailed, match="timed out"):
        here.plane.kubectl(*wait)
    assert here.status()["artifacts"]
    here.succeed(prepared(PREPARE, TRAIN, found=NEW_EXPORT))
    here.wait_phase("Exporting")
    here.succeed(exported())
    here.wait_phase("Succeeded")
    assert children(here, TRAIN) == trainings
    assert len(children(here, EXPORT)) == 2
    assert here.stage(EXPORT)["fingerprint"] == "export-b"
    times = {stage: here.times_told(f"Started {stage}, attempt 1.") for stage in Stage}
    assert times == {PREPARE: 2, TRAIN: 1, EXPORT: 2}, "each attempt has an Event of its own"


def test_another_learning_rate_stops_the_training_and_starts_it_anew(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    old = here.start_pod(TRAIN)["metadata"]["uid"]
    here.wait_phase("Training")
    here.apply(training={"learningRate": 1e-4})
    here.wait_phase("Preparing")
    assert here.pod(TRAIN)["metadata"]["uid"] == old
    here.succeed(prepared(PREPARE, found=NEW_TRAIN))
    here.wait_phase("Training")
    new = here.wait(
        "the new pod", lambda: here.pod(TRAIN)["metadata"]["uid"] not in {old} and here.pod(TRAIN)
    )
    (job,) = here.wait(
        "the old Job to be gone", lambda: len(found := children(here, TRAIN)) == 1 and found
    )
    assert job["metadata"]["annotations"]["finetune.dev/key"] == "train-b"
    assert new["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]


def test_other_resources_leave_the_running_training_alone(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    here.set_pod(here.pod(TRAIN), "Pending", conditions=[waits])
    here.wait("the pod to wait", lambda: here.condition("Progressing")[1] == "Unschedulable")
    old = here.start_pod(TRAIN)["metadata"]["uid"]
    here.wait_phase("Training")
    # The edit below reaches the operator on another watch than the pod's start.
    here.wait("the start to be seen", lambda: here.condition("Progressing")[1] == "Training")
    here.apply(stages={"train": {"resources": {"limits": {"memory": "8Gi"}}}})
    here.wait_phase("Preparing")
    here.succeed(prepared(PREPARE))
    here.wait_phase("Training")
    assert here.pod(TRAIN)["metadata"]["uid"] == old
    here.succeed(trained())
    here.wait_phase("Exporting")


def test_other_resources_replace_a_training_that_has_not_begun(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    old = here.pod(TRAIN)["metadata"]["uid"]
    here.apply(stages={"train": {"resources": {"limits": {"memory": "8Gi"}}}})
    here.succeed(prepared(PREPARE))
    here.wait("another pod", lambda: here.pod(TRAIN)["metadata"]["uid"] != old)
    (container,) = here.pod(TRAIN)["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi"}
    here.wait("the same attempt", lambda: here.stage(TRAIN)["attempt"] == 1)


def test_an_edit_during_prepare_starts_prepare_anew(here: Namespace) -> None:
    here.apply()
    old = here.start_pod(PREPARE)["metadata"]["uid"]
    here.apply(training={"seed": 1})
    here.wait("another pod", lambda: here.pod(PREPARE)["metadata"]["uid"] != old)
    here.succeed(prepared())
    here.wait_phase("Training")


def test_bad_data_in_the_new_spec_leaves_the_old_training_alone(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    pod = here.start_pod(TRAIN)["metadata"]["uid"]
    here.wait_phase("Training")
    here.apply(dataset={"source": "s3://data/gone.csv"})
    here.fail(PREPARE, Reason.DATASET_NOT_FOUND, "There is no s3://data/gone.csv.")
    here.wait_phase("Failed")
    assert "The new spec can't be reached" in here.condition("Degraded")[2]
    assert here.condition("Stalled")[0] == "True"
    assert here.pod(TRAIN)["metadata"]["uid"] == pod
    here.succeed(trained())
    here.wait("its end", lambda: here.stage(TRAIN)["state"] == "Succeeded")
    here.apply()  # the former spec again
    here.succeed(prepared(PREPARE, TRAIN))
    here.wait_phase("Exporting")
    assert len(children(here, TRAIN)) == 1


def test_a_spec_that_cannot_be_reached_leaves_the_finished_model_current(here: Namespace) -> None:
    before = here.run_all()
    here.apply(dataset={"source": "s3://data/gone.csv"})
    here.fail(PREPARE, Reason.DATASET_NOT_FOUND, "There is no s3://data/gone.csv.")
    status = here.wait_phase("Failed")
    assert status["conditions"][0] == before["conditions"][0]
    assert status["artifacts"] == before["artifacts"]
    assert "The former version stays current" in here.condition("Degraded")[2]


def test_an_edit_that_no_stage_depends_on_reruns_nothing(here: Namespace) -> None:
    before = here.run_all()
    here.apply(ttlSecondsAfterFinished=4000, stages={"train": {"image": "trainer:next"}})
    after = here.wait_phase("Succeeded")
    assert after["conditions"][0]["observedGeneration"] == 2
    assert after["stages"] == before["stages"]
    assert here.jobs() == [("prepare", 1), ("train", 1), ("export", 1)]


def test_a_mended_spec_goes_on_after_a_failure(here: Namespace) -> None:
    here.apply(dataset={"source": "s3://data/gone.csv"})
    here.fail(PREPARE, Reason.DATASET_NOT_FOUND, "There is no s3://data/gone.csv.")
    here.wait_phase("Failed")
    here.apply()
    here.succeed(prepared())
    here.wait_phase("Training")
    assert here.condition("Degraded")[0] == "False"
