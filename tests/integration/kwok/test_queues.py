"""Kueue's real controller: quota, preemption, and queues that are not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_trainer.contract import Stage
from hack.kueue import Kueue
from hack.kwok import stages
from hack.kwok.cluster import KwokCluster
from hack.operator_process import Operator
from tests.fixtures import start_or_leave_out
from tests.integration.operator.stage import Namespace, Raw, new_namespace

TRAIN = Stage.TRAIN
QUEUE = "team-a"
URGENT = "urgent"
GPU = {"limits": {"nvidia.com/gpu": 1}}


@pytest.fixture(scope="module")
def kueue(
    request: pytest.FixtureRequest,
    kwok_cluster: KwokCluster,
    operator: Operator,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Kueue]:
    """Kueue beside the operator."""
    operator.ready()
    controller = Kueue(kwok_cluster.plane, tmp_path_factory.mktemp("kueue"))
    start_or_leave_out(request.config, "Kueue", controller.start)
    urgent = {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": URGENT},
        "value": 1000,
    }
    kwok_cluster.plane.kubectl("apply", "-f", "-", input=json.dumps(urgent))
    yield controller
    controller.stop()


@pytest.fixture
def other(kwok_cluster: KwokCluster) -> Iterator[Namespace]:
    """A second namespace of the same team."""
    with new_namespace(kwok_cluster.plane) as namespace:
        yield namespace


def train(here: Namespace, *, priority: str = "", queue: str = QUEUE) -> None:
    """Apply a FineTuneJob that trains on one GPU until it is told to end."""
    settings: Raw = {"resources": GPU, "annotations": {stages.RUN_FOR: "1h"}}
    if priority:
        settings["priorityClassName"] = priority
    here.apply(stages={"train": settings}, queueName=queue, backoffLimit=0)


def end_training(here: Namespace) -> None:
    """Let its pod end well."""
    pod = its_pod(here)
    name, note = pod["metadata"]["name"], f"{stages.EXIT_NOW}=0"
    here.plane.kubectl("annotate", "pod", name, note, "-n", here.name)


def at_work(here: Namespace) -> list[Raw]:
    """The pods of the training that run."""
    pods = [each for each in here.children("pods") if each["status"]["phase"] == "Running"]
    return [each for each in pods if each["metadata"]["labels"]["finetune.dev/stage"] == TRAIN]


def its_pod(here: Namespace) -> Raw:
    """The one pod of the training, once it runs."""
    [pod] = here.wait("a pod at work", lambda: at_work(here))
    found: Raw = pod
    return found


def progressing(here: Namespace, reason: str) -> Any:
    """What the condition says of train or export, for this reason and in Kueue's words."""

    def words() -> str:
        _, why, message = here.condition("Progressing")
        told = f" waits in Kueue's queue {QUEUE}: " in message and "prepare" not in message
        return message if why == reason and told else ""

    return here.wait(reason, words)


def test_of_two_with_quota_for_one_the_second_waits(
    kueue: Kueue, here: Namespace, other: Namespace
) -> None:
    kueue.add_queue(QUEUE, here.name, gpus=1)
    kueue.share_queue(QUEUE, of=here.name, namespace=other.name)
    train(here)
    here.wait_phase("Training")
    train(other)
    words = progressing(other, "Queued")
    assert words.startswith(f"train waits in Kueue's queue {QUEUE}: couldn't assign flavors")
    assert "insufficient unused quota for nvidia.com/gpu" in words
    assert other.status()["phase"] == "Queued"
    assert other.condition("Degraded")[0] == "False"
    assert at_work(other) == []
    end_training(here)
    here.wait_phase("Succeeded")
    other.wait_phase("Training")


def test_a_training_makes_room_for_a_more_urgent_one_and_goes_on(
    kueue: Kueue, here: Namespace, other: Namespace
) -> None:
    kueue.add_queue(QUEUE, here.name, gpus=1)
    kueue.share_queue(QUEUE, of=here.name, namespace=other.name)
    train(here)
    here.wait_phase("Training")
    first = its_pod(here)
    train(other, priority=URGENT)
    other.wait_phase("Training")
    here.wait("the pod's end", lambda: at_work(here) == [])
    assert progressing(here, "Preempted").startswith(
        f"train waits in Kueue's queue {QUEUE}: Preempted to accommodate a workload"
    )
    assert here.status()["phase"] == "Queued"
    here.wait("the event", lambda: ("Normal", "Preempted") in here.events())
    assert here.condition("Degraded")[0] == "False"
    end_training(other)
    other.wait_phase("Succeeded")
    here.wait_phase("Training")
    second = its_pod(here)
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    stage = here.stage(TRAIN)
    assert (stage["attempt"], stage["failures"], stage.get("disruptions", 0)) == (1, 0, 0)
    assert "PodDisrupted" not in [reason for _, reason in here.events()]
    end_training(here)
    here.wait_phase("Succeeded")


def test_a_queue_that_is_not_there_is_told_and_waited_for(kueue: Kueue, here: Namespace) -> None:
    train(here)
    here.wait("the condition", lambda: here.condition("Degraded")[1] == "Inadmissible")
    words = here.condition("Degraded")[2]
    assert f"LocalQueue {QUEUE} doesn't exist" in words
    assert "spec.queueName" in words
    assert here.status()["phase"] == "Queued"
    kueue.add_queue(QUEUE, here.name, gpus=1)
    here.wait_phase("Training")
    assert here.condition("Degraded")[0] == "False"


def test_a_training_goes_on_when_its_queue_is_deleted(kueue: Kueue, here: Namespace) -> None:
    kueue.add_queue(QUEUE, here.name, gpus=1)
    train(here)
    here.wait_phase("Training")
    its_pod(here)
    kueue.delete_queue(QUEUE, here.name)
    end_training(here)
    # What it admitted runs on; what comes next waits for the queue to be there again.
    progressing(here, "Inadmissible")
    assert here.stage(TRAIN)["state"] == "Succeeded"
    assert here.stage(TRAIN)["attempt"] == 1
    kueue.add_queue(QUEUE, here.name, gpus=1)
    here.wait_phase("Succeeded")


def test_without_a_queue_nothing_waits(kueue: Kueue, here: Namespace) -> None:
    kueue.add_queue(QUEUE, here.name, gpus=0)
    here.apply(stages={"train": {"resources": GPU}})
    here.wait_phase("Succeeded")
