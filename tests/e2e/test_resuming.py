"""A real training loses its pod, is suspended, and goes on; new data is trained on request."""

from __future__ import annotations

import json
import time

import pytest

from hack.demo.environment import DATASETS, Environment
from hack.demo.follow import poll, ready_message, stage_of
from tests.e2e.jobs import Job, apply, checkpoints, pods_of, stage_of_pod, steps_of, wait

NAME = "converging"
KEY = "converging.csv"
ROWS = 24
RETRY = "finetune.dev/retry-requested-at"

pytestmark = pytest.mark.timeout(3600)


def put_rows(environment: Environment, count: int) -> None:
    """The first rows of the sample, under one key."""
    lines = DATASETS[0].read_text(encoding="utf-8").splitlines(keepends=True)
    body = "".join(lines[: count + 1])  # and the header
    environment.store.client().put_object(Bucket="datasets", Key=KEY, Body=body.encode())


def step(job: Job) -> int:
    progress = job.get("status", {}).get("progress", {})
    return int(progress.get("step") or 0) if progress.get("stage") == "train" else 0


def pod_at_work(environment: Environment) -> str | None:
    """The name of the training's pod that runs."""
    for pod in pods_of(environment, NAME):
        running = pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        if running and stage_of_pod(pod) == "train":
            return str(pod["metadata"]["name"])
    return None


def first_steps(environment: Environment, seconds: float) -> list[int]:
    """What the training's pod has trained as soon as it has trained a step."""
    deadline = time.monotonic() + seconds
    while True:
        pod = pod_at_work(environment)
        if pod and (steps := steps_of(environment, pod)):
            return steps
        assert time.monotonic() < deadline, environment.get("finetunejob", NAME).get("status")
        time.sleep(0.5)


def events(environment: Environment) -> list[Job]:
    """The events about this job."""
    found = environment.items("events")
    return [each for each in found if each["involvedObject"]["name"] == NAME]


def set_suspend(environment: Environment, value: bool) -> None:
    patch = json.dumps({"spec": {"suspend": value}})
    environment.kubectl("patch", "ftj", NAME, "--type=merge", "-p", patch)


def test_a_training_that_loses_its_pod_and_is_suspended_goes_on_from_its_last_step(
    environment: Environment,
) -> None:
    put_rows(environment, ROWS)
    apply(
        environment,
        NAME,
        training={"epochs": 5, "checkpointSteps": 4, "loggingSteps": 1},
        dataset={"source": f"s3://datasets/{KEY}"},
        export={"merged": False, "gguf": []},
    )
    read = environment.reader(NAME)
    before = step(wait(read, "a step", lambda job: step(job) > 4, 600))

    lost = pod_at_work(environment)
    assert lost
    environment.kubectl("delete", "pod", lost)
    found = first_steps(environment, 300)
    assert found[0] > before, "the step that ran was saved, and no step was trained twice"

    set_suspend(environment, True)
    condition = "--for=condition=Suspended"
    environment.kubectl("wait", condition, f"ftj/{NAME}", "--timeout=150s")
    assert read()["status"]["phase"] == "Suspended"
    assert [stage_of_pod(pod) for pod in pods_of(environment, NAME)] == ["prepare"]
    saved = max(checkpoints(environment, NAME))
    assert saved >= found[-1], "the step that ran was saved in the grace period"

    set_suspend(environment, False)
    wait(read, "the training", lambda job: job["status"]["phase"] == "Training", 120)
    *_, ended = poll(read, 900)
    assert ended["status"]["phase"] == "Succeeded", ready_message(ended)
    resumed = [n["step"] for n in ended["status"]["notices"] if n["code"] == "Resumed"]
    assert sorted(resumed) == [found[0] - 1, saved]
    train = stage_of(ended, "train")
    assert (train["attempt"], train["failures"], train["disruptions"]) == (3, 0, 1)
    (name,) = [
        pod["metadata"]["name"]
        for pod in pods_of(environment, NAME)
        if stage_of_pod(pod) == "train"
    ]
    assert steps_of(environment, name)[0] == saved + 1, "no step was trained twice"
    told = events(environment)
    assert "Suspended" in [each["reason"] for each in told]
    told_resumed = [each["message"] for each in told if each["reason"] == "Resumed"]
    for each in resumed:  # the end of the suspension is an event of this reason, too
        end = f"Going on from step {each}."
        assert sum(message.endswith(end) for message in told_resumed) == 1


def test_a_new_csv_under_the_same_key_is_trained_on_request(environment: Environment) -> None:
    read = environment.reader(NAME)
    before = read()
    put_rows(environment, ROWS - 8)
    environment.kubectl("annotate", "ftj", NAME, "--overwrite", f"{RETRY}=monday")
    wait(
        read,
        "the request to be met",
        lambda job: job["status"].get("lastHandledRetryAt") == "monday",
        60,
    )
    *_, ended = poll(read, 900)
    assert ended["status"]["phase"] == "Succeeded", ready_message(ended)
    assert ended["metadata"]["generation"] == before["metadata"]["generation"]
    rows = [each["status"]["lineage"]["datasetRows"] for each in (before, ended)]
    assert rows[1] < rows[0]
    assert ended["status"]["version"] != before["status"]["version"]
    assert "RetryRequested" in [each["reason"] for each in events(environment)]


def test_the_same_request_is_met_once(environment: Environment) -> None:
    """A GitOps tool applies it again and again."""
    before = [stage_of_pod(pod) for pod in pods_of(environment, NAME)]
    environment.kubectl("annotate", "ftj", NAME, "--overwrite", f"{RETRY}=monday")
    environment.kubectl("label", "ftj", NAME, "touched=yes")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert [stage_of_pod(pod) for pod in pods_of(environment, NAME)] == before
        time.sleep(1)
