"""Pods that a training loses, by the real scheduler and controllers, and what its user is told.

What takes long happens in the background, while the other tests run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from finetune_trainer.contract import Stage
from hack.kwok import stages
from hack.kwok.cluster import KwokCluster
from hack.operator_process import Operator
from tests.integration.kwok.conftest import NODE
from tests.integration.operator.stage import Namespace, Raw

TRAIN = Stage.TRAIN
OLD = timedelta(seconds=32)  # by then a Job without a pod would be trouble
TTL_SECONDS = 60  # the shortest
FINALIZER = "batch.kubernetes.io/job-tracking"


def pods(here: Namespace) -> list[Raw]:
    """The pods of the training."""
    found = here.children("pods")
    return [each for each in found if each["metadata"]["labels"]["finetune.dev/stage"] == TRAIN]


def running(here: Namespace) -> Raw | None:
    """The pod of the training that runs and isn't being deleted."""
    for pod in pods(here):
        if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]:
            return pod
    return None


def degraded_since(here: Namespace) -> tuple[str, str]:
    """Status of the condition, and since when: it moves whenever the status changes."""
    for each in here.status()["conditions"]:
        if each["type"] == "Degraded":
            return each["status"], each["lastTransitionTime"]
    return "", ""


@dataclass
class Training:
    """A training whose pod runs until somebody takes it away."""

    here: Namespace
    pod: Raw
    degraded: tuple[str, str]

    @property
    def name(self) -> str:
        return str(self.pod["metadata"]["name"])

    @property
    def node(self) -> str:
        return str(self.pod["spec"]["nodeName"])

    @property
    def job(self) -> Raw:
        """Its newest Job."""
        jobs = [
            each for each in self.here.children("jobs") if "-train-" in each["metadata"]["name"]
        ]
        return max(jobs, key=lambda job: int(job["metadata"]["labels"]["finetune.dev/attempt"]))

    def kubectl(self, *command: str, **more: Any) -> str:
        return self.here.plane.kubectl(*command, "-n", self.here.name, **more)

    def delete(self, *how: str) -> None:
        """Delete its pod."""
        self.kubectl("delete", "pod", self.name, "--wait=false", *how)

    def suspend(self, *, yes: bool) -> None:
        """Suspend its Job, as a queue does, or let it go on."""
        patch = json.dumps({"spec": {"suspend": yes}})
        self.kubectl("patch", "job", self.job["metadata"]["name"], "-p", patch)

    def replaced(self) -> Raw:
        """The pod that took its place. At no moment do two of them work."""

        def another() -> Raw | None:
            found = pods(self.here)
            at_work = [each for each in found if each["status"]["phase"] == "Running"]
            assert len(at_work) <= 1
            pod = running(self.here)
            return pod if pod and pod["metadata"]["uid"] != self.pod["metadata"]["uid"] else None

        found: Raw = self.here.wait("another pod", another)
        return found

    def waits_for_a_node(self, why: str) -> None:
        """The scheduler's word is handed on, and it is no trouble."""
        here = self.here
        here.wait("the scheduler", lambda: here.condition("Progressing")[1] == "Unschedulable")
        assert why in here.condition("Progressing")[2]
        assert here.status()["phase"] == "Queued"
        assert degraded_since(here) == self.degraded

    def told(self) -> str:
        """What the event about the lost pod says; there is one."""

        def events() -> list[Raw]:
            found = self.here.whole_events()
            return [each for each in found if each["reason"] == "PodDisrupted"]

        [event] = self.here.wait("the event", events)
        return str(event["message"])


Start = Callable[..., Namespace]

GPU = {"nvidia.com/gpu": 1}
# What takes long: FineTuneJobs by name, with how their pods behave.
GIVEN: dict[str, Raw] = {
    "on-lost-node": {"stop_for": "1h"},
    "without-job": {"stop_for": "1h"},
    "on-deleted-node": {"node": "gone"},
    "on-tainted-node": {"node": "tainted"},
    "preempted": {"node": "small", "resources": {"limits": GPU}},
    "by-hand": {"stop_for": "3s"},
    "suspended": {},
    "evicted": {"stop_for": "3s"},
}


