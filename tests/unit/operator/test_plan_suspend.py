"""The plan while spec.suspend is true, and when it is false again."""

from __future__ import annotations

import pytest

from finetune_operator.api.observed import FineTuneJobStatus, Phase
from finetune_operator.plan import Plan, Policy, plan
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    ALL_DONE,
    DONE_MESSAGE,
    EXPORT,
    FINISHED,
    NOT_YET,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    at,
    dead,
    ended,
    exported,
    failing,
    finished_status,
    job,
    pending,
    planned,
    pod,
    prepared,
    resolved,
    running,
    said,
    status,
    succeeded,
    trouble,
)
from tests.unit.operator.endings import (
    CRASH,
    DONE,
    LAST,
    NOTHING_YET,
    PREPARING,
    RETRYING,
    training,
)
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    normal,
    stop,
    stopped,
    unchanged,
    warning,
)
from tests.unit.operator.suspending import (
    AT_REST,
    HALTED,
    LEAVES,
    NOTHING,
    READY,
    STOPPED_TRAIN,
    STOPS,
    TRAIN_RUNS,
    resting,
    stopping,
    suspended,
    waits,
)

CASES = [
    Case(
        "a training that runs is stopped",
        suspended(training()),
        [job(TRAIN)],
        Plan(
            stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved()),
            actions=(stop(TRAIN),),
            events=(stopped(TRAIN),),
        ),
    ),
    Case(
        "it has its grace period to save its last step",
        suspended(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved())),
        [job(TRAIN, **LEAVES)],
        Plan(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved()), requeue_after=161),
    ),
    Case(
        "its pod has ended, and is neither a failure nor a lost pod",
        suspended(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved())),
        [job(TRAIN, deleting=True, pod=ended(14, STOPPED_TRAIN, deleting=True)["pod"])],
        unchanged(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved())),
    ),
    Case(
        "its Job is gone: the job is suspended",
        suspended(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved())),
        [],
        Plan(AT_REST, events=(normal("Suspended", waits("train")),)),
    ),
    Case("nothing more happens then", suspended(AT_REST), [], unchanged(AT_REST)),
    Case(
        "a training that ended well in its grace period is done",
        suspended(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved())),
        [job(TRAIN, deleting=True, pod=ended(0, said(TRAIN), deleting=True)["pod"])],
        Plan(
            status(
                Phase.TRAINING,
                TRAIN,
                DONE,
                succeeded(TRAIN, fingerprint="train-a"),
                LAST,
                generation=2,
                conditions=trouble(Phase.TRAINING, ("Suspending", STOPS), None, generation=2),
                planned=planned(1),
                resolved=resolved(),
            ),
            events=(finished(TRAIN),),
        ),
    ),
    Case(
        "a prepare that runs is stopped",
        suspended(PREPARING),
        [job(PREPARE)],
        Plan(
            stopping(
                running(PREPARE, since=-60),
                *NOTHING_YET,
                words="prepare is being stopped, as spec.suspend asks.",
            ),
            actions=(stop(PREPARE),),
            events=(stopped(PREPARE),),
        ),
    ),
    Case(
        "the answer of a prepare that has just ended is taken in, and no training started",
        suspended(PREPARING),
        [job(PREPARE, **ended(0, prepared()))],
        Plan(
            resting(
                waits("train"),
                DONE,
                pending(TRAIN, fingerprint="train-a"),
                LAST,
                resolved=resolved(),
            ),
            events=(finished(PREPARE), normal("Suspended", waits("train"))),
        ),
    ),
    Case(
        "an export that has just ended makes it Ready",
        suspended(
            status(
                Phase.EXPORTING,
                EXPORT,
                DONE,
                succeeded(TRAIN, fingerprint="train-a"),
                running(EXPORT, fingerprint="export-a", since=-60),
                resolved=resolved(),
                metrics={"trainLoss": 0.5},
            )
        ),
        [job(EXPORT, **ended(0, exported()))],
        Plan(
            resting(NOTHING, DONE, *ALL_DONE[1:], ready=READY, **FINISHED),
            events=(
                finished(EXPORT),
                normal("Succeeded", DONE_MESSAGE),
                normal("Suspended", NOTHING),
            ),
        ),
    ),
    Case(
        "a job that has not begun stays so",
        suspended(FineTuneJobStatus(), generation=1),
        [],
        Plan(
            resting(waits("prepare"), pending(PREPARE), *NOTHING_YET, generation=1),
            events=(normal("Suspended", waits("prepare")),),
        ),
    ),
    Case(
        "a finished job stays Ready",
        suspended(finished_status(*ALL_DONE)),
        [],
        Plan(
            resting(NOTHING, *ALL_DONE, ready=READY, **FINISHED),
            events=(normal("Suspended", NOTHING),),
        ),
    ),
    Case(
        "an edit of a suspended job waits, and the former version stays Ready",
        suspended(
            resting(NOTHING, *ALL_DONE, ready=READY, **FINISHED),
            generation=3,
            training={"seed": 3},
        ),
        [],
        unchanged(
            resting(NOTHING, *ALL_DONE, ready=READY, ready_since=2, generation=3, **FINISHED)
        ),
    ),
    Case(
        "a failed job stays Degraded, and is not Stalled",
        suspended(
            status(
                Phase.FAILED,
                TRAIN,
                DONE,
                failing(TRAIN, Reason.OUT_OF_MEMORY, "raise it", fingerprint="train-a"),
                LAST,
                resolved=resolved(),
                conditions=dead(Reason.OUT_OF_MEMORY, "raise it"),
            )
        ),
        [],
        Plan(
            resting(
                waits("train"),
                DONE,
                failing(TRAIN, Reason.OUT_OF_MEMORY, "raise it", fingerprint="train-a"),
                LAST,
                degraded=(True, Reason.OUT_OF_MEMORY, "raise it"),
                resolved=resolved(),
            ),
            events=(normal("Suspended", waits("train")),),
        ),
    ),
    Case(
        "an attempt that is due is not made",
        suspended(RETRYING),
        [job(TRAIN, **ended(1))],
        Plan(
            resting(
                waits("train"),
                *RETRYING.stages,
                degraded=(True, Reason.INTERNAL_ERROR, CRASH),
                resolved=resolved(),
            ),
            events=(normal("Suspended", waits("train")),),
        ),
    ),
    Case(
        "a Job that status knows nothing of is stopped as well",
        suspended(
            status(
                Phase.TRAINING,
                TRAIN,
                DONE,
                pending(TRAIN, fingerprint="train-a"),
                LAST,
                resolved=resolved(),
            )
        ),
        [job(TRAIN)],
        Plan(
            stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved()),
            actions=(stop(TRAIN),),
            events=(stopped(TRAIN),),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_a_suspended_job(case: Case) -> None:
    assert decide(case) == case.plan


def test_it_is_not_suspended_before_the_last_pod_has_stopped() -> None:
    """The Job may be gone before its pod."""
    given = suspended(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved()))
    found = plan(given, [], SETTINGS, Policy(), NOW, old_pods={TRAIN: pod()})
    assert found.status.phase is Phase.TRAINING
    assert found.status.stages[1] == HALTED
    assert found.events == ()
    (progressing,) = [each for each in found.status.conditions if each.type == "Progressing"]
    assert (progressing.status, progressing.reason) == ("True", "Suspending")


def test_a_lost_node_is_told_while_it_stops() -> None:
    given = suspended(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved()))
    lost = pod(deleting=True, delete_by=at(-61), node="node-7")
    found = plan(given, [job(TRAIN, deleting=True, pod=lost)], SETTINGS, Policy(), NOW)
    degraded = {each.type: each for each in found.status.conditions}["Degraded"]
    assert (degraded.status, degraded.reason) == ("True", "NodeLost")
    assert "node-7" in degraded.message


def test_a_failed_stage_that_ended_while_it_was_stopped_is_told() -> None:
    given = suspended(training())
    found = plan(given, [job(TRAIN, **ended(1))], SETTINGS, Policy(), NOW)
    message = "train ended with exit code 1; its log may say why."
    assert found.status.phase is Phase.SUSPENDED
    assert found.events[0] == warning(Reason.INTERNAL_ERROR, message)
    assert found.status.stages[1].failures == 1
    assert NOT_YET not in {each.message for each in found.status.conditions}
