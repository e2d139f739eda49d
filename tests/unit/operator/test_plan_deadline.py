"""The plan when an attempt takes longer than activeDeadlineSeconds allows."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import StageState
from finetune_operator.observe import Finish
from finetune_operator.plan import Policy, plan
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    EXPORT,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    at,
    ended,
    finetunejob,
    job,
    pod,
    running,
    said,
    spec,
)
from tests.unit.operator.endings import NOTHING_YET, PREPARING, train_fails, training
from tests.unit.operator.expect import finished, start, started, warning
from tests.unit.operator.raw import FAILED, RUNS, observed, raw_pod

STOPPED = said(TRAIN, Reason.STOPPED, message="Stopped; it goes on from step 12.")
GOES_ON = "The training goes on from its last checkpoint."
MESSAGE = (
    "train took longer than the 60 s of spec.stages.train.activeDeadlineSeconds. "
    f"Raise it, or find out what takes so long. {GOES_ON}"
)


def limited(seconds: int | None = 60) -> FineTuneJobSpec:
    limit = {} if seconds is None else {"activeDeadlineSeconds": seconds}
    return spec(stages=dict.fromkeys((PREPARE, TRAIN, EXPORT), limit))


def late(**fields: Any) -> Any:
    """A Job of the training that took longer than a minute."""
    return job(TRAIN, deadline_seconds=60, past_deadline=True, **fields)


def decide(*jobs: Any, seconds: int | None = 60, **known: Any) -> Any:
    given = finetunejob(training(), spec=limited(seconds))
    return plan(given, jobs, SETTINGS, Policy(), NOW, **known)


GONE: dict[str, Any] = {"finished": Finish.FAILED, "finished_at": NOW, "pod": None}


@pytest.mark.parametrize(
    "fields",
    [GONE, ended(14, STOPPED, deleting=True), ended(137, deleting=True), ended(14, STOPPED)],
    ids=["its pod is gone", "its pod has stopped", "its pod was killed", "nobody deletes its pod"],
)
def test_the_stage_has_failed_for_good(fields: dict[str, Any]) -> None:
    assert decide(late(**fields)) == train_fails(Reason.DEADLINE_EXCEEDED, MESSAGE)


@pytest.mark.parametrize("finish", [None, Finish.FAILED])
def test_it_has_its_grace_period(finish: Finish | None) -> None:
    leaving = pod(deleting=True, delete_by=at(100))
    found = decide(late(finished=finish, finished_at=NOW if finish else None, pod=leaving))
    assert found.status.stages[1] == running(TRAIN, fingerprint="train-a", since=-60)
    assert (found.actions, found.events) == ((), ())


def test_a_training_that_ended_well_in_it_is_done() -> None:
    found = decide(late(**ended(0, said(TRAIN), deleting=True)))
    assert found.status.stages[1].state is StageState.SUCCEEDED
    assert found.events == (finished(TRAIN), started(EXPORT))


def test_what_failed_by_itself_keeps_its_reason() -> None:
    full = said(TRAIN, Reason.OUT_OF_DISK, message="give it more disk")
    assert decide(late(**ended(13, full))) == train_fails(Reason.OUT_OF_DISK, "give it more disk")


@pytest.mark.parametrize("seconds", [120, None])
def test_a_limit_that_was_raised_holds_for_another_attempt(seconds: int | None) -> None:
    found = decide(late(**GONE), seconds=seconds)
    train = found.status.stages[1]
    assert (train.state, train.failures, train.disruptions) == (StageState.PENDING, 0, 0)
    words = "The limit is higher by now, so it is tried again."
    assert train.message == (
        f"train took longer than the 60 s of spec.stages.train.activeDeadlineSeconds. {words} "
        f"{GOES_ON}"
    )
    assert found.events == (warning(Reason.DEADLINE_EXCEEDED, train.message),)
    given = finetunejob(found.status, spec=limited(seconds))
    after = plan(given, [late(**GONE)], SETTINGS, Policy(), at(11))
    assert after.actions == (start(TRAIN, attempt=2),)


def test_another_stage_is_told_without_a_checkpoint() -> None:
    given = finetunejob(PREPARING, spec=limited())
    jobs = [job(PREPARE, deadline_seconds=60, past_deadline=True, **GONE)]
    found = plan(given, jobs, SETTINGS, Policy(), NOW)
    assert found.status.stages[0].message == (
        "prepare took longer than the 60 s of spec.stages.prepare.activeDeadlineSeconds. "
        "Raise it, or find out what takes so long."
    )
    assert found.status.stages[1:] == NOTHING_YET


@pytest.mark.parametrize("kind", ["FailureTarget", "Failed"])
def test_it_is_read_from_the_jobs_conditions(kind: str) -> None:
    told = [{**FAILED[0], "type": kind, "reason": "DeadlineExceeded"}]
    assert observed(raw_pod(**RUNS), conditions=told).past_deadline
    assert not observed(raw_pod(**RUNS), conditions=FAILED).past_deadline
