"""The plan when a stage ends badly: what is tried again, what it costs, and what is said."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobStatus, Phase, StageState
from finetune_operator.observe import Finish, ObservedPod
from finetune_operator.plan import Plan
from finetune_trainer.outcome import Reason
from tests.unit.operator.build import (
    EXPORT,
    PREPARE,
    TRAIN,
    Case,
    at,
    dead,
    decide,
    ended,
    failing,
    job,
    pending,
    pod,
    prepared,
    resolved,
    run,
    running,
    said,
    spec,
    start,
    started,
    status,
    stop,
    stopped,
    succeeded,
    trouble,
    unchanged,
    warning,
)

NOTHING_YET = (pending(TRAIN), pending(EXPORT))
PREPARING = status(Phase.PREPARING, PREPARE, running(PREPARE, since=-60), *NOTHING_YET)
DONE = succeeded(PREPARE, fingerprint="prepare-a")
LAST = pending(EXPORT, fingerprint="export-a")


def training(**fields: Any) -> FineTuneJobStatus:
    train = running(TRAIN, **{"fingerprint": "train-a", "since": -60, **fields})
    given: FineTuneJobStatus = status(Phase.TRAINING, TRAIN, DONE, train, LAST, resolved=resolved())
    return given


def prepare_fails(reason: Reason, message: str) -> Plan:
    """`prepare` has failed for good."""
    return Plan(
        status(
            Phase.FAILED,
            PREPARE,
            failing(PREPARE, reason, message),
            *NOTHING_YET,
            conditions=dead(reason, message),
        ),
        events=(warning(reason, message),),
    )


def train_fails(reason: Reason, message: str, **fields: Any) -> Plan:
    """`train` has failed for good."""
    return Plan(
        status(
            Phase.FAILED,
            TRAIN,
            DONE,
            failing(TRAIN, reason, message, fingerprint="train-a", **fields),
            LAST,
            resolved=resolved(),
            conditions=dead(reason, message),
        ),
        events=(warning(reason, message),),
    )


def train_retries(reason: Reason, message: str, after: float = 10, **fields: Any) -> Plan:
    """`train` will be tried again."""
    attempt = fields.get("attempt", 1)
    more = f"Attempt {attempt + 1} of train follows. The last one ended: {message}"
    again = failing(
        TRAIN, reason, message, state=StageState.PENDING, fingerprint="train-a", **fields
    )
    return Plan(
        status(
            Phase.TRAINING,
            TRAIN,
            DONE,
            again,
            LAST,
            resolved=resolved(),
            conditions=trouble(Phase.TRAINING, ("Retrying", more), (reason, message)),
        ),
        events=(warning(reason, message),),
        requeue_after=after,
    )


EMPTY = "s3://data/faq.csv has no rows."
CRASH = "train ended with exit code 1: RuntimeError: no luck"
EVICTED = "Evicted: The node was low on resource: memory."
EVICTED_MESSAGE = f"The pod of train was disrupted ({EVICTED})."
OOM = (
    "train was killed because it used more memory than it may. "
    "Raise spec.stages.train.resources.limits.memory."
)
FULL = "Pod ephemeral local storage usage exceeds the total limit of containers 10Gi."
FULL_MESSAGE = (
    "train used more disk than it may (Pod ephemeral local storage usage exceeds the total limit "
    "of containers 10Gi). Raise spec.stages.train.resources.limits.ephemeral-storage."
)
RETRY = failing(
    TRAIN, Reason.INTERNAL_ERROR, CRASH, state=StageState.PENDING, fingerprint="train-a"
)
RETRYING = train_retries(Reason.INTERNAL_ERROR, CRASH).status


def evicted(**fields: Any) -> ObservedPod:
    return pod(phase="Failed", started=False, disruption=EVICTED, **fields)


CASES = [
    Case(
        "bad data fails at once, with the trainer's own words",
        job(PREPARING),
        [run(PREPARE, **ended(10, said(PREPARE, Reason.DATASET_EMPTY, message=EMPTY)))],
        prepare_fails(Reason.DATASET_EMPTY, EMPTY),
    ),
    Case(
        "refused credentials fail at once",
        job(PREPARING),
        [run(PREPARE, **ended(11, said(PREPARE, Reason.STORAGE_ACCESS_DENIED, message="no")))],
        prepare_fails(Reason.STORAGE_ACCESS_DENIED, "no"),
    ),
    Case(
        "bad data fails at once even in a pod that was evicted meanwhile",
        job(PREPARING),
        [
            run(
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
        job(PREPARING),
        [run(PREPARE, **ended(10, last_words="no such file"))],
        prepare_fails(Reason.DATASET_UNREADABLE, "prepare ended with exit code 10: no such file"),
    ),
    Case(
        "a job that has failed is left alone",
        job(prepare_fails(Reason.DATASET_EMPTY, EMPTY).status),
        [run(PREPARE, **ended(10))],
        unchanged(prepare_fails(Reason.DATASET_EMPTY, EMPTY).status),
    ),
    Case(
        "an unknown failure is tried again after ten seconds, and counts",
        job(training()),
        [run(TRAIN, **ended(1, last_words="RuntimeError: no luck"))],
        train_retries(Reason.INTERNAL_ERROR, CRASH),
    ),
    Case(
        "a failure with an exit code that no one knows is tried again",
        job(training()),
        [run(TRAIN, **ended(139))],
        train_retries(
            Reason.INTERNAL_ERROR, "train ended with exit code 139; its log may say why."
        ),
    ),
    Case(
        "a store that is down is tried again",
        job(training()),
        [run(TRAIN, **ended(1, said(TRAIN, Reason.STORAGE_UNAVAILABLE, message="503")))],
        train_retries(Reason.STORAGE_UNAVAILABLE, "503"),
    ),
    Case(
        "the second pause is twice the first",
        job(training(attempt=2, failures=1)),
        [run(TRAIN, 2, **ended(1, last_words="RuntimeError: no luck"))],
        train_retries(Reason.INTERNAL_ERROR, CRASH, after=20, attempt=2, failures=2),
    ),
    Case(
        "no pause is longer than five minutes",
        job(training(attempt=40, failures=0)),
        [run(TRAIN, 40, **ended(1, last_words="RuntimeError: no luck"))],
        train_retries(Reason.INTERNAL_ERROR, CRASH, after=300, attempt=40, failures=1),
    ),
    Case(
        "during the pause nothing is done",
        job(RETRYING),
        [run(TRAIN, **{**ended(1), "finished_at": at(0)})],
        unchanged(RETRYING, requeue_after=10),
    ),
    Case(
        "after the pause the next attempt starts",
        job(
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
        [run(TRAIN, **ended(1))],
        Plan(
            training(attempt=2, failures=1, since=0),
            (start(TRAIN, 2),),
            (started(TRAIN, 2),),
        ),
    ),
    Case(
        "after the last attempt that backoffLimit allows, the job fails",
        job(training(attempt=3, failures=2)),
        [run(TRAIN, 3, **ended(1, last_words="RuntimeError: no luck"))],
        train_fails(
            Reason.INTERNAL_ERROR,
            f"{CRASH} It failed 3 times; spec.backoffLimit is 2.",
            attempt=3,
            failures=3,
        ),
    ),
    Case(
        "with backoffLimit 0 the first failure is the last",
        job(training(), spec=spec(backoffLimit=0)),
        [run(TRAIN, **ended(1, last_words="RuntimeError: no luck"))],
        train_fails(Reason.INTERNAL_ERROR, f"{CRASH} It failed once; spec.backoffLimit is 0."),
    ),
    Case(
        "an eviction is tried again free of charge",
        job(training(), spec=spec(backoffLimit=0)),
        [run(TRAIN, finished=Finish.FAILED, finished_at=at(0), pod=evicted())],
        train_retries(Reason.POD_DISRUPTED, EVICTED_MESSAGE, failures=0),
    ),
    Case(
        "an evicted pod of a Job that has not failed may be replaced by the Job itself",
        job(training()),
        [run(TRAIN, pod=evicted())],
        unchanged(training()),
    ),
    Case(
        "a trainer that was stopped is tried again free of charge",
        job(training()),
        [run(TRAIN, **ended(14, said(TRAIN, Reason.STOPPED, message="stopped at step 5")))],
        train_retries(Reason.STOPPED, "stopped at step 5", failures=0),
    ),
    Case(
        "a killed container of a deleted pod is tried again free of charge",
        job(training()),
        [run(TRAIN, **ended(137, deleting=True))],
        train_retries(
            Reason.POD_DISRUPTED,
            "The pod of train was disrupted (the pod was deleted).",
            failures=0,
        ),
    ),
    Case(
        "out of memory is tried again, and says which limit to raise",
        job(training()),
        [run(TRAIN, **ended(137, oom_killed=True))],
        train_retries(Reason.OUT_OF_MEMORY, OOM),
    ),
    Case(
        "out of GPU memory is never tried again",
        job(training()),
        [run(TRAIN, **ended(12, said(TRAIN, Reason.OUT_OF_GPU_MEMORY, message="lower it")))],
        train_fails(Reason.OUT_OF_GPU_MEMORY, "lower it"),
    ),
    Case(
        "a pod evicted for outgrowing its own disk limit is not tried again",
        job(training()),
        [
            run(
                TRAIN,
                finished=Finish.FAILED,
                finished_at=at(0),
                pod=pod(phase="Failed", out_of_disk=FULL),
            )
        ],
        train_fails(Reason.OUT_OF_DISK, FULL_MESSAGE),
    ),
    Case(
        "a pod that failed before it ran is tried again",
        job(training()),
        [
            run(
                TRAIN,
                finished=Finish.FAILED,
                finished_at=at(0),
                pod=pod(phase="Failed", started=False),
            )
        ],
        train_retries(Reason.INTERNAL_ERROR, "The pod of train failed before it ran."),
    ),
    Case(
        "a failed Job whose pod is gone for good is tried again, and counts",
        job(training()),
        [run(TRAIN, finished=Finish.FAILED, finished_at=at(-31), pod=None)],
        Plan(
            status(
                Phase.TRAINING,
                TRAIN,
                DONE,
                running(TRAIN, 2, fingerprint="train-a", failures=1),
                LAST,
                resolved=resolved(),
            ),
            (start(TRAIN, 2),),
            (
                warning(
                    "PodDisrupted",
                    "The Job train-1 ended, and its pod is gone with what it had to say.",
                ),
                started(TRAIN, 2),
            ),
        ),
    ),
    Case(
        "a prepare that ended well without a word is tried again",
        job(PREPARING),
        [run(PREPARE, **ended(0))],
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
        job(training()),
        [run(TRAIN, **ended(134, said(TRAIN)))],
        train_retries(
            Reason.INTERNAL_ERROR, "train ended with exit code 134; its log may say why."
        ),
    ),
    Case(
        "a prepare that fails stops what the earlier spec has running",
        job(
            status(
                Phase.PREPARING,
                PREPARE,
                running(PREPARE, since=-60),
                running(TRAIN, fingerprint="train-a"),
                LAST,
                generation=2,
                resolved=resolved(),
            ),
            generation=2,
        ),
        [
            run(
                PREPARE,
                key="2",
                **ended(10, said(PREPARE, Reason.DATASET_EMPTY, message=EMPTY)),
            ),
            run(TRAIN),
        ],
        Plan(
            status(
                Phase.FAILED,
                PREPARE,
                failing(PREPARE, Reason.DATASET_EMPTY, EMPTY),
                pending(TRAIN, fingerprint="train-a", attempt=1),
                LAST,
                generation=2,
                resolved=resolved(),
                conditions=dead(Reason.DATASET_EMPTY, EMPTY, generation=2),
            ),
            (stop(TRAIN),),
            (warning("DatasetEmpty", EMPTY), stopped(TRAIN)),
        ),
    ),
    Case(
        "a spec that can't be read fails the job, and stops what runs",
        job(training(), generation=2, spec=None, spec_error="spec.training.epochs: too many"),
        [run(TRAIN), run(PREPARE, **ended(0, prepared()))],
        Plan(
            status(
                Phase.FAILED,
                TRAIN,
                DONE,
                pending(TRAIN, fingerprint="train-a", attempt=1),
                LAST,
                generation=2,
                resolved=resolved(),
                conditions=dead("InvalidSpec", "spec.training.epochs: too many", generation=2),
            ),
            (stop(TRAIN),),
            (warning("InvalidSpec", "spec.training.epochs: too many"),),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan
