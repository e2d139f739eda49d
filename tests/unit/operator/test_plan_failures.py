"""The plan when a stage ends badly: what no further attempt can cure."""

from __future__ import annotations

import pytest

from finetune_operator.api.observed import Phase
from finetune_operator.observe import Finish
from finetune_operator.plan import Plan
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    PREPARE,
    TRAIN,
    at,
    dead,
    ended,
    failing,
    finetunejob,
    job,
    planned,
    pod,
    prepared,
    resolved,
    running,
    said,
    spec,
    status,
)
from tests.unit.operator.endings import (
    CRASH,
    DONE,
    EMPTY,
    EVICTED,
    FULL,
    FULL_MESSAGE,
    LAST,
    PREPARING,
    prepare_fails,
    train_fails,
    training,
)
from tests.unit.operator.expect import (
    Case,
    decide,
    unchanged,
    warning,
)

FAILING_EDIT = status(
    Phase.PREPARING,
    PREPARE,
    running(PREPARE, since=-60),
    running(TRAIN, fingerprint="train-a", since=-60),
    LAST,
    generation=2,
    resolved=resolved(),
)

CASES = [
    Case(
        "bad data fails at once, with the trainer's own words",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(10, said(PREPARE, Reason.DATASET_EMPTY, message=EMPTY)))],
        prepare_fails(Reason.DATASET_EMPTY, EMPTY),
    ),
    Case(
        "refused credentials fail at once",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(11, said(PREPARE, Reason.STORAGE_ACCESS_DENIED, message="no")))],
        prepare_fails(Reason.STORAGE_ACCESS_DENIED, "no"),
    ),
    Case(
        "an output that belongs to another FineTuneJob fails at once",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(11, said(PREPARE, Reason.OUTPUT_IN_USE, message="it is a/b's")))],
        prepare_fails(Reason.OUTPUT_IN_USE, "it is a/b's"),
    ),
    Case(
        "bad data fails at once even in a pod that was evicted meanwhile",
        finetunejob(PREPARING),
        [
            job(
                PREPARE,
                **ended(
                    10,
                    said(PREPARE, Reason.DATASET_EMPTY, message=EMPTY),
                    disruption=EVICTED,
                ),
            )
        ],
        prepare_fails(Reason.DATASET_EMPTY, EMPTY),
    ),
    Case(
        "bad input without a word is told by the exit code",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(10, last_log_line="no such file"))],
        prepare_fails(Reason.DATASET_UNREADABLE, "prepare ended with exit code 10: no such file"),
    ),
    Case(
        "a job that has failed is left alone",
        finetunejob(prepare_fails(Reason.DATASET_EMPTY, EMPTY).status),
        [job(PREPARE, **ended(10))],
        unchanged(prepare_fails(Reason.DATASET_EMPTY, EMPTY).status),
    ),
    Case(
        "after the last attempt that backoffLimit allows, the job fails",
        finetunejob(training(attempt=3, failures=2)),
        [job(TRAIN, 3, **ended(1, last_log_line="RuntimeError: no luck"))],
        train_fails(
            Reason.INTERNAL_ERROR,
            f"{CRASH} It failed 3 times; spec.backoffLimit is 2.",
            attempt=3,
            failures=3,
        ),
    ),
    Case(
        "with backoffLimit 0 the first failure is the last",
        finetunejob(training(), spec=spec(backoffLimit=0)),
        [job(TRAIN, **ended(1, last_log_line="RuntimeError: no luck"))],
        train_fails(Reason.INTERNAL_ERROR, f"{CRASH} It failed once; spec.backoffLimit is 0."),
    ),
    Case(
        "out of GPU memory is never tried again",
        finetunejob(training()),
        [job(TRAIN, **ended(12, said(TRAIN, Reason.OUT_OF_GPU_MEMORY, message="lower it")))],
        train_fails(Reason.OUT_OF_GPU_MEMORY, "lower it"),
    ),
    Case(
        "a prepare that finds too little memory for the training is not tried again in vain",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(16, said(PREPARE, Reason.OUT_OF_MEMORY, message="raise it")))],
        prepare_fails(Reason.OUT_OF_MEMORY, "raise it"),
    ),
    Case(
        "nor is a training that no smaller pass could fit, though a worker was killed on the way",
        finetunejob(training()),
        [
            job(
                TRAIN,
                **ended(16, said(TRAIN, Reason.OUT_OF_MEMORY, message="raise it"), oom_killed=True),
            )
        ],
        train_fails(Reason.OUT_OF_MEMORY, "raise it"),
    ),
    Case(
        "too little memory without a word is told by the exit code",
        finetunejob(training()),
        [job(TRAIN, **ended(16))],
        train_fails(Reason.OUT_OF_MEMORY, "train ended with exit code 16; its log may say why."),
    ),
    Case(
        "a pod evicted for outgrowing its own disk limit is not tried again",
        finetunejob(training()),
        [
            job(
                TRAIN,
                finished=Finish.FAILED,
                finished_at=at(0),
                pod=pod(phase="Failed", out_of_disk=FULL),
            )
        ],
        train_fails(Reason.OUT_OF_DISK, FULL_MESSAGE),
    ),
    Case(
        "a prepare that fails leaves what the earlier spec has running alone",
        finetunejob(FAILING_EDIT, generation=2),
        [
            job(PREPARE, key="2", **ended(10, said(PREPARE, Reason.DATASET_EMPTY, message=EMPTY))),
            job(TRAIN),
        ],
        Plan(
            status(
                Phase.FAILED,
                PREPARE,
                failing(PREPARE, Reason.DATASET_EMPTY, EMPTY),
                running(TRAIN, fingerprint="train-a", since=-60),
                LAST,
                generation=2,
                resolved=resolved(),
                conditions=dead(
                    Reason.DATASET_EMPTY,
                    f"The new spec can't be reached: {EMPTY} The train of the former spec goes on.",
                    generation=2,
                ),
            ),
            events=(warning("DatasetEmpty", EMPTY),),
        ),
    ),
    Case(
        "a spec that can't be read fails the job, and leaves what runs alone",
        finetunejob(
            training(), generation=2, spec=None, spec_error="spec.training.epochs: too many"
        ),
        [job(TRAIN), job(PREPARE, **ended(0, prepared()))],
        Plan(
            status(
                Phase.FAILED,
                TRAIN,
                DONE,
                training().stages[1],
                LAST,
                generation=2,
                resolved=resolved(),
                planned=planned(1),
                conditions=dead("InvalidSpec", "spec.training.epochs: too many", generation=2),
            ),
            events=(warning("InvalidSpec", "spec.training.epochs: too many"),),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan
