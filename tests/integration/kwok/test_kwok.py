"""What the fake nodes play: the trainer's results, its failures, and its time to stop."""

from __future__ import annotations

import pytest

from benchmarks.operator import requests
from finetune_trainer.contract import Stage
from hack.kwok import cluster, stages
from hack.operator_process import Operator
from hack.process import Unavailable
from tests.integration.operator.stage import Namespace

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT


def test_a_finetunejob_runs_through_its_stages(here: Namespace) -> None:
    here.apply()
    status = here.wait_phase("Succeeded")
    assert here.jobs() == [("prepare", 1), ("train", 1), ("export", 1)]
    assert status["resolved"]["fingerprints"]["train"] == "train-a"
    assert status["version"] == stages.VERSION


def test_an_attempt_fails_as_its_annotation_says(here: Namespace) -> None:
    failing = {f"{stages.EXIT_CODE}-1": "1"}
    here.apply(stages={"prepare": {"annotations": failing}}, backoffLimit=1)
    here.wait_phase("Succeeded")
    assert here.jobs() == [("prepare", 1), ("prepare", 2), ("train", 1), ("export", 1)]
    assert here.stage(PREPARE)["failures"] == 1


def test_a_running_pod_exits_when_told_to(here: Namespace) -> None:
    here.apply(stages={"train": {"annotations": {stages.RUN_FOR: "1h"}}}, backoffLimit=0)
    pod = here.wait("a running training", lambda: running(here, TRAIN))
    path = f"/api/v1/namespaces/{here.name}/pods/{pod}"
    here.merge_patch(path, {"metadata": {"annotations": {stages.EXIT_NOW: "12"}}})
    here.wait_phase("Failed")
    assert here.condition("Degraded")[1] == "OutOfGPUMemory"


def test_a_deleted_pod_stays_until_its_trainer_has_stopped(here: Namespace) -> None:
    slow = {stages.RUN_FOR: "3s", stages.STOP_FOR: "2s"}
    here.apply(stages={"train": {"annotations": slow}})
    name = here.wait("a running training", lambda: running(here, TRAIN))
    here.plane.kubectl("delete", "pod", name, "-n", here.name, "--wait=false")
    [pod] = [each for each in here.children("pods") if each["metadata"]["name"] == name]
    assert "deletionTimestamp" in pod["metadata"]
    assert "running" in pod["status"]["containerStatuses"][0]["state"]
    here.wait_phase("Succeeded")
    assert here.stage(TRAIN)["disruptions"] == 1
    assert here.stage(TRAIN)["failures"] == 0


def test_a_machine_without_kwok_is_told_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.VARIABLE, "no-such-program")
    with pytest.raises(Unavailable, match="go install"):
        cluster.program()


def running(here: Namespace, stage: Stage) -> str | None:
    """The name of the running pod of a stage."""
    for pod in here.children("pods"):
        mine = pod["metadata"]["labels"]["finetune.dev/stage"] == str(stage)
        if mine and pod["status"]["phase"] == "Running":
            return str(pod["metadata"]["name"])
    return None


def test_a_life_costs_so_many_writes_and_no_more(here: Namespace, operator: Operator) -> None:
    """Whoever makes it more has to say here what for. The others of its requests are few, too."""
    before = requests(operator)
    here.apply()
    here.wait_phase("Succeeded")
    here.wait("what the stages needed is gone", lambda: not here.children("configmaps"))
    here.wait("all is told", lambda: len(here.events()) == 7)
    after = requests(operator)
    found = {verb: int(count - before.get(verb, 0)) for verb, count in after.items()}
    # Three Jobs, each asked for beforehand, since no such Job was admitted here lately; a
    # ServiceAccount, a Role and a RoleBinding for all; a ConfigMap until the spec is resolved and
    # one from then on; seven Events.
    assert found["POST"] <= 3 + 3 + 3 + 2 + 7
    assert found["DELETE"] <= 3 + 2
    # The status as each stage begins, runs and ends, some of them in one. PUT renews the lease.
    assert found["PATCH"] <= 9
    assert found["GET"] <= 6
