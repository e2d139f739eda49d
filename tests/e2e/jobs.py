"""FineTuneJobs of the example, with changes, and how far they are."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import yaml

from hack.demo.environment import EXAMPLE, Environment

Job = dict[str, Any]


def apply(environment: Environment, name: str, *, training: Job | None = None, **spec: Any) -> None:
    """Apply the example by another name: parts of its spec in place of its own, and of the
    training only these fields."""
    job = yaml.safe_load(EXAMPLE.read_text())
    job["metadata"]["name"] = name
    job["spec"] |= {"output": {"uri": f"s3://artifacts/{name}"}, **spec}
    job["spec"]["training"] |= training or {}
    environment.kubectl("apply", "-f", "-", input=json.dumps(job))


def wait(read: Callable[[], Job], what: str, happened: Callable[[Job], Any], seconds: float) -> Job:
    """The object as soon as something holds of it."""
    deadline = time.monotonic() + seconds
    while not happened(job := read()):
        assert time.monotonic() < deadline, f"{what}: {job.get('status')}"
        time.sleep(0.5)
    return job


def pods_of(environment: Environment, job: str) -> list[Job]:
    """The job's pods that are there."""
    return environment.items("pods", f"finetune.dev/job={job}")


def stage_of_pod(pod: Job) -> str:
    return str(pod["metadata"]["labels"]["finetune.dev/stage"])


def steps_of(environment: Environment, pod: str) -> list[int]:
    """Steps that a pod trained, by its log."""
    return [int(n) for n in re.findall(r" step (\d+)/", environment.kubectl("logs", pod))]


def checkpoints(environment: Environment, job: str) -> set[int]:
    """Steps of the whole checkpoints in the store."""
    prefix = f"{job}/stages/train/"
    listing = environment.store.client().list_objects_v2(Bucket="artifacts", Prefix=prefix)
    keys = [item["Key"] for item in listing.get("Contents", [])]
    found = (re.search(r"/checkpoints/(\d+)/complete\.json$", key) for key in keys)
    return {int(each[1]) for each in found if each}
