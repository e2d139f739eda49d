"""The plan when spec.suspend is false again."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.observed import FineTuneJobStatus, Phase
from finetune_operator.observe import ObservedFineTuneJob
from finetune_operator.plan import Plan, Policy, plan
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    ALL_DONE,
    FINISHED,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    failing,
    finetunejob,
    finished_status,
    job,
    planned,
    resolved,
    running,
    spec,
    status,
)
from tests.unit.operator.endings import (
    DONE,
    LAST,
)
from tests.unit.operator.expect import (
    Case,
    decide,
    normal,
    start,
    started,
)
from tests.unit.operator.suspending import (
    AT_REST,
    HALTED,
    LEAVES,
    NOTHING,
    READY,
    TRAIN_RUNS,
    resting,
    stopping,
    waits,
)

AGAIN: dict[str, Any] = {"generation": 3, "planned": planned(1)}
RESUMED = normal("Resumed", "spec.suspend is false: what is left is started.")


def resumed(before: FineTuneJobStatus, **changes: Any) -> ObservedFineTuneJob:
    """What is observed: the user has just set spec.suspend to false again."""
    return finetunejob(before, generation=3, spec=spec(**changes))


RESUMES = [
    Case(
        "the training goes on, and nothing counts as a failure",
        resumed(AT_REST),
        [],
        Plan(
            status(
                Phase.TRAINING,
                TRAIN,
                DONE,
                running(TRAIN, attempt=2, fingerprint="train-a"),
                LAST,
                resolved=resolved(),
                **AGAIN,
            ),
            actions=(start(TRAIN, attempt=2),),
            events=(RESUMED, started(TRAIN, attempt=2)),
        ),
    ),
    Case(
        "an edit that came with it, or before, is looked at by prepare first",
        resumed(AT_REST, training={"seed": 3}),
        [],
        Plan(
            status(
                Phase.PREPARING,
                PREPARE,
                running(PREPARE),
                HALTED,
                LAST,
                resolved=resolved(),
                generation=3,
            ),
            actions=(start(PREPARE, key="3"),),
            events=(RESUMED, started(PREPARE)),
        ),
    ),
    Case(
        "a finished job has nothing to do",
        resumed(resting(NOTHING, *ALL_DONE, ready=READY, **FINISHED)),
        [],
        Plan(finished_status(*ALL_DONE, **AGAIN), events=(RESUMED,)),
    ),
    Case(
        "after a failure prepare looks again, as after any edit",
        resumed(
            resting(
                waits("train"),
                DONE,
                failing(TRAIN, Reason.OUT_OF_MEMORY, "raise it", fingerprint="train-a"),
                LAST,
                resolved=resolved(),
            )
        ),
        [],
        Plan(
            status(
                Phase.PREPARING,
                PREPARE,
                running(PREPARE),
                failing(TRAIN, Reason.OUT_OF_MEMORY, "raise it", fingerprint="train-a"),
                LAST,
                resolved=resolved(),
                generation=3,
                planned=planned(1).model_copy(update={"generation": 3}),
            ),
            actions=(start(PREPARE, key="3"),),
            events=(RESUMED, started(PREPARE)),
        ),
    ),
]


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.says)
def test_a_job_that_goes_on(case: Case) -> None:
    assert decide(case) == case.plan


def test_resumed_while_it_still_stops_it_waits_for_its_pod() -> None:
    before = stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved())
    jobs = [job(TRAIN, **LEAVES)]
    found = plan(resumed(before), jobs, SETTINGS, Policy(), NOW)
    assert (found.actions, found.events) == ((), ())
    assert found.status.stages[1].disruptions == 0
    after = plan(finetunejob(found.status, 3, spec=spec()), [], SETTINGS, Policy(), NOW)
    assert after.actions == (start(TRAIN),)
    assert after.status.stages[1].failures == 0
