"""The plan when the annotation finetune.dev/retry-requested-at asks for another look."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.observed import (
    FineTuneJobStatus,
    LookCause,
    Phase,
    PlannedStatus,
    StageState,
)
from finetune_operator.plan import Plan, Policy, plan
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    ALL_DONE,
    DONE_MESSAGE,
    EXPORT,
    FINE,
    FINISHED,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    conditions,
    dead,
    ended,
    failing,
    finetunejob,
    finished_status,
    job,
    pending,
    planned,
    prepared,
    resolved,
    running,
    said,
    spec,
    status,
)
from tests.unit.operator.endings import DONE, EMPTY, LAST, NOTHING_YET, PREPARING, training
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    normal,
    start,
    started,
    stop,
    stopped,
    unchanged,
)

MONDAY, TUESDAY = "2026-11-23T09:00:00Z", "2026-11-24T09:00:00Z"
ASKED = normal(
    "RetryRequested",
    f"prepare looks again, as finetune.dev/retry-requested-at asks ({TUESDAY}).",
)


def asked(before: FineTuneJobStatus, value: str = TUESDAY, **fields: Any) -> Any:
    """What is observed: the user has just annotated it, and status can remember that."""
    if before.last_handled_retry_at is None and before.phase is not None:
        before = before.model_copy(update={"last_handled_retry_at": ""})
    return finetunejob(before, retry_requested=value, **fields)


def again(look: int = 1) -> PlannedStatus:
    """The same spec, looked at once more."""
    return planned(1).model_copy(update={"look": look, "cause": LookCause.RETRY_REQUESTED})


def looking(*others: Any, look: int = 1, **fields: Any) -> Any:
    """The status while `prepare` looks again."""
    handled = {"planned": again(look), "last_handled_retry_at": TUESDAY, **fields}
    return status(Phase.PREPARING, PREPARE, running(PREPARE), *others, **handled)


FAILED_TRAIN = failing(
    TRAIN, Reason.INTERNAL_ERROR, "no luck", fingerprint="train-a", attempt=3, failures=3
)
FAILED = status(
    Phase.FAILED,
    TRAIN,
    DONE,
    FAILED_TRAIN,
    LAST,
    resolved=resolved(),
    conditions=dead(Reason.INTERNAL_ERROR, "no luck"),
)
HANDLED = FAILED.model_copy(update={"last_handled_retry_at": TUESDAY})
RUNS = running(TRAIN, fingerprint="train-a", since=-60)

CASES = [
    Case(
        "a failed job is looked at again",
        asked(FAILED),
        [job(TRAIN, attempt=3, **ended(1))],
        Plan(
            looking(FAILED_TRAIN, LAST, resolved=resolved()),
            actions=(start(PREPARE, key="1.1"),),
            events=(ASKED, started(PREPARE)),
        ),
    ),
    Case("the same request is met once", asked(HANDLED), [], unchanged(HANDLED)),
    Case("without the annotation it stays so", asked(HANDLED, ""), [], unchanged(HANDLED)),
    Case(
        "then the stage begins with all its attempts, under a new number",
        asked(looking(FAILED_TRAIN, LAST, resolved=resolved())),
        [
            job(TRAIN, attempt=3, **ended(1)),
            job(PREPARE, key="1.1", **ended(0, prepared([PREPARE]))),
        ],
        Plan(
            status(
                Phase.TRAINING,
                TRAIN,
                DONE.model_copy(update={"start_time": "2026-11-24T12:00:00Z"}),
                running(TRAIN, attempt=4, fingerprint="train-a"),
                LAST,
                resolved=resolved(),
                planned=again(),
                last_handled_retry_at=TUESDAY,
            ),
            actions=(start(TRAIN, attempt=4),),
            events=(finished(PREPARE), started(TRAIN, attempt=4)),
        ),
    ),
    Case(
        "a prepare that has failed looks again",
        asked(
            status(
                Phase.FAILED,
                PREPARE,
                failing(PREPARE, Reason.DATASET_EMPTY, EMPTY),
                *NOTHING_YET,
                conditions=dead(Reason.DATASET_EMPTY, EMPTY),
            )
        ),
        [],
        Plan(
            looking(*NOTHING_YET),
            actions=(start(PREPARE, key="1.1"),),
            events=(ASKED, started(PREPARE)),
        ),
    ),
    Case(
        "a finished job stays Ready meanwhile",
        asked(finished_status(*ALL_DONE, last_handled_retry_at=MONDAY, planned=again(1))),
        [],
        Plan(
            looking(
                *ALL_DONE[1:],
                look=2,
                conditions=conditions(
                    ready=(True, "Succeeded", DONE_MESSAGE),
                    progressing=(True, "Preparing", "prepare is at work, attempt 1."),
                    degraded=FINE,
                ),
                **FINISHED,
            ),
            actions=(start(PREPARE, key="1.2"),),
            events=(ASKED, started(PREPARE)),
        ),
    ),
    Case(
        "a training that runs goes on until the answer is there",
        asked(training()),
        [job(TRAIN)],
        Plan(
            looking(RUNS, LAST, resolved=resolved()),
            actions=(start(PREPARE, key="1.1"),),
            events=(ASKED, started(PREPARE)),
        ),
    ),
    Case(
        "and after it, where nothing has changed",
        asked(looking(RUNS, LAST, resolved=resolved())),
        [job(TRAIN), job(PREPARE, key="1.1", **ended(0, prepared([PREPARE])))],
        Plan(
            status(
                Phase.TRAINING,
                TRAIN,
                DONE.model_copy(update={"start_time": "2026-11-24T12:00:00Z"}),
                RUNS,
                LAST,
                resolved=resolved(),
                planned=again(),
                last_handled_retry_at=TUESDAY,
            ),
            events=(finished(PREPARE),),
        ),
    ),
    Case(
        "a prepare that runs may have read the old file, and begins anew",
        asked(PREPARING),
        [job(PREPARE)],
        Plan(
            status(
                Phase.WAITING,
                PREPARE,
                pending(PREPARE),
                *NOTHING_YET,
                reason="Stopping",
                planned=again(),
                last_handled_retry_at=TUESDAY,
                conditions=conditions(
                    ready=(False, "Waiting", "The artifacts are not there yet."),
                    progressing=(
                        True,
                        "Stopping",
                        "prepare starts when its earlier pod has stopped.",
                    ),
                    degraded=FINE,
                ),
            ),
            actions=(stop(PREPARE),),
            events=(ASKED, stopped(PREPARE)),
        ),
    ),
    Case(
        "one that was there from the beginning asks for nothing more",
        asked(FineTuneJobStatus()),
        [],
        Plan(
            status(
                Phase.PREPARING,
                PREPARE,
                running(PREPARE),
                *NOTHING_YET,
                last_handled_retry_at=TUESDAY,
            ),
            actions=(start(PREPARE),),
            events=(started(PREPARE),),
        ),
    ),
    Case(
        "an edit that came with it has its own look",
        asked(FAILED, generation=2),
        [],
        Plan(
            status(
                Phase.PREPARING,
                PREPARE,
                running(PREPARE),
                FAILED_TRAIN,
                LAST,
                generation=2,
                resolved=resolved(),
                last_handled_retry_at=TUESDAY,
            ),
            actions=(start(PREPARE, key="2"),),
            events=(ASKED, started(PREPARE)),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_a_request(case: Case) -> None:
    assert decide(case) == case.plan


def test_it_waits_while_the_job_is_suspended() -> None:
    given = asked(FAILED, spec=spec(suspend=True), generation=2)
    found = plan(given, [], SETTINGS, Policy(), NOW)
    assert (found.actions, found.status.last_handled_retry_at) == ((), "")
    after = plan(asked(found.status, generation=3, spec=spec()), [], SETTINGS, Policy(), NOW)
    assert after.actions == (start(PREPARE, key="3"),)
    assert after.status.last_handled_retry_at == TUESDAY


def test_a_request_that_an_older_definition_lets_nobody_remember_has_no_effect() -> None:
    """It drops the field from status: what can't be remembered would be met without an end."""
    given = finetunejob(FAILED, retry_requested=TUESDAY)
    found = plan(given, [], SETTINGS, Policy(), NOW)
    assert found == Plan(FAILED.model_copy(update={"last_handled_retry_at": ""}))
    after = finetunejob(found.status, retry_requested=TUESDAY)
    assert plan(after, [], SETTINGS, Policy(), NOW).actions == (start(PREPARE, key="1.1"),)


def test_an_old_result_is_no_answer_to_it() -> None:
    """The Job of the former look is still there, with what it said."""
    old = job(PREPARE, **ended(0, prepared([PREPARE, TRAIN, EXPORT])))
    found = plan(asked(finished_status(*ALL_DONE)), [old], SETTINGS, Policy(), NOW)
    assert found.actions == (start(PREPARE, key="1.1"),)
    assert found.status.stages[0].state is StageState.RUNNING


def test_a_look_that_fails_leaves_a_finished_model_ready() -> None:
    bad = said(PREPARE, Reason.DATASET_EMPTY, message=EMPTY)
    before = finished_status(*ALL_DONE)
    looks = plan(asked(before), [], SETTINGS, Policy(), NOW).status
    jobs = [job(PREPARE, key="1.1", **ended(10, bad))]
    found = plan(asked(looks), jobs, SETTINGS, Policy(), NOW).status
    claims = {each.type: each for each in found.conditions}
    assert (claims["Ready"].status, claims["Degraded"].status) == ("True", "True")
    assert found.artifacts == before.artifacts
    asks = asked(found, "2026-11-25")  # the file is mended
    assert plan(asks, jobs, SETTINGS, Policy(), NOW).actions == (start(PREPARE, key="1.2"),)
