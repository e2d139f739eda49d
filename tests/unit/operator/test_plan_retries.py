"""The plan when a stage ends badly: what is tried again, and what it costs."""

from __future__ import annotations

import pytest

from finetune_operator.api.observed import Phase, StageState
from finetune_operator.observe import Finish
from finetune_operator.plan import Plan, Policy, plan
from finetune_operator.pods import ObservedPod
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    LOST,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    at,
    ended,
    failing,
    finetunejob,
    job,
    pod,
    resolved,
    running,
    said,
    spec,
    status,
    trouble,
)
from tests.unit.operator.endings import (
    CRASH,
    DONE,
    EVICTED_MESSAGE,
    LAST,
    NOTHING_YET,
    OOM,
    PREPARING,
    RETRY,
    RETRYING,
    evicted,
    train_retries,
    training,
)
from tests.unit.operator.expect import (
    Case,
    decide,
    start,
    started,
    unchanged,
    warning,
)

DELETED_MESSAGE = "The pod of train was disrupted (the pod was deleted)."


def deleted_pod() -> ObservedPod:
    return pod(phase="Failed", exit_code=137, finished_at=at(0), deleting=True)


def started_anew(failures: int, **lost: int) -> Plan:
    """The second attempt of `train` starts, since what the first said is lost."""
    words = "The Job train-1 ended, and its pod is gone with what it had to say."
    return Plan(
        status(
            Phase.TRAINING,
            TRAIN,
            DONE,
            running(TRAIN, 2, fingerprint="train-a", failures=failures, **lost),
            LAST,
            resolved=resolved(),
        ),
        (start(TRAIN, 2),),
        (warning("PodDisrupted", words), started(TRAIN, 2)),
    )


