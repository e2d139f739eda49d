"""The plan when the spec changes while something runs: what goes on, and what is stopped."""

from __future__ import annotations

import pytest

from finetune_operator.api.observed import Phase, StageState
from finetune_operator.observe import Finish
from finetune_operator.plan import Plan
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    EXPORT,
    PREPARE,
    TRAIN,
    at,
    cached,
    ended,
    exported,
    failing,
    finetunejob,
    job,
    pending,
    pod,
    resolved,
    running,
    said,
    status,
    succeeded,
    trouble,
)
from tests.unit.operator.edits import (
    FIGURES,
    NEW_EXPORT,
    NEW_TRAIN,
    PREPARED,
    START_NEW_TRAIN,
    answer,
    preparing,
    training_anew,
    working,
)
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    start,
    started,
    stop,
    stopped,
    unchanged,
    was_cached,
)

CASES = [
    Case(
        "a training goes on while prepare looks at the new spec",
        finetunejob(
            preparing(running(TRAIN, fingerprint="train-a"), pending(EXPORT)), generation=2
        ),
        [job(PREPARE, key="2"), job(TRAIN)],
        unchanged(preparing(running(TRAIN, fingerprint="train-a"), pending(EXPORT))),
    ),
    Case(
        "a training that the edit doesn't touch is left alone",
        finetunejob(
            preparing(
                running(TRAIN, fingerprint="train-a"), pending(EXPORT, fingerprint="export-a")
            ),
            generation=2,
        ),
        [answer([PREPARE], NEW_EXPORT), job(TRAIN)],
        Plan(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                running(TRAIN, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-b"),
                resolved=NEW_EXPORT,
                metrics={},
            ),
            events=(finished(PREPARE),),
        ),
    ),
    Case(
        "a training that the edit changes is stopped, and started anew when it has stopped",
        finetunejob(
            preparing(running(TRAIN, fingerprint="train-a"), pending(EXPORT)), generation=2
        ),
        [answer([PREPARE], NEW_TRAIN), job(TRAIN)],
        Plan(
            working(
                Phase.WAITING,
                TRAIN,
                PREPARED,
                pending(TRAIN, fingerprint="train-b"),
                pending(EXPORT, fingerprint="export-b"),
                resolved=NEW_TRAIN,
                metrics={},
                conditions=trouble(
                    Phase.WAITING,
                    ("Stopping", "train starts when its earlier pod has stopped."),
                    None,
                    generation=2,
                ),
            ),
            (stop(TRAIN),),
            (finished(PREPARE), stopped(TRAIN)),
        ),
    ),
    Case(
        "a training that the edit makes superfluous is stopped",
        finetunejob(
            preparing(running(TRAIN, fingerprint="train-a"), pending(EXPORT)), generation=2
        ),
        [answer([TRAIN], NEW_TRAIN), job(TRAIN)],
        Plan(
            working(
                Phase.EXPORTING,
                EXPORT,
                PREPARED,
                cached(TRAIN, "train-b"),
                running(EXPORT, fingerprint="export-b"),
                resolved=NEW_TRAIN,
                metrics={},
            ),
            (stop(TRAIN), start(EXPORT, found=NEW_TRAIN, key="export-b")),
            (finished(PREPARE), was_cached(TRAIN), stopped(TRAIN), started(EXPORT)),
        ),
    ),
    Case(
        "the prepare of an earlier spec is stopped before the next one starts",
        finetunejob(
            status(Phase.PREPARING, PREPARE, running(PREPARE), pending(TRAIN), pending(EXPORT)),
            generation=2,
        ),
        [job(PREPARE)],
        Plan(
            working(
                Phase.WAITING,
                PREPARE,
                pending(PREPARE),
                pending(TRAIN),
                pending(EXPORT),
                conditions=trouble(
                    Phase.WAITING,
                    ("Stopping", "prepare starts when its earlier pod has stopped."),
                    None,
                    generation=2,
                ),
            ),
            (stop(PREPARE),),
            (stopped(PREPARE),),
        ),
    ),
    Case(
        "a prepare starts when that of the earlier spec is gone",
        finetunejob(
            working(
                Phase.PENDING,
                PREPARE,
                pending(PREPARE),
                pending(TRAIN),
                pending(EXPORT),
                conditions=(),
            ),
            generation=2,
        ),
        [],
        Plan(
            preparing(pending(TRAIN), pending(EXPORT)).model_copy(
                update={
                    "stages": (running(PREPARE), pending(TRAIN), pending(EXPORT)),
                }
            ),
            (start(PREPARE, key="2"),),
            (started(PREPARE),),
        ),
    ),
    Case(
        "a stage starts when its stopped Job is still there, but has ended",
        finetunejob(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                pending(TRAIN, fingerprint="train-b"),
                pending(EXPORT, fingerprint="export-b"),
                resolved=NEW_TRAIN,
            ),
            generation=2,
        ),
        [job(TRAIN, finished=Finish.FAILED, finished_at=at(-5), pod=pod(exit_code=14))],
        Plan(
            training_anew(),
            (START_NEW_TRAIN,),
            (started(TRAIN),),
        ),
    ),
    Case(
        "a training that ends while prepare looks is taken in, and kept",
        finetunejob(
            preparing(
                running(TRAIN, fingerprint="train-a", since=-300),
                pending(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
            ),
            generation=2,
        ),
        [job(PREPARE, key="2"), job(TRAIN, **ended(0, said(TRAIN, metrics=FIGURES)))],
        Plan(
            preparing(
                succeeded(TRAIN, since=-300, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
                metrics=FIGURES,
            ),
            events=(finished(TRAIN),),
        ),
    ),
    Case(
        "an edit back to a spec whose old Jobs are still there takes a new number",
        finetunejob(
            preparing(running(TRAIN, fingerprint="train-b"), pending(EXPORT)), generation=2
        ),
        [
            answer([PREPARE]),
            job(TRAIN, 3, **ended(0, said(TRAIN)), created=at(-600)),
            job(TRAIN, key="train-b", name="train-b-1", deleting=True),
        ],
        Plan(
            working(
                Phase.WAITING,
                TRAIN,
                PREPARED,
                pending(TRAIN, fingerprint="train-a", attempt=3),
                pending(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
                metrics={},
                conditions=trouble(
                    Phase.WAITING,
                    ("Stopping", "train starts when its earlier pod has stopped."),
                    None,
                    generation=2,
                ),
            ),
            events=(finished(PREPARE),),
        ),
    ),
    Case(
        "an export of the earlier spec that ends late is not shown as the result",
        finetunejob(
            preparing(
                succeeded(TRAIN, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-b"),
                resolved=NEW_EXPORT,
            ),
            generation=2,
        ),
        [job(PREPARE, key="2"), job(EXPORT, **ended(0, exported()))],
        unchanged(
            preparing(
                succeeded(TRAIN, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-b"),
                resolved=NEW_EXPORT,
            )
        ),
    ),
    Case(
        "a Job that no stage claims any more is stopped",
        finetunejob(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                failing(
                    TRAIN,
                    Reason.INTERNAL_ERROR,
                    "no luck",
                    state=StageState.PENDING,
                    fingerprint="train-a",
                ),
                pending(EXPORT, fingerprint="export-a"),
                conditions=trouble(
                    Phase.TRAINING,
                    ("Retrying", "Attempt 2 of train follows. The last one ended: no luck"),
                    ("InternalError", "no luck"),
                    generation=2,
                ),
            ),
            generation=2,
        ),
        [job(TRAIN)],
        Plan(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                failing(
                    TRAIN,
                    Reason.INTERNAL_ERROR,
                    "no luck",
                    state=StageState.PENDING,
                    fingerprint="train-a",
                ),
                pending(EXPORT, fingerprint="export-a"),
                conditions=trouble(
                    Phase.TRAINING,
                    ("Retrying", "Attempt 2 of train follows. The last one ended: no luck"),
                    ("InternalError", "no luck"),
                    generation=2,
                ),
            ),
            (stop(TRAIN),),
            (stopped(TRAIN),),
            requeue_after=10,
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan
