"""What a FineTuneJob used, on the real API server, with lost pods and an operator that dies."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_trainer.contract import Reason, Stage, StageResult
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator
from tests.integration.operator.stage import Namespace, exported, new_namespace, prepared, trained

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
RESOURCES = {"resources": {"limits": {"nvidia.com/gpu": 2, "cpu": "1500m"}}}


@pytest.fixture
def here(installed: ControlPlane) -> Iterator[Namespace]:
    """An empty namespace."""
    with new_namespace(installed) as namespace:
        yield namespace


NOW = datetime.now(UTC)
LATER = 86_400  # the tests before this one take hours at most


def stamp(seconds: float) -> str:
    """So many seconds after these tests were read."""
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def ran(here: Namespace, result: StageResult, begin: float, end: float, attempt: int = 1) -> None:
    """A pod ran between these moments, and ended with a result."""
    code = int(result.reason.exit_code)
    state: dict[str, Any] = {
        "exitCode": code,
        "message": result.to_message().decode(),
        "startedAt": stamp(begin),
        "finishedAt": stamp(end),
    }
    phase = "Failed" if code else "Succeeded"
    here.set_pod(here.pod(result.stage, attempt), phase, {"terminated": state})


def usage(here: Namespace, stage: Stage | None = None) -> tuple[int, int, int]:
    """GPU seconds, CPU seconds and attempts, in all or of a stage."""
    found = here.status().get("usage") or {}
    if stage is not None:
        found = next((each for each in found["stages"] if each["name"] == stage), {})
    return found.get("gpuSeconds", 0), found.get("cpuSeconds", 0), found.get("attempts", 0)


def test_each_pod_is_counted_once(here: Namespace, mortal: Operator) -> None:
    here.apply(stages={"train": RESOURCES})
    ran(here, prepared(), LATER, LATER + 7)
    running = {"running": {"startedAt": stamp(-200)}}
    here.set_pod(here.pod(TRAIN), "Running", running)
    here.wait("its pod", lambda: len((here.status().get("usage") or {}).get("pods", ())) == 2)
    assert usage(here) == (0, 0, 2)

    mortal.kill()
    stopped = StageResult(stage=TRAIN, reason=Reason.INTERNAL_ERROR, message="no luck")
    ran(here, stopped, -200, -100)
    mortal.start()
    here.wait("the first attempt", lambda: usage(here, TRAIN) == (200, 150, 1))
    ran(here, trained(), -50, -20, attempt=2)
    here.wait_phase("Exporting")
    assert usage(here, TRAIN) == (260, 195, 2)
    ran(here, exported(), -10, 0)
    done = here.wait_phase("Succeeded")
    assert usage(here) == (260, 195, 4)
    assert done["usage"]["waitingSeconds"] > 0

    here.plane.kubectl("delete", "jobs", "--all", "-n", here.name)  # as their time to live does
    here.apply(training={"seed": 3}, stages={"train": RESOURCES})
    here.wait("the next look", lambda: here.jobs() == [("prepare", 1)])
    assert here.status()["usage"] == done["usage"]
