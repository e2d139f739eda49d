"""The plan when a trainer reports no more: its process or its node hangs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.api.observed import FineTuneJobStatus, StageState
from finetune_operator.observe import ObservedFineTuneJob, ReportedProgress, observe_finetunejob
from finetune_operator.plan import Plan, Policy, plan
from finetune_trainer.contract import Reason
from tests.unit.operator.build import SETTINGS, TRAIN, at, finetunejob, job, pod, spec
from tests.unit.operator.endings import training
from tests.unit.operator.expect import start, stop, stopped, warning

HALF_AN_HOUR, ALLOWANCE = 30 * 60, 60
POD: dict[str, Any] = {"pod": pod(name="train-1-abcde", node="node-7")}
SINCE = "2026-11-24T11:28:50Z"
SILENCE = (
    f"The trainer in pod train-1-abcde has not reported since {SINCE}, though it does every 60 s "
    "while it lives: it hangs, or its node node-7 does."
)
TOLD = f"{SILENCE} It is stopped if it stays so for 180 s more."


def silent(
    before: FineTuneJobStatus, seconds: float = HALF_AN_HOUR + ALLOWANCE + 10, **fields: Any
) -> ObservedFineTuneJob:
    """What is observed: so long ago the training reported last."""
    said: dict[str, Any] = {"job": "train-1", "at": at(-seconds), "heartbeat_seconds": 60, **fields}
    return finetunejob(before, reported=ReportedProgress(**said))


def decide(given: ObservedFineTuneJob, after: float = 0, **job_fields: Any) -> Plan:
    jobs = [job(TRAIN, **{**POD, **job_fields})]
    return plan(given, jobs, SETTINGS, Policy(), at(after))


def degraded(found: Plan) -> tuple[str, str, str]:
    (condition,) = [each for each in found.status.conditions if each.type == "Degraded"]
    return condition.status, condition.reason, condition.message


def test_it_is_told_first() -> None:
    found = decide(silent(training()))
    assert degraded(found) == ("True", "Stalled", TOLD)
    assert (found.actions, found.requeue_after) == ((), 181)
    assert found.status.stages[1] == training().stages[1]


def test_then_its_pod_is_stopped_and_the_training_tried_again() -> None:
    told = decide(silent(training())).status
    waits = decide(silent(told), after=100)
    assert (waits.status, waits.actions, waits.requeue_after) == (told, (), 81)
    found = decide(silent(told), after=181)
    message = f"{SILENCE} Its pod is stopped; the training goes on from its last checkpoint."
    assert found.actions == (stop(TRAIN),)
    assert found.events == (warning(Reason.STALLED, message), stopped(TRAIN))
    train = found.status.stages[1]
    assert (train.state, train.failures, train.reason) == (StageState.PENDING, 1, "Stalled")
    leaves = plan(
        finetunejob(found.status), [job(TRAIN, deleting=True, **POD)], SETTINGS, Policy(), at(200)
    )
    assert leaves.actions == ()  # two would write the same files
    again = plan(finetunejob(found.status), [], SETTINGS, Policy(), at(200))
    assert again.actions == (start(TRAIN, attempt=2),)


def test_one_that_reports_again_goes_on() -> None:
    """E.g. the API server was away, and nobody could report."""
    told = decide(silent(training())).status
    found = decide(silent(told, seconds=-100), after=181)
    assert degraded(found)[0] == "False"
    assert found.actions == ()


def test_a_clock_that_is_wrong_ends_no_training() -> None:
    """It reports, with a time of hours ago."""
    told = decide(silent(training(), seconds=9000)).status
    assert degraded(decide(silent(told, seconds=8900), after=200))[0] == "False"
    assert decide(silent(told, seconds=8900), after=200).actions == ()


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        (silent(training(), HALF_AN_HOUR + ALLOWANCE - 1), {}),
        (silent(training(), job="train-0"), {}),
        (silent(training(), heartbeat_seconds=None), {}),
        (silent(training()), {"deleting": True}),
        (silent(training()), {"pod": pod(phase="Pending", started=False)}),
        (silent(training()), {"pod": pod(deleting=True, delete_by=at(100))}),
    ],
    ids=[
        "not for long",
        "another attempt reported",
        "an older trainer, which reports news only",
        "its Job is being deleted",
        "it has not begun",
        "its pod is being deleted",
    ],
)
def test_it_is_not_silent(given: ObservedFineTuneJob, fields: dict[str, Any]) -> None:
    found = decide(given, **fields)
    assert degraded(found)[0] == "False"
    assert found.actions == ()


def test_a_longer_timeout_holds() -> None:
    patient = replace(silent(training()), spec=spec(training={"stallTimeout": "1h"}))
    assert degraded(decide(patient))[0] == "False"


@pytest.mark.parametrize("text", ["yesterday", "2026-11-24T11:28:50", "", None])
def test_a_time_that_is_none_is_no_time(text: str | None) -> None:
    raw = {
        "metadata": {"name": "a", "namespace": "b", "uid": "c", "resourceVersion": "1"},
        "status": {"progress": {"job": "train-1", "lastUpdateTime": text, "heartbeatSeconds": 60}},
    }
    assert observe_finetunejob(raw).reported == ReportedProgress("train-1", heartbeat_seconds=60)