@pytest.fixture(scope="module")
def start(kwok_cluster: KwokCluster, operator: Operator) -> Iterator[Start]:
    """Starts a FineTuneJob in a namespace of its own; its training goes on until told to stop."""
    operator.ready()
    opened: list[Namespace] = []

    def begin(
        name: str,
        *,
        stop_for: str = "1s",
        node: str = NODE,
        resources: Raw | None = None,
        **spec: Any,
    ) -> Namespace:
        kwok_cluster.plane.kubectl("create", "namespace", name)
        here = Namespace(kwok_cluster.plane, name)
        opened.append(here)
        notes = {stages.RUN_FOR: "1h", stages.STOP_FOR: stop_for}
        train = {"annotations": notes, "resources": resources or {}, **on(node)}
        here.apply(**{"stages": {"train": train}, "backoffLimit": 0, **spec})
        return here

    yield begin
    for here in opened:
        here.close()
        kwok_cluster.plane.kubectl("delete", "namespace", here.name, "--wait=false")


def on(node: str) -> Raw:
    return {"nodeSelector": {"kubernetes.io/hostname": node}}


def training(here: Namespace) -> Training:
    """The training, as soon as it runs."""
    pod = here.wait("a running training", partial(running, here))
    here.wait_phase("Training")
    return Training(here, pod, degraded_since(here))


URGENT = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "urgent"},
    "spec": {
        "priorityClassName": "urgent",
        "containers": [{"name": "x", "image": "x", "resources": {"limits": GPU}}],
        **on("small"),
    },
}


@pytest.fixture(scope="module")
def trainings(start: Start, kwok_cluster: KwokCluster) -> dict[str, Training]:
    """Those to which something has happened that takes long."""
    for name in ("gone", "tainted", "small"):
        kwok_cluster.add_node(name, gpus=1)
    begun = {name: start(name, **given) for name, given in GIVEN.items()}
    made = {name: training(here) for name, here in begun.items()}
    admin = kwok_cluster.plane.kubectl
    admin("delete", "node", "gone")  # the pod garbage collector finds out within a minute
    admin("taint", "node", "tainted", "finetune.test/broken=yes:NoExecute")
    admin("create", "priorityclass", "urgent", "--value=1000")
    admin("create", "-f", "-", "-n", "preempted", input=json.dumps(URGENT))
    made["by-hand"].delete()
    made["suspended"].suspend(yes=True)
    without = made["without-job"]
    without.kubectl("delete", "job", without.job["metadata"]["name"])
    without.here.wait("the pod to be deleted", lambda: running(without.here) is None)
    for each in (without, made["on-lost-node"]):
        each.delete("--grace-period=1")  # nobody hears from its node
    return made


@pytest.fixture(scope="module")
def denied(start: Start) -> Namespace:
    """A quota admits none of its pods, which only the Job controller is told."""
    here = start("denied", stages={}, suspend=True)
    here.plane.kubectl("create", "quota", "no-pods", "--hard=pods=0", "-n", here.name)
    found = ("get", "quota", "no-pods", "-n", here.name, "-o", "jsonpath={.status.hard}")
    here.wait("the quota", lambda: here.plane.kubectl(*found))
    here.apply()
    return here


@pytest.fixture(scope="module")
def expiring(start: Start) -> Namespace:
    """Its Jobs go when they have ended, and their time is over."""
    return start("expiring", stages={}, ttlSecondsAfterFinished=0)


@pytest.fixture(scope="module", autouse=True)
def _in_the_background(
    denied: Namespace, expiring: Namespace, trainings: dict[str, Training]
) -> None:
    """Begin what takes long before the first test."""


# What is quick


