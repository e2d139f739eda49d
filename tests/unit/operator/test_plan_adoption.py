"""The plan when Jobs are there that status knows nothing of: they are taken up, not made again.

An operator may die, or lose a write, between a Job and the status that explains it.
"""

from __future__ import annotations

import pytest

from finetune_operator.api.observed import Phase, StageState
from finetune_operator.plan import Plan
from tests.unit.operator.build import (
    DONE_MESSAGE,
    PREPARE,
    TRAIN,
    at,
    ended,
    exported,
    finetunejob,
    finished_status,
    job,
    pending,
    prepared,
    resolved,
    running,
    said,
    status,
    succeeded,
)
from tests.unit.operator.build import EXPORT as EXPORTS
from tests.unit.operator.endings import CRASH, DONE, LAST, PREPARING, training
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    normal,
    start,
    started,
    unchanged,
    warning,
)

FAILED_FIRST = ended(1, last_log_line="RuntimeError: no luck")
LOST = (
    finetunejob(training()),
    [job(TRAIN, **FAILED_FIRST), job(TRAIN, 2, created=at(-5), pod=None)],
)
EXPORTING = status(
    Phase.EXPORTING,
    EXPORTS,
    DONE,
    succeeded(TRAIN, fingerprint="train-a", until=-10),
    running(EXPORTS, fingerprint="export-a"),
    resolved=resolved(),
)

CASES = [
    Case(
        "the second attempt is adopted when the status with the first one's failure was lost",
        *LOST,
        Plan(
            training(attempt=2, failures=1, since=-5),
            events=(warning("InternalError", CRASH),),
            requeue_after=25,
        ),
    ),
    Case(
        "the second attempt is adopted when the Job of the first is gone",
        finetunejob(training()),
        [job(TRAIN, 2, created=at(-5))],
        Plan(training(attempt=2, since=-5)),
    ),
    Case(
        "the second attempt is left alone while the first is still thought to run",
        finetunejob(training()),
        [job(TRAIN), job(TRAIN, 2, created=at(-5))],
        unchanged(training()),
    ),
    Case(
        "a second attempt that has ended meanwhile is taken in",
        finetunejob(training()),
        [
            job(TRAIN, **FAILED_FIRST),
            job(TRAIN, 2, **ended(0, said(TRAIN)), created=at(-30)),
        ],
        Plan(
            EXPORTING.model_copy(
                update={
                    "stages": (
                        DONE,
                        succeeded(TRAIN, fingerprint="train-a", since=-30, attempt=2, failures=1),
                        running(EXPORTS, fingerprint="export-a"),
                    )
                }
            ),
            (start(EXPORTS),),
            (warning("InternalError", CRASH), finished(TRAIN), started(EXPORTS)),
        ),
    ),
    Case(
        "a training that began and ended while the operator was dead is taken in, not repeated",
        finetunejob(PREPARING),
        [
            job(PREPARE, **ended(0, prepared([PREPARE])), created=at(-600)),
            job(TRAIN, **ended(0, said(TRAIN)), created=at(-300)),
        ],
        Plan(
            EXPORTING.model_copy(
                update={
                    "stages": (
                        succeeded(PREPARE, fingerprint="prepare-a"),
                        succeeded(TRAIN, since=-300, fingerprint="train-a"),
                        running(EXPORTS, fingerprint="export-a"),
                    )
                }
            ),
            (start(EXPORTS),),
            (finished(PREPARE), finished(TRAIN), started(EXPORTS)),
        ),
    ),
    Case(
        "an export that did so is as well",
        finetunejob(
            status(
                Phase.EXPORTING,
                EXPORTS,
                DONE,
                succeeded(TRAIN, fingerprint="train-a"),
                LAST,
                resolved=resolved(),
                metrics={"trainLoss": 0.5},
            )
        ),
        [job(EXPORTS, **ended(0, exported()), created=at(-60))],
        Plan(
            finished_status(
                DONE,
                succeeded(TRAIN, fingerprint="train-a"),
                succeeded(EXPORTS, fingerprint="export-a", message="export is done"),
            ),
            events=(
                finished(EXPORTS),
                normal("Succeeded", DONE_MESSAGE),
            ),
        ),
    ),
    Case(
        "what ended before prepare looked is not: the store has the last word",
        finetunejob(PREPARING),
        [
            job(PREPARE, **ended(0, prepared([PREPARE])), created=at(-60)),
            job(TRAIN, **ended(0, said(TRAIN)), created=at(-300)),
        ],
        Plan(
            status(
                Phase.TRAINING,
                TRAIN,
                succeeded(PREPARE, fingerprint="prepare-a"),
                running(TRAIN, 2, fingerprint="train-a"),
                pending(EXPORTS, fingerprint="export-a"),
                resolved=resolved(),
            ),
            (start(TRAIN, 2),),
            (finished(PREPARE), started(TRAIN, 2)),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan


def test_a_failure_that_was_lost_twice_is_counted_for_each_attempt() -> None:
    jobs = [
        job(TRAIN, **FAILED_FIRST),
        job(TRAIN, 2, **FAILED_FIRST, created=at(-50)),
        job(TRAIN, 3, created=at(-5)),
    ]
    train = decide(Case("", finetunejob(training()), jobs, unchanged(training()))).status.stages[1]
    assert (train.state, train.attempt, train.failures) == (StageState.RUNNING, 3, 2)


@pytest.mark.parametrize(("settings", "attempt"), [("settings-1", 1), ("older", 0)])
def test_a_number_is_taken_while_its_job_is_being_deleted_unless_its_name_differs(
    settings: str, attempt: int
) -> None:
    jobs = [
        job(PREPARE, **ended(0, prepared([PREPARE])), created=at(-60)),
        job(TRAIN, deleting=True, pod=None, pod_settings=settings),
    ]
    made = decide(Case("", finetunejob(PREPARING), jobs, unchanged(PREPARING)))
    assert (made.status.stages[1].attempt, made.actions) == (attempt, ())
