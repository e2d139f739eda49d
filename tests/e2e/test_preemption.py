"""Kueue's real controller takes a training off a real node, and the training loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hack.cluster.native import NativeCluster
from hack.demo.environment import NAMESPACE, Environment
from hack.demo.follow import poll, ready_message, stage_of
from hack.demo.models import version_folder
from hack.kueue import Kueue
from hack.process import wait_until
from tests.e2e.jobs import Job, apply, checkpoints, pods_of, stage_of_pod, steps_of, wait
from tests.fixtures import start_or_leave_out

QUEUE, HELD_QUEUE = "team", "team-held"
ROUTINE, URGENT = "routine", "urgent"
ROWS, BATCH, EPOCHS = 28, 4, 80
STEPS = ROWS // BATCH * EPOCHS

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def kueue(
    request: pytest.FixtureRequest,
    environment: Environment,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Kueue]:
    """Kueue beside the node."""
    if not isinstance(environment.cluster, NativeCluster):
        pytest.skip("Kueue runs beside the native node: FINETUNE_CLUSTER=native")
    plane = environment.cluster.plane
    started: list[Kueue] = []

    def start() -> None:
        started.append(Kueue(plane, folder))
        started[0].start()

    folder: Path = tmp_path_factory.mktemp("kueue")
    start_or_leave_out(request.config, "Kueue", start)
    yield started[0]
    started[0].stop()


def apply_to(environment: Environment, queue: str, name: str, model: str, **train: Any) -> None:
    """Apply a FineTuneJob; two of its trainings would be more than one CPU."""
    apply(
        environment,
        name,
        training={
            "epochs": EPOCHS,
            "batchSize": BATCH,
            "checkpointSteps": 20,
            "loggingSteps": 1,
            "learningRate": 1e-2,
        },
        model={"source": model},
        queueName=queue,
        stages={"train": {"resources": {"requests": {"cpu": "600m"}}, **train}},
        export={"merged": False, "gguf": []},
    )


def condition(job: Job, kind: str) -> Job:
    conditions = job.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == kind), {})


def trains(job: Job, state: str) -> bool:
    """Whether the training is in that state of Kueue's queue, or at work."""
    return bool(
        condition(job, "Progressing").get("reason") == state
        and condition(job, "Progressing")["message"].startswith("train ")
    )


def adapter(environment: Environment, job: Job) -> bytes:
    """The tuned weights that the job has published."""
    bucket, _, folder = version_folder(job).removeprefix("s3://").partition("/")
    key = f"{folder}/adapter/adapter_model.safetensors"
    return environment.store.client().get_object(Bucket=bucket, Key=key)["Body"].read()


def test_a_preempted_training_goes_on_from_its_checkpoint_and_ends_bit_for_bit_the_same(
    environment: Environment, kueue: Kueue, one_layer: str
) -> None:
    urgent = {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": URGENT},
        "value": 1000,
    }
    environment.kubectl("apply", "-f", "-", input=json.dumps(urgent))
    kueue.add_queue(QUEUE, NAMESPACE, cpus=0)
    kueue.share_queue(QUEUE, of=NAMESPACE, namespace=NAMESPACE, alias=HELD_QUEUE)
    apply_to(environment, QUEUE, ROUTINE, one_layer)
    apply_to(environment, HELD_QUEUE, URGENT, one_layer, priorityClassName=URGENT)
    routine, other = environment.reader(ROUTINE), environment.reader(URGENT)
    for read in (routine, other):
        wait(read, "the queue", lambda job: trains(job, "Queued"), 300)

    # The urgent one is held until the other has a checkpoint: then it takes all that there is.
    kueue.hold(HELD_QUEUE, NAMESPACE, held=True)
    kueue.add_queue(QUEUE, NAMESPACE, cpus=1)
    saves = partial(checkpoints, environment, ROUTINE)
    wait_until(lambda: bool(saves()), what="a checkpoint", seconds=300, interval=0.2)
    first = min(saves())
    kueue.hold(HELD_QUEUE, NAMESPACE, held=False)
    preempted = wait(routine, "the preemption", lambda job: trains(job, "Preempted"), 120)
    assert preempted["status"]["phase"] == "Queued"
    saved = max(saves())
    assert first <= saved < STEPS, "in the middle of the training"

    *_, straight = poll(other, 600)
    assert straight["status"]["phase"] == "Succeeded", ready_message(straight)
    *_, resumed = poll(routine, 600)
    assert resumed["status"]["phase"] == "Succeeded", ready_message(resumed)
    (pod,) = [each for each in pods_of(environment, ROUTINE) if stage_of_pod(each) == "train"]
    assert steps_of(environment, pod["metadata"]["name"])[0] == saved + 1
    assert [n["step"] for n in resumed["status"]["notices"] if n["code"] == "Resumed"] == [saved]
    train = stage_of(resumed, "train")
    assert (train["attempt"], train["failures"], train.get("disruptions", 0)) == (1, 0, 0)
    assert "Resumed" not in [n["code"] for n in straight["status"].get("notices", [])]
    assert adapter(environment, resumed) == adapter(environment, straight)