def test_the_job_controller_keeps_to_the_policies(start: Start) -> None:
    made = training(start("by-policy"))
    job = made.job
    assert job["spec"]["podReplacementPolicy"] == "Failed"
    assert FINALIZER in made.pod["metadata"]["finalizers"]
    note = {"metadata": {"annotations": {stages.EXIT_NOW: "12"}}}
    made.here.merge_patch(f"/api/v1/namespaces/{made.here.name}/pods/{made.name}", note)
    made.here.wait_phase("Failed")
    assert made.here.condition("Degraded")[1] == "OutOfGPUMemory"

    def failed() -> Raw | None:
        conditions = made.job["status"].get("conditions") or []
        return next((each for each in conditions if each["type"] == "Failed"), None)

    assert made.here.wait("the Job's end", failed)["reason"] == "PodFailurePolicy"
    assert "exit code 12" in failed()["message"]  # type: ignore[index]
    made.here.delete()
    made.here.wait_until_nothing_is_left()  # no finalizer holds a pod


def woken(here: Namespace) -> bool:
    notes = [job["metadata"]["annotations"] for job in here.children("jobs")]
    return any("finetune.dev/woken-at" in each for each in notes)


def costs_nothing(made: Training) -> None:
    """The Job itself has replaced the pod, and nothing was wrong meanwhile."""
    train = made.here.stage(TRAIN)
    assert (train["attempt"], train["failures"], train["disruptions"]) == (1, 0, 1)
    assert train["lostPod"] == made.name
    assert made.job["status"].get("failed", 0) == 0
    hint = "train is at work, attempt 1. It lost its pod once."
    made.here.wait("the counter", lambda: made.here.condition("Progressing")[2] == hint)
    assert degraded_since(made.here) == made.degraded


def test_a_busy_job_controller_is_no_trouble(here: Namespace) -> None:
    """It makes 20 requests a second, for five Jobs at a time: seven others keep it busy for longer
    than a Job may be without a pod."""
    pod = {
        "restartPolicy": "Never",
        "schedulerName": "nobody",
        "containers": [{"name": "x", "image": "x"}],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "other-"},
        "spec": {"parallelism": 240, "template": {"spec": pod}},
    }
    here.create("/apis/batch/v1", "jobs", job, times=7)
    here.apply()
    here.wait("its place in the queue", lambda: here.condition("Progressing")[1] == "Queued")
    assert "is in the queue of the Job controller" in here.condition("Progressing")[2]
    assert here.status()["phase"] == "Queued"
    since = degraded_since(here)
    assert since[0] == "False"
    here.wait_phase("Succeeded", seconds=300)  # each stage waits for its place
    assert degraded_since(here) == since


# What has taken long


def test_an_eviction_by_the_api_is_told_and_replaced(trainings: dict[str, Training]) -> None:
    made = trainings["evicted"]
    begun = datetime.fromisoformat(made.job["status"]["startTime"])
    made.here.wait("the Job to be old", lambda: datetime.now(UTC) > begun + OLD)
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": made.name, "namespace": made.here.name},
    }
    path = f"/api/v1/namespaces/{made.here.name}/pods/{made.name}"
    made.kubectl("create", "--raw", f"{path}/eviction", "-f", "-", input=json.dumps(eviction))
    made.replaced()
    assert "EvictionByEvictionAPI" in made.told()
    costs_nothing(made)


def test_a_pod_evicted_by_a_taint_is_told_and_waits_for_a_node(
    trainings: dict[str, Training],
) -> None:
    made = trainings["on-tainted-node"]
    assert "DeletionByTaintManager" in made.told()
    made.waits_for_a_node("untolerated taint")
    made.kubectl("taint", "node", "tainted", "finetune.test/broken-")
    made.replaced()
    costs_nothing(made)


def test_a_preempted_training_is_told_and_waits_for_a_node(trainings: dict[str, Training]) -> None:
    made = trainings["preempted"]
    assert "PreemptionByScheduler" in made.told()
    made.waits_for_a_node("Insufficient nvidia.com/gpu")
    made.kubectl("delete", "pod", "urgent", "--grace-period=0", "--force")
    made.replaced()
    costs_nothing(made)


def test_a_pod_of_a_deleted_node_is_told_and_waits_for_a_node(
    trainings: dict[str, Training],
) -> None:
    made = trainings["on-deleted-node"]
    assert "DeletionByPodGC" in made.told()
    made.waits_for_a_node("didn't match Pod's node affinity/selector")
    assert (made.here.stage(TRAIN)["attempt"], made.here.stage(TRAIN)["failures"]) == (1, 0)


