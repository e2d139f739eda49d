"""The plan when a sidecar goes on after the trainer has ended: it holds no GPU for long."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.observed import Phase
from finetune_operator.observe import ObservedJob
from finetune_operator.plan import Event, Plan
from finetune_trainer.contract import Reason, Stage
from tests.unit.operator.build import (
    ALL_DONE,
    EXPORT,
    TRAIN,
    at,
    ended,
    finetunejob,
    finished_status,
    job,
    pod,
    resolved,
    running,
    said,
    status,
    succeeded,
)
from tests.unit.operator.endings import DONE, training
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    normal,
    start,
    started,
    stop,
    unchanged,
)


def goes_on(stage: Stage, since: float, code: int = 0, **fields: Any) -> ObservedJob:
    """A Job whose trainer has ended, beside a container that hasn't."""
    result = said(stage) if code == 0 else said(stage, Reason.STOPPED, message="stopped")
    alive = pod(exit_code=code, finished_at=at(since), result=result, **fields)
    return job(stage, pod=alive)


def beside(stage: Stage) -> Event:
    words = f"Stopped what went on beside {stage} after its end (pod pod)."
    return normal("SidecarStopped", words)


EXPORTING = status(
    Phase.EXPORTING,
    EXPORT,
    DONE,
    succeeded(TRAIN, fingerprint="train-a", until=-60),
    running(EXPORT, fingerprint="export-a"),
    resolved=resolved(),
)
SETTLED = finished_status(*ALL_DONE)

CASES = [
    Case(
        "the result is taken in at once, and the next stage starts",
        finetunejob(training()),
        [goes_on(TRAIN, since=0)],
        Plan(
            EXPORTING.model_copy(
                update={
                    "stages": (
                        DONE,
                        succeeded(TRAIN, fingerprint="train-a"),
                        running(EXPORT, fingerprint="export-a"),
                    )
                }
            ),
            (start(EXPORT),),
            (finished(TRAIN), started(EXPORT)),
            requeue_after=60,
        ),
    ),
    Case(
        "after a minute its Job is stopped, which gives the GPU back",
        finetunejob(EXPORTING),
        [goes_on(TRAIN, since=-60), job(EXPORT)],
        Plan(EXPORTING, (stop(TRAIN),), (beside(TRAIN),)),
    ),
    Case(
        "a node's fast clock doesn't keep it for longer than that from being looked at again",
        finetunejob(EXPORTING),
        [goes_on(TRAIN, since=3600), job(EXPORT)],
        unchanged(EXPORTING, requeue_after=60),
    ),
    Case(
        "so is that of the last stage, though all is settled",
        finetunejob(SETTLED),
        [goes_on(EXPORT, since=-61)],
        Plan(SETTLED, (stop(EXPORT),), (beside(EXPORT),)),
    ),
    Case(
        "a pod that has ended as a whole is left alone, with its log",
        finetunejob(SETTLED),
        [job(EXPORT, **ended(0, said(EXPORT)))],
        unchanged(SETTLED),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan


def test_a_stopped_trainer_is_tried_again_though_its_pod_never_ends_by_itself() -> None:
    given = (finetunejob(training()), [goes_on(TRAIN, since=-60, code=14)])
    made = decide(Case("", *given, unchanged(training())))
    assert made.actions == (stop(TRAIN), start(TRAIN, 2))
    assert made.status.stages[1].failures == 0
