"""Kueue's real controller takes a training off a real node, and the training loses nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.cluster.native import NativeCluster
from hack.demo.environment import EXAMPLE, NAMESPACE, Environment
from hack.demo.follow import poll, ready_message, stage_of
from hack.demo.models import version_folder
from hack.kueue import Kueue
from hack.process import Unavailable
from tests.e2e.test_resuming import checkpoints, pods_of, stage_of_pod, steps_of, wait
from tests.fixtures import start_or_leave_out

QUEUE, HELD_QUEUE = "team", "team-held"
ROUTINE, URGENT = "routine", "urgent"
ROWS, BATCH, EPOCHS = 28, 4, 80
STEPS = ROWS // BATCH * EPOCHS

pytestmark = pytest.mark.timeout(1800)

Job = dict[str, Any]


@pytest.fixture(scope="module")
def kueue(
    request: pytest.FixtureRequest,
    environment: Environment,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Kueue]:
    """Kueue beside the node."""
    started: list[Kueue] = []

    def start() -> None:
        if not isinstance(environment.cluster, NativeCluster):
            raise Unavailable("it runs beside the native node; set FINETUNE_CLUSTER=native")
        started.append(Kueue(environment.cluster.plane, folder))
        started[0].start()

    folder: Path = tmp_path_factory.mktemp("kueue")
    start_or_leave_out(request.config, "Kueue", start)
    yield started[0]
    started[0].stop()


def apply(environment: Environment, model: str, name: str, queue: str, priority: str = "") -> None:
    """Apply the FineTuneJob by a name of its own; two trainings would be more than one CPU."""
    train: Job = {"resources": {"requests": {"cpu": "600m"}}}
    job = yaml.safe_load(EXAMPLE.read_text())
    job["metadata"]["name"] = name
    job["spec"] |= {
        "model": {"source": model},
        "queueName": queue,
        "stages": {"train": train | ({"priorityClassName": priority} if priority else {})},
        "export": {"merged": False, "gguf": []},
        "output": {"uri": f"s3://artifacts/{name}"},
    }
    job["spec"]["training"] |= {
        "epochs": EPOCHS,
        "batchSize": BATCH,
        "checkpointSteps": 20,
        "loggingSteps": 1,
        "learningRate": 1e-2,
    }
    environment.kubectl("apply", "-f", "-", input=json.dumps(job))


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
    apply(environment, one_layer, ROUTINE, QUEUE)
    apply(environment, one_layer, URGENT, HELD_QUEUE, priority=URGENT)
    routine, other = environment.reader(ROUTINE), environment.reader(URGENT)
    for read in (routine, other):
        wait(read, "the queue", lambda job: trains(job, "Queued"), 300)

    # The urgent one is held until the other has a checkpoint: then it takes all that there is.
    kueue.hold(HELD_QUEUE, NAMESPACE, held=True)
    kueue.add_queue(QUEUE, NAMESPACE, cpus=1)
    deadline = time.monotonic() + 300
    while not (held := checkpoints(environment, ROUTINE)):
        assert time.monotonic() < deadline, routine().get("status")
        time.sleep(0.2)
    kueue.hold(HELD_QUEUE, NAMESPACE, held=False)
    preempted = wait(routine, "the preemption", lambda job: trains(job, "Preempted"), 120)
    assert preempted["status"]["phase"] == "Queued"
    saved = max(checkpoints(environment, ROUTINE))
    assert max(held) <= saved < STEPS, "in the middle of the training"

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