def test_a_pod_deleted_by_hand_is_told_and_another_attempt_starts(
    trainings: dict[str, Training],
) -> None:
    made = trainings["by-hand"]
    words = "The pod of train was disrupted (the pod was deleted). Stopped when told to."
    assert made.told() == words
    assert made.replaced()["metadata"]["labels"]["finetune.dev/attempt"] == "2"
    assert made.told() == words  # still the only one
    assert made.here.stage(TRAIN)["disruptions"] == 1
    assert made.here.stage(TRAIN)["failures"] == 0


def test_a_suspended_job_is_no_trouble_and_goes_on(trainings: dict[str, Training]) -> None:
    made = trainings["suspended"]
    status, reason, message = made.here.condition("Progressing")
    assert (status, reason) == ("True", "JobSuspended")
    assert made.here.status()["phase"] == "Queued"
    assert made.job["metadata"]["name"] in message
    assert degraded_since(made.here) == made.degraded
    made.suspend(yes=False)
    made.replaced()
    costs_nothing(made)


def test_a_pod_that_cannot_be_created_is_told_with_the_reason(denied: Namespace) -> None:
    denied.wait("Degraded", lambda: denied.condition("Degraded")[1] == "PodNotCreated")
    assert "exceeded quota: no-pods" in denied.condition("Degraded")[2]
    denied.wait("the Job controller to be woken", lambda: woken(denied))
    denied.plane.kubectl("delete", "quota", "no-pods", "-n", denied.name)
    # The Job controller waits before it tries again, and longer each time, unless the Job changes.
    denied.wait_phase("Succeeded")
    assert denied.condition("Degraded")[0] == "False"


def test_a_pod_on_a_lost_node_is_told_and_given_up_when_deleted_by_force(
    trainings: dict[str, Training],
) -> None:
    made = trainings["on-lost-node"]
    lost(made)
    assert made.job["status"]["terminating"] == 1
    train = made.here.stage(TRAIN)
    assert (train["attempt"], train["disruptions"]) == (1, 1)
    made.delete("--grace-period=0", "--force")
    following(made, attempt=2)
    train = made.here.stage(TRAIN)
    assert (train["failures"], train["disruptions"]) == (0, 1)


def test_so_is_one_whose_job_is_gone(trainings: dict[str, Training]) -> None:
    made = trainings["without-job"]
    lost(made)
    assert made.here.jobs() == [("prepare", 1)]
    made.delete("--grace-period=0", "--force")
    following(made, attempt=1)


def lost(made: Training) -> None:
    """Nobody knows whether its pod still writes, so no other one is started."""
    here = made.here
    here.wait("NodeLost", lambda: here.condition("Degraded")[1] == "NodeLost")
    status, _, message = here.condition("Degraded")
    assert status == "True"
    assert made.name in message
    assert made.node in message
    assert here.events().count(("Warning", "NodeLost")) == 1
    assert [each["metadata"]["name"] for each in pods(here)] == [made.name]


def following(made: Training, attempt: int) -> None:
    pod = made.here.wait("another pod", partial(running, made.here))
    assert pod["metadata"]["labels"]["finetune.dev/attempt"] == str(attempt)
    assert pod["metadata"]["uid"] != made.pod["metadata"]["uid"]
    made.here.wait("no trouble", lambda: made.here.condition("Degraded")[0] == "False")


def test_jobs_go_after_their_time_and_nothing_starts_again(expiring: Namespace) -> None:
    before = expiring.wait_phase("Succeeded")
    expiring.wait("the Jobs to go", lambda: not expiring.children("jobs"), TTL_SECONDS + 30)
    expiring.wait("their pods to go", lambda: not expiring.children("pods"))
    expiring.apply(name="another")  # when this one is at work, the first one has been looked at
    expiring.wait("the other one", lambda: expiring.children("jobs"))
    names = {job["metadata"]["ownerReferences"][0]["name"] for job in expiring.children("jobs")}
    assert names == {"another"}
    assert expiring.status() == before
