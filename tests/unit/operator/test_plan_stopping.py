"""The plan while a pod is on its way out: it may still write a checkpoint, so no other begins."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageState
from finetune_operator.observe import Finish
from finetune_operator.plan import Plan, Policy, plan
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
    said,
    spec,
    status,
    trouble,
    waiting_pod,
)
from tests.unit.operator.endings import DONE, LAST, train_fails, train_retries, training
from tests.unit.operator.expect import Case, decide, start, started, unchanged, warning

STOPPED = said(TRAIN, Reason.STOPPED, message="Stopped by a signal; checkpoint of step 5.")
DELETED = "The pod of train was disrupted (the pod was deleted)."
EVICTION = "EvictionByEvictionAPI: Eviction API: evicting"


def given_up(**pod_fields: Any) -> dict[str, Any]:
    """Fields of a Job that has failed while its pod still runs."""
    running = pod(name="train-1-abcde", deleting=True, **pod_fields)
    return {"finished": Finish.FAILED, "finished_at": at(-100), "pod": running}


def stopping(progressing: tuple[str, str], train: Any) -> FineTuneJobStatus:
    given: FineTuneJobStatus = status(
        Phase.WAITING,
        TRAIN,
        DONE,
        train,
        LAST,
        resolved=resolved(),
        conditions=trouble(Phase.WAITING, progressing, None),
    )
    return given


def due(message: str = STOPPED.message) -> Any:
    """A training that was stopped a minute ago, whose pause is over."""
    again = failing(
        TRAIN,
        Reason.STOPPED,
        message,
        state=StageState.PENDING,
        fingerprint="train-a",
        failures=0,
    )
    return again.model_copy(update={"completion_time": "2026-11-24T11:59:00Z"})


def is_due() -> FineTuneJobStatus:
    given: FineTuneJobStatus = status(
        Phase.WAITING,
        TRAIN,
        DONE,
        due(),
        LAST,
        resolved=resolved(),
        conditions=trouble(Phase.WAITING, ("Stopping", WAITS), (Reason.STOPPED, STOPPED.message)),
    )
    return given


WAITS = "train starts when its earlier pod has stopped."
LEAVING = (
    "The Job of train has failed, and its pod train-1-abcde is stopping. Should the pod's node be "
    "lost, delete the pod by force."
)
STARTED = Plan(training(attempt=2, since=0, failures=0), (start(TRAIN, 2),), (started(TRAIN, 2),))

CASES = [
    Case(
        "a Job that failed while its pod has its grace period is waited for",
        finetunejob(training()),
        [job(TRAIN, **given_up())],
        unchanged(
            stopping(("Stopping", LEAVING), training().stages[1]),
        ),
    ),
    Case(
        "a stopped training is tried again free of charge, however often that was",
        finetunejob(training(attempt=7, failures=0), spec=spec(backoffLimit=0)),
        [job(TRAIN, 7, **ended(14, STOPPED))],
        train_retries(Reason.STOPPED, STOPPED.message, after=300, attempt=7, failures=0, **LOST),
    ),
    Case(
        "a stopped training on a drained node is a disruption, free of charge",
        finetunejob(training(), spec=spec(backoffLimit=0)),
        [job(TRAIN, **ended(14, STOPPED, disruption=EVICTION))],
        train_retries(
            Reason.POD_DISRUPTED,
            f"The pod of train was disrupted ({EVICTION}). {STOPPED.message}",
            failures=0,
            **LOST,
        ),
    ),
    Case(
        "a stopped pod whose Job has not failed may be replaced by the Job itself",
        finetunejob(training()),
        [job(TRAIN, pod=pod(phase="Failed", exit_code=14, finished_at=NOW, result=STOPPED))],
        Plan(
            training(reason=STOPPED.reason, message=STOPPED.message, **LOST),
            events=(warning("Stopped", STOPPED.message),),
        ),
    ),
    Case(
        "a replacement that the Job has made is the same attempt",
        finetunejob(training()),
        [job(TRAIN, pod=waiting_pod(), earlier_pods=(pod(name="earlier"),))],
        unchanged(training()),
    ),
    Case(
        "a stop without a last word is free of charge too",
        finetunejob(training(), spec=spec(backoffLimit=0)),
        [job(TRAIN, **ended(14))],
        train_retries(
            Reason.STOPPED,
            "train ended with exit code 14; its log may say why.",
            failures=0,
            **LOST,
        ),
    ),
    Case(
        "a pod that was killed after its grace period is tried again free of charge",
        finetunejob(training(), spec=spec(backoffLimit=0)),
        [job(TRAIN, **ended(137, deleting=True))],
        train_retries(Reason.POD_DISRUPTED, DELETED, failures=0, **LOST),
    ),
    Case(
        "the next attempt starts when the stopped pod has ended",
        finetunejob(is_due()),
        [job(TRAIN, **ended(14, STOPPED))],
        STARTED,
    ),
    Case(
        "the next attempt waits while the failed Job's pod still runs",
        finetunejob(is_due()),
        [job(TRAIN, **given_up())],
        unchanged(is_due()),
    ),
    Case(
        "the next attempt waits while an earlier pod of the Job still runs",
        finetunejob(is_due()),
        [job(TRAIN, earlier_pods=(pod(name="earlier"),), **ended(14, STOPPED))],
        unchanged(is_due()),
    ),
    Case(
        "the next attempt waits while the Job is being deleted",
        finetunejob(is_due()),
        [job(TRAIN, deleting=True)],
        unchanged(is_due()),
    ),
    Case(
        "the next attempt waits while the pod of another training still runs",
        finetunejob(is_due()),
        [job(TRAIN, 3, key="train-b", **given_up())],
        unchanged(is_due()),
    ),
    Case(
        "a failed Job whose pod never started is not waited for",
        finetunejob(is_due()),
        [job(TRAIN, finished=Finish.FAILED, finished_at=at(-100), pod=waiting_pod())],
        STARTED,
    ),
    *(
        Case(
            f"{reason} is never tried again",
            finetunejob(training()),
            [job(TRAIN, **ended(int(reason.exit_code), said(TRAIN, reason, message="No.")))],
            train_fails(reason, "No."),
        )
        for reason in (
            Reason.EXAMPLES_TOO_LONG,
            Reason.TRAINING_DIVERGED,
            Reason.OUT_OF_GPU_MEMORY,
            Reason.QUALITY_GATE_FAILED,
        )
    ),
    Case(
        "the ladder's end counts though its pod was evicted at the same moment",
        finetunejob(training()),
        [
            job(
                TRAIN,
                **ended(
                    12,
                    said(TRAIN, Reason.OUT_OF_GPU_MEMORY, message="No."),
                    disruption=EVICTION,
                    deleting=True,
                ),
            )
        ],
        train_fails(Reason.OUT_OF_GPU_MEMORY, "No."),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan


def test_an_earlier_objects_pod_is_waited_for_like_its_own() -> None:
    given = finetunejob(is_due())
    made = plan(given, [], SETTINGS, Policy(), NOW, old_pods={TRAIN: pod()})
    assert made == unchanged(is_due())
    other = plan(given, [], SETTINGS, Policy(), NOW, old_pods={PREPARE: pod()})
    assert other == STARTED
