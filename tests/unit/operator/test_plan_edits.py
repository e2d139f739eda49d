"""The plan when the spec changes: what is kept, what is stopped, what is done again."""

from __future__ import annotations

import pytest

from finetune_operator.api.observed import Phase
from finetune_operator.plan import Plan
from tests.unit.operator.build import (
    DONE_MESSAGE,
    EXPORT,
    FINE,
    FINISHED,
    PREPARE,
    TRAIN,
    cached,
    conditions,
    dead,
    ended,
    finetunejob,
    finished_status,
    job,
    pending,
    resolved,
    running,
    status,
    succeeded,
)
from tests.unit.operator.edits import (
    EXPORTED,
    FAILED_BEFORE,
    FIGURES,
    FINISHED_BEFORE,
    NEW_EXPORT,
    NEW_TRAIN,
    PREPARED,
    START_NEW_TRAIN,
    TRAINED,
    answer,
    preparing,
    training_anew,
    working,
)
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    normal,
    start,
    started,
    was_cached,
)

CASES = [
    Case(
        "a changed spec runs prepare first, and the former version stays Ready",
        finetunejob(finished_status(succeeded(PREPARE), TRAINED, EXPORTED), generation=2),
        [],
        Plan(
            working(
                Phase.PREPARING,
                PREPARE,
                running(PREPARE),
                TRAINED,
                EXPORTED,
                conditions=conditions(
                    ready=(True, "Succeeded", DONE_MESSAGE),
                    progressing=(True, "Preparing", "prepare is at work, attempt 1."),
                    degraded=FINE,
                    generation=2,
                    ready_since=1,
                ),
                **FINISHED,
            ),
            (start(PREPARE, key="2"),),
            (started(PREPARE),),
        ),
    ),
    Case(
        "an edit that touches no stage is done when prepare has answered",
        finetunejob(FINISHED_BEFORE, generation=2),
        [answer([PREPARE, TRAIN, EXPORT])],
        Plan(
            finished_status(PREPARED, TRAINED, EXPORTED, generation=2),
            events=(finished(PREPARE), normal("Succeeded", DONE_MESSAGE)),
        ),
    ),
    Case(
        "another quantization exports anew, and trains nothing",
        finetunejob(FINISHED_BEFORE, generation=2),
        [answer([PREPARE, TRAIN], NEW_EXPORT)],
        Plan(
            working(
                Phase.EXPORTING,
                EXPORT,
                PREPARED,
                TRAINED,
                running(EXPORT, fingerprint="export-b"),
                **{**FINISHED, "resolved": NEW_EXPORT},
            ),
            (start(EXPORT, found=NEW_EXPORT, key="export-b"),),
            (finished(PREPARE), started(EXPORT)),
        ),
    ),
    Case(
        "another learning rate trains and exports anew",
        finetunejob(FINISHED_BEFORE, generation=2),
        [answer([PREPARE], NEW_TRAIN)],
        Plan(
            training_anew(**{**FINISHED, "resolved": NEW_TRAIN, "metrics": {}}),
            (START_NEW_TRAIN,),
            (finished(PREPARE), started(TRAIN)),
        ),
    ),
    Case(
        "an edit back to what the store still holds trains nothing",
        finetunejob(FINISHED_BEFORE, generation=2),
        [answer([PREPARE, TRAIN], NEW_TRAIN, metrics=FIGURES)],
        Plan(
            working(
                Phase.EXPORTING,
                EXPORT,
                PREPARED,
                cached(TRAIN, "train-b"),
                running(EXPORT, fingerprint="export-b"),
                **{**FINISHED, "resolved": NEW_TRAIN, "metrics": FIGURES},
            ),
            (start(EXPORT, found=NEW_TRAIN, key="export-b"),),
            (finished(PREPARE), was_cached(TRAIN), started(EXPORT)),
        ),
    ),
    Case(
        "a store that was emptied is filled again, whatever status remembers",
        finetunejob(FINISHED_BEFORE, generation=2),
        [answer()],
        Plan(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                running(TRAIN, 2, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-a", attempt=1),
                **{**FINISHED, "metrics": {}},
            ),
            (start(TRAIN, 2),),
            (finished(PREPARE), started(TRAIN, 2)),
        ),
    ),
    Case(
        "what came into the store after prepare looked is not done again",
        finetunejob(
            preparing(
                succeeded(TRAIN, since=-300, until=-30, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-a"),
                metrics=FIGURES,
            ),
            generation=2,
        ),
        [answer([PREPARE], NEW_EXPORT)],
        Plan(
            working(
                Phase.EXPORTING,
                EXPORT,
                PREPARED,
                succeeded(TRAIN, since=-300, until=-30, fingerprint="train-a"),
                running(EXPORT, fingerprint="export-b"),
                resolved=NEW_EXPORT,
                metrics=FIGURES,
            ),
            (start(EXPORT, found=NEW_EXPORT, key="export-b"),),
            (finished(PREPARE), started(EXPORT)),
        ),
    ),
    Case(
        "a stage that failed before is tried again under the new spec, with a fresh count",
        finetunejob(
            preparing(FAILED_BEFORE, pending(EXPORT, fingerprint="export-a")), generation=2
        ),
        [answer([PREPARE]), job(TRAIN, **ended(12))],
        Plan(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                running(TRAIN, 2, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
                metrics={},
            ),
            (start(TRAIN, 2),),
            (finished(PREPARE), started(TRAIN, 2)),
        ),
    ),
    Case(
        "a failed job whose spec changes begins with prepare",
        finetunejob(
            status(
                Phase.FAILED,
                TRAIN,
                succeeded(PREPARE),
                FAILED_BEFORE,
                pending(EXPORT),
                conditions=dead("OutOfGPUMemory", "lower it"),
            ),
            generation=2,
        ),
        [],
        Plan(
            preparing(FAILED_BEFORE, pending(EXPORT)).model_copy(
                update={"stages": (running(PREPARE), FAILED_BEFORE, pending(EXPORT))}
            ),
            (start(PREPARE, key="2"),),
            (started(PREPARE),),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan
