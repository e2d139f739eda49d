"""The plan when the spec changes: what is kept, what is stopped, what is done again."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobStatus, Phase, StageState
from finetune_operator.observe import Finish
from finetune_operator.plan import Plan
from finetune_trainer.outcome import Reason
from tests.unit.operator.build import (
    DONE_MESSAGE,
    EARLIER,
    EXPORT,
    FINE,
    FINISHED,
    PREPARE,
    TRAIN,
    Case,
    at,
    cached,
    conditions,
    dead,
    decide,
    ended,
    exported,
    failing,
    finished,
    finished_status,
    job,
    normal,
    pending,
    prepared,
    resolved,
    run,
    running,
    said,
    start,
    started,
    status,
    stop,
    stopped,
    succeeded,
    trouble,
    unchanged,
    was_cached,
)

TRAINED = succeeded(TRAIN, since=-600, until=-300, fingerprint="train-a")
EXPORTED = succeeded(EXPORT, since=-300, until=-200, fingerprint="export-a")
PREPARED = succeeded(PREPARE, since=-60, fingerprint="prepare-a")
FIGURES = {"trainLoss": 0.4}


def preparing(train: Any, export: Any, **fields: Any) -> FineTuneJobStatus:
    """The second generation's `prepare` runs since a minute ago."""
    given: FineTuneJobStatus = status(
        Phase.PREPARING,
        PREPARE,
        running(PREPARE, since=-60),
        train,
        export,
        generation=2,
        **fields,
    )
    return given


def answer(*args: Any, **fields: Any) -> Any:
    """The Job of the second generation's `prepare`, with its answer."""
    return run(PREPARE, key="2", **ended(0, prepared(*args, **fields)))


def working(phase: Phase, stage: Any, *stages: Any, **fields: Any) -> FineTuneJobStatus:
    given: FineTuneJobStatus = status(phase, stage, *stages, generation=2, **fields)
    return given


FINISHED_BEFORE = preparing(TRAINED, EXPORTED, **FINISHED)
NEW_EXPORT = resolved(export="export-b")
NEW_TRAIN = resolved(train="train-b", export="export-b")
FAILED_BEFORE = failing(TRAIN, Reason.OUT_OF_GPU_MEMORY, "lower it", fingerprint="train-a")

CASES = [
    Case(
        "a changed spec runs prepare first, and keeps the artifacts in sight",
        job(finished_status(succeeded(PREPARE), TRAINED, EXPORTED), generation=2),
        [],
        Plan(
            working(
                Phase.PREPARING,
                PREPARE,
                running(PREPARE),
                TRAINED,
                EXPORTED,
                conditions=conditions(
                    ready=(False, "Preparing", EARLIER),
                    progressing=(True, "Preparing", "prepare is at work, attempt 1."),
                    degraded=FINE,
                    generation=2,
                ),
                **FINISHED,
            ),
            (start(PREPARE, key="2"),),
            (started(PREPARE),),
        ),
    ),
    Case(
        "an edit that touches no stage is done when prepare has answered",
        job(FINISHED_BEFORE, generation=2),
        [answer([PREPARE, TRAIN, EXPORT])],
        Plan(
            finished_status(PREPARED, TRAINED, EXPORTED, generation=2),
            events=(finished(PREPARE), normal("Succeeded", DONE_MESSAGE)),
        ),
    ),
    Case(
        "another quantization exports anew, and trains nothing",
        job(FINISHED_BEFORE, generation=2),
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
        job(FINISHED_BEFORE, generation=2),
        [answer([PREPARE], NEW_TRAIN)],
        Plan(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                running(TRAIN, fingerprint="train-b"),
                pending(EXPORT, fingerprint="export-b"),
                **{**FINISHED, "resolved": NEW_TRAIN, "metrics": {}},
            ),
            (start(TRAIN, found=NEW_TRAIN, key="train-b"),),
            (finished(PREPARE), started(TRAIN)),
        ),
    ),
    Case(
        "an edit back to what the store still holds trains nothing",
        job(FINISHED_BEFORE, generation=2),
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
        job(FINISHED_BEFORE, generation=2),
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
        "a training goes on while prepare looks at the new spec",
        job(preparing(running(TRAIN, fingerprint="train-a"), pending(EXPORT)), generation=2),
        [run(PREPARE, key="2"), run(TRAIN)],
        unchanged(preparing(running(TRAIN, fingerprint="train-a"), pending(EXPORT))),
    ),
    Case(
        "a training that the edit doesn't touch is left alone",
        job(
            preparing(
                running(TRAIN, fingerprint="train-a"), pending(EXPORT, fingerprint="export-a")
            ),
            generation=2,
        ),
        [answer([PREPARE], NEW_EXPORT), run(TRAIN)],
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
        job(preparing(running(TRAIN, fingerprint="train-a"), pending(EXPORT)), generation=2),
        [answer([PREPARE], NEW_TRAIN), run(TRAIN)],
        Plan(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                pending(TRAIN, fingerprint="train-b"),
                pending(EXPORT, fingerprint="export-b"),
                resolved=NEW_TRAIN,
                metrics={},
                conditions=trouble(
                    Phase.TRAINING,
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
        job(preparing(running(TRAIN, fingerprint="train-a"), pending(EXPORT)), generation=2),
        [answer([TRAIN], NEW_TRAIN), run(TRAIN)],
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
        job(
            status(Phase.PREPARING, PREPARE, running(PREPARE), pending(TRAIN), pending(EXPORT)),
            generation=2,
        ),
        [run(PREPARE)],
        Plan(
            working(
                Phase.PENDING,
                PREPARE,
                pending(PREPARE),
                pending(TRAIN),
                pending(EXPORT),
                conditions=trouble(
                    Phase.PENDING,
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
        job(
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
        job(
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
        [run(TRAIN, finished=Finish.FAILED, finished_at=at(-5))],
        Plan(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                running(TRAIN, fingerprint="train-b"),
                pending(EXPORT, fingerprint="export-b"),
                resolved=NEW_TRAIN,
            ),
            (start(TRAIN, found=NEW_TRAIN, key="train-b"),),
            (started(TRAIN),),
        ),
    ),
    Case(
        "a training that ends while prepare looks is taken in, and kept",
        job(
            preparing(
                running(TRAIN, fingerprint="train-a", since=-300),
                pending(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
            ),
            generation=2,
        ),
        [run(PREPARE, key="2"), run(TRAIN, **ended(0, said(TRAIN, metrics=FIGURES)))],
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
        "what came into the store after prepare looked is not done again",
        job(
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
        job(preparing(FAILED_BEFORE, pending(EXPORT, fingerprint="export-a")), generation=2),
        [answer([PREPARE]), run(TRAIN, **ended(12))],
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
        job(
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
    Case(
        "an edit back to a spec whose old Jobs are still there takes a new number",
        job(preparing(running(TRAIN, fingerprint="train-b"), pending(EXPORT)), generation=2),
        [
            answer([PREPARE]),
            run(TRAIN, 3, **ended(0, said(TRAIN))),
            run(TRAIN, key="train-b", name="train-b-1", deleting=True),
        ],
        Plan(
            working(
                Phase.TRAINING,
                TRAIN,
                PREPARED,
                pending(TRAIN, fingerprint="train-a", attempt=3),
                pending(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
                metrics={},
                conditions=trouble(
                    Phase.TRAINING,
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
        job(
            preparing(
                succeeded(TRAIN, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-b"),
                resolved=NEW_EXPORT,
            ),
            generation=2,
        ),
        [run(PREPARE, key="2"), run(EXPORT, **ended(0, exported()))],
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
        job(
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
        [run(TRAIN)],
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