CASES = [
    Case(
        "an unknown failure is tried again after ten seconds, and counts",
        finetunejob(training()),
        [job(TRAIN, **ended(1, last_log_line="RuntimeError: no luck"))],
        train_retries(Reason.INTERNAL_ERROR, CRASH),
    ),
    Case(
        "a failure with an exit code that no one knows is tried again",
        finetunejob(training()),
        [job(TRAIN, **ended(139))],
        train_retries(
            Reason.INTERNAL_ERROR, "train ended with exit code 139; its log may say why."
        ),
    ),
    Case(
        "a store that is down is tried again",
        finetunejob(training()),
        [job(TRAIN, **ended(1, said(TRAIN, Reason.STORAGE_UNAVAILABLE, message="503")))],
        train_retries(Reason.STORAGE_UNAVAILABLE, "503"),
    ),
    Case(
        "the second pause is twice the first",
        finetunejob(training(attempt=2, failures=1)),
        [job(TRAIN, 2, **ended(1, last_log_line="RuntimeError: no luck"))],
        train_retries(Reason.INTERNAL_ERROR, CRASH, after=20, attempt=2, failures=2),
    ),
    Case(
        "no pause is longer than five minutes",
        finetunejob(training(attempt=40, failures=0)),
        [job(TRAIN, 40, **ended(1, last_log_line="RuntimeError: no luck"))],
        train_retries(Reason.INTERNAL_ERROR, CRASH, after=300, attempt=40, failures=1),
    ),
    Case(
        "during the pause nothing is done",
        finetunejob(RETRYING),
        [job(TRAIN, **{**ended(1), "finished_at": at(0)})],
        unchanged(RETRYING, requeue_after=10),
    ),
    Case(
        "after the pause the next attempt starts",
        finetunejob(
            RETRYING.model_copy(
                update={
                    "stages": (
                        DONE,
                        RETRY.model_copy(update={"completion_time": "2026-11-24T11:59:50Z"}),
                        LAST,
                    )
                }
            )
        ),
        [job(TRAIN, **ended(1))],
        Plan(
            training(attempt=2, failures=1, since=0),
            (start(TRAIN, 2),),
            (started(TRAIN, 2),),
        ),
    ),
    Case(
        "an eviction is tried again free of charge",
        finetunejob(training(), spec=spec(backoffLimit=0)),
        [job(TRAIN, finished=Finish.FAILED, finished_at=at(0), pod=evicted())],
        train_retries(Reason.POD_DISRUPTED, EVICTED_MESSAGE, failures=0, **LOST),
    ),
    Case(
        "an evicted pod of a Job that has not failed may be replaced by the Job itself",
        finetunejob(training()),
        [job(TRAIN, pod=evicted())],
        Plan(
            training(reason=Reason.POD_DISRUPTED, message=EVICTED_MESSAGE, **LOST),
            events=(warning("PodDisrupted", EVICTED_MESSAGE),),
        ),
    ),
    Case(
        "a pod that was deleted may be replaced by the Job itself",
        finetunejob(training()),
        [job(TRAIN, pod=deleted_pod())],
        Plan(
            training(reason=Reason.POD_DISRUPTED, message=DELETED_MESSAGE, **LOST),
            events=(warning("PodDisrupted", DELETED_MESSAGE),),
        ),
    ),
    Case(
        "the pod that took its place is followed like the first",
        finetunejob(training(reason=Reason.POD_DISRUPTED, message=DELETED_MESSAGE)),
        [job(TRAIN, **ended(1, last_log_line="RuntimeError: no luck"))],
        train_retries(Reason.INTERNAL_ERROR, CRASH),
    ),
    Case(
        "a Job that fails after its pod was deleted is tried again free of charge",
        finetunejob(
            training(reason=Reason.POD_DISRUPTED, message=DELETED_MESSAGE),
            spec=spec(backoffLimit=0),
        ),
        [job(TRAIN, finished=Finish.FAILED, finished_at=at(0), pod=None)],
        train_retries(Reason.POD_DISRUPTED, DELETED_MESSAGE, failures=0),
    ),
    Case(
        "with what the trainer said, where it had the time",
        finetunejob(training(reason=Reason.STOPPED, message="stopped at step 5")),
        [job(TRAIN, finished=Finish.FAILED, finished_at=at(0), pod=None)],
        train_retries(Reason.STOPPED, "stopped at step 5", failures=0),
    ),
    Case(
        "a trainer that was stopped is tried again free of charge",
        finetunejob(training()),
        [job(TRAIN, **ended(14, said(TRAIN, Reason.STOPPED, message="stopped at step 5")))],
        train_retries(Reason.STOPPED, "stopped at step 5", failures=0, **LOST),
    ),
    Case(
        "a killed container of a deleted pod is tried again free of charge",
        finetunejob(training()),
        [job(TRAIN, **ended(137, deleting=True))],
        train_retries(
            Reason.POD_DISRUPTED,
            DELETED_MESSAGE,
            failures=0,
            **LOST,
        ),
    ),
    Case(
        "so is a pod that was deleted before its container ran",
        finetunejob(training()),
        [
            job(
                TRAIN,
                finished=Finish.FAILED,
                finished_at=at(0),
                pod=pod(phase="Failed", started=False, deleting=True),
            )
        ],
        train_retries(Reason.POD_DISRUPTED, DELETED_MESSAGE, failures=0, **LOST),
    ),
    Case(
        "a pod that the kernel killed for memory is tried again, and says which limit to raise",
        finetunejob(training()),
        [job(TRAIN, **ended(137, oom_killed=True))],
        train_retries(Reason.OOM_KILLED, OOM),
    ),
    Case(
        "a worker that the kernel killed for memory is tried again, from its checkpoint",
        finetunejob(training()),
        [job(TRAIN, **ended(1, said(TRAIN, Reason.OOM_KILLED, message="killed")))],
        train_retries(Reason.OOM_KILLED, "killed"),
    ),
    Case(
        "a pod that failed before it ran is tried again",
        finetunejob(training()),
        [
            job(
                TRAIN,
                finished=Finish.FAILED,
                finished_at=at(0),
                pod=pod(phase="Failed", started=False),
            )
        ],
        train_retries(Reason.INTERNAL_ERROR, "The pod of train failed before it ran."),
    ),
    Case(
        "a failed Job whose pod nobody saw end is tried again free of charge",
        finetunejob(training(), spec=spec(backoffLimit=0)),
        [job(TRAIN, finished=Finish.FAILED, finished_at=at(-91), pod=None)],
        started_anew(failures=0, disruptions=1),
    ),
    Case(
        "unless it failed because of its pod's exit code",
        finetunejob(training()),
        [
            job(
                TRAIN,
                finished=Finish.FAILED,
                finished_at=at(-91),
                failed_by_exit_code=True,
                pod=None,
            )
        ],
        started_anew(failures=1),
    ),
    Case(
        "a prepare that ended well without a word is tried again",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(0))],
        Plan(
            status(
                Phase.PREPARING,
                PREPARE,
                failing(
                    PREPARE,
                    Reason.INTERNAL_ERROR,
                    "prepare ended without saying what it found.",
                    state=StageState.PENDING,
                ),
                *NOTHING_YET,
                conditions=trouble(
                    Phase.PREPARING,
                    (
                        "Retrying",
                        "Attempt 2 of prepare follows. The last one ended: "
                        "prepare ended without saying what it found.",
                    ),
                    ("InternalError", "prepare ended without saying what it found."),
                ),
            ),
            events=(warning("InternalError", "prepare ended without saying what it found."),),
            requeue_after=10,
        ),
    ),
    Case(
        "a trainer that says it succeeded, and then crashes, is tried again",
        finetunejob(training()),
        [job(TRAIN, **ended(134, said(TRAIN)))],
        train_retries(
            Reason.INTERNAL_ERROR, "train ended with exit code 134; its log may say why."
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan


@pytest.mark.parametrize("starts_at_once", [False, True])
def test_what_ended_an_attempt_stays_one_event(starts_at_once: bool) -> None:
    lost = plan(finetunejob(training()), [job(TRAIN, pod=deleted_pod())], SETTINGS, Policy(), NOW)
    ended_at = at(-91 if starts_at_once else 0)
    failed = job(TRAIN, finished=Finish.FAILED, finished_at=ended_at, pod=None)
    after = plan(finetunejob(lost.status), [failed], SETTINGS, Policy(), NOW)
    assert (started(TRAIN, 2) in after.events) is starts_at_once
    assert [each for each in after.events if each.type == "Warning"] == list(lost.events)
    assert {each.scope for each in (*lost.events, *after.events) if each.type == "Warning"} == {
        f"train/1.1@{lost.status.stages[1].start_time}"
    }
