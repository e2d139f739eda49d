"""The plan while spec.suspend is true, and when it is false again."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api import Condition
from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageState
from finetune_operator.observe import ObservedFineTuneJob
from finetune_operator.plan import Plan, Policy, plan
from finetune_trainer.contract import Reason, Stage
from tests.unit.operator.build import (
    ALL_DONE,
    DONE_MESSAGE,
    EXPORT,
    FINE,
    FINISHED,
    NOT_YET,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    Claim,
    at,
    conditions,
    dead,
    ended,
    exported,
    failing,
    finetunejob,
    finished_status,
    job,
    pending,
    planned,
    pod,
    prepared,
    resolved,
    running,
    said,
    spec,
    stamp,
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
    start,
    started,
    stop,
    stopped,
    unchanged,
    warning,
)

READY: Claim = (True, "Succeeded", DONE_MESSAGE)
STOPS = "train is being stopped, as spec.suspend asks; a training saves its last step first."


def suspended(before: FineTuneJobStatus, generation: int = 2, **changes: Any) -> Any:
    """What is observed: the user has just set spec.suspend."""
    given = spec(suspend=True, **changes)
    return finetunejob(before, generation=generation, spec=given)


def resting(
    words: str,
    *stages: Any,
    ready: Claim | None = None,
    degraded: Claim = FINE,
    ready_since: int | None = None,
    generation: int = 2,
    **fields: Any,
) -> FineTuneJobStatus:
    """The status of a suspended job, in which nothing runs any more."""
    claims = conditions(
        ready=ready or (False, "Suspended", words),
        progressing=(False, "Suspended", words),
        degraded=degraded,
        generation=generation,
        ready_since=ready_since,
    )
    held = Condition(
        type="Suspended",
        status="True",
        reason="Suspended",
        message=words,
        observed_generation=generation,
        last_transition_time=stamp(0),
    )
    left = [each.name for each in stages if each.state is not StageState.SUCCEEDED]
    given: FineTuneJobStatus = status(
        Phase.SUSPENDED,
        left[0] if left else EXPORT,
        *stages,
        generation=generation,
        conditions=(*(each for each in claims if each.type != "Stalled"), held),
        **{"planned": planned(1), **fields},
    )
    return given


def stopping(*stages: Any, words: str = STOPS, **fields: Any) -> FineTuneJobStatus:
    """The status while a stage saves its work."""
    shown: Stage = next(each.name for each in stages if each.state is StageState.RUNNING)
    phase = {PREPARE: Phase.PREPARING, TRAIN: Phase.TRAINING, EXPORT: Phase.EXPORTING}[shown]
    given: FineTuneJobStatus = status(
        phase,
        shown,
        *stages,
        generation=2,
        conditions=trouble(phase, ("Suspending", words), None, generation=2),
        **{"planned": planned(1), **fields},
    )
    return given


def waits(stage: str) -> str:
    return f"{stage} is not started until spec.suspend is false."


TRAIN_RUNS = running(TRAIN, fingerprint="train-a", since=-60)
HALTED = pending(TRAIN, fingerprint="train-a", attempt=1)
AT_REST = resting(waits("train"), DONE, HALTED, LAST, resolved=resolved())
STOPPED_TRAIN = said(TRAIN, Reason.STOPPED, message="Stopped; it goes on from step 12.")
LEAVING = pod(deleting=True, delete_by=at(100))
LEAVES: dict[str, Any] = {"deleting": True, "pod": LEAVING}
NOTHING = "Nothing is started until spec.suspend is false."


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
        unchanged(stopping(DONE, TRAIN_RUNS, LAST, resolved=resolved())),
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
    found = plan(given, [], SETTINGS, Policy(), NOW, stages_with_old_pods=frozenset({TRAIN}))
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


def test_a_failed_stage_that_ended_while_it_was_stopped_is_told() -> None:
    given = suspended(training())
    found = plan(given, [job(TRAIN, **ended(1))], SETTINGS, Policy(), NOW)
    message = "train ended with exit code 1; its log may say why."
    assert found.status.phase is Phase.SUSPENDED
    assert found.events[0] == warning(Reason.INTERNAL_ERROR, message)
    assert found.status.stages[1].failures == 1
    assert NOT_YET not in {each.message for each in found.status.conditions}
