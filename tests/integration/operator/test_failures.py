"""What goes wrong, as the user sees it: at once where nothing helps, again where it may."""

from __future__ import annotations

import time

import pytest

from finetune_trainer.contract import Reason, Stage
from hack.operator_process import SECRET_GRACE_SECONDS
from tests.integration.operator.stage import Namespace, prepared, trained

PREPARE, TRAIN, EXPORT = Stage


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (Reason.COLUMN_NOT_FOUND, "s3://data/faq.csv has no column 'instruction'. Map it."),
        (Reason.STORAGE_ACCESS_DENIED, "The store refuses the credentials."),
        (Reason.MODEL_NOT_FOUND, "There is no model org/base."),
    ],
)
def test_bad_input_fails_before_a_training_exists(
    here: Namespace, reason: Reason, message: str
) -> None:
    here.apply()
    here.fail(PREPARE, reason, message)
    here.wait_phase("Failed")
    assert here.condition("Ready") == ("False", reason, message)
    assert here.condition("Degraded") == ("True", reason, message)
    assert here.condition("Progressing")[0] == "False"
    assert here.jobs() == [("prepare", 1)]
    assert ("Warning", reason) in here.events()


def test_a_missing_secret_is_named_and_waited_for(here: Namespace) -> None:
    here.apply(storage={"secretRef": {"name": "bucket"}})
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "bucket" not found'}
    here.set_pod(here.pod(PREPARE), "Pending", {"waiting": waiting})
    here.wait("Degraded", lambda: here.condition("Degraded")[1] == "SecretNotFound")
    message = here.condition("Degraded")[2]
    assert "The Secret bucket doesn't exist in this namespace" in message
    seen = time.monotonic()
    here.wait("the grace to be over", lambda: time.monotonic() > seen + 2 * SECRET_GRACE_SECONDS)
    assert here.status()["phase"] == "Waiting"
    here.start_pod(PREPARE)  # as the kubelet does when the Secret is there
    here.wait("no trouble", lambda: here.condition("Degraded")[0] == "False")
    here.succeed(prepared())
    here.wait_phase("Training")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ('secret "signer" not found', "The Secret signer doesn't exist in this namespace"),
        (
            "references non-existent secret key: private-key.pem",
            "The Secret signer has no key private-key.pem",
        ),
    ],
)
def test_a_signing_key_that_can_t_be_mounted_is_named_and_waited_for(
    here: Namespace, words: str, told: str
) -> None:
    here.apply(export={"signing": {"keySecretRef": {"name": "signer"}}})
    here.succeed(prepared())
    here.succeed(trained())
    pod = here.pod(EXPORT)
    creating = {"waiting": {"reason": "ContainerCreating"}}
    here.set_pod(pod, "Pending", creating)
    here.tell(pod, "FailedMount", f'MountVolume.SetUp failed for volume "signing-key" : {words}')
    here.wait("Degraded", lambda: here.condition("Degraded")[1] == "SecretNotFound")
    assert told in here.condition("Degraded")[2]
    here.start_pod(EXPORT)  # as the kubelet does when the Secret is there
    here.wait("no trouble", lambda: here.condition("Degraded")[0] == "False")
    assert here.jobs()[-1] == ("export", 1)


def test_an_image_that_cannot_be_pulled_is_trouble_but_not_the_end(here: Namespace) -> None:
    here.apply()
    pod = here.pod(PREPARE)
    here.set_pod(pod, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "no"}})
    here.wait("Degraded", lambda: here.condition("Degraded")[1] == "ImageNotPulled")
    assert "trainer:test" in here.condition("Degraded")[2]
    here.start_pod(PREPARE)
    here.wait("no trouble", lambda: here.condition("Degraded")[0] == "False")


def test_a_pod_without_a_node_says_why(here: Namespace) -> None:
    here.apply()
    words = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": words,
    }
    here.set_pod(here.pod(PREPARE), "Pending", conditions=[condition])
    here.wait("the reason", lambda: here.condition("Progressing")[1] == "Unschedulable")
    assert words in here.condition("Progressing")[2]
    assert here.condition("Degraded")[0] == "False"


def test_an_unknown_failure_is_tried_again_after_a_pause_and_counts(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    here.end_pod(TRAIN, 1, "Traceback:\nRuntimeError: no luck\n")
    here.wait("the failure", lambda: here.stage(TRAIN).get("failures") == 1)
    assert here.condition("Degraded")[1] == "InternalError"
    assert "RuntimeError: no luck" in here.condition("Degraded")[2]
    assert here.jobs() == [("prepare", 1), ("train", 1)]
    here.succeed(trained(), attempt=2)
    here.wait_phase("Exporting")
    here.wait(
        "its Job",
        lambda: here.jobs() == [("prepare", 1), ("train", 1), ("train", 2), ("export", 1)],
    )


def test_with_backoff_limit_zero_the_first_failure_is_the_last(here: Namespace) -> None:
    here.apply(backoffLimit=0)
    here.succeed(prepared())
    here.end_pod(TRAIN, 1)
    here.wait_phase("Failed")
    assert here.condition("Ready")[1] == "InternalError"


def test_an_eviction_is_tried_again_free_of_charge(here: Namespace) -> None:
    here.apply(backoffLimit=0)
    here.succeed(prepared())
    here.set_pod(
        here.start_pod(TRAIN), "Failed", reason="Evicted", message="The node was low on memory."
    )
    here.wait("the disruption", lambda: here.stage(TRAIN).get("reason") == "PodDisrupted")
    here.start_pod(TRAIN, attempt=2)
    here.succeed(trained(), attempt=2)
    here.wait_phase("Exporting")
    assert here.stage(TRAIN)["failures"] == 0


def test_a_pod_that_the_job_itself_replaces_is_told_and_counted(here: Namespace) -> None:
    here.apply(backoffLimit=0)
    here.succeed(prepared())
    pod = here.start_pod(TRAIN)
    here.wait("train", lambda: here.stage(TRAIN).get("state") == "Running")
    target = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "message": "preempted by a greater pod",
        "lastTransitionTime": pod["metadata"]["creationTimestamp"],
    }
    here.set_pod(pod, "Failed", conditions=[target])
    here.wait("the event", lambda: ("Warning", "PodDisrupted") in here.events())
    another = here.another_pod(TRAIN, than=pod)
    here.set_pod(another, "Running", {"running": {}})
    here.wait("the counter", lambda: "lost its pod once" in here.condition("Progressing")[2])
    train = here.stage(TRAIN)
    assert (train["disruptions"], train["lostPod"]) == (1, pod["metadata"]["name"])
    assert train.get("failures", 0) == 0


def test_a_spec_that_the_server_cannot_make_pods_of_fails_with_its_words(here: Namespace) -> None:
    here.apply(stages={"prepare": {"resources": {"limits": {"cpu": "lots"}}}})
    here.wait_phase("Failed")
    _, reason, message = here.condition("Ready")
    assert reason == "InvalidSpec"
    assert "quantit" in message.lower()
    assert here.jobs() == []


@pytest.mark.usefixtures("older_definition")
def test_a_field_that_an_older_definition_lets_through_is_explained(here: Namespace) -> None:
    here.apply(training={"epochs": 0})
    here.wait_phase("Failed")
    _, reason, message = here.condition("Ready")
    assert reason == "InvalidSpec"
    assert "spec.training.epochs" in message
    here.apply(training={"epochs": 1})
    here.wait_phase("Preparing")
