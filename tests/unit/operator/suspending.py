"""A job that is being suspended, and one that is."""

from __future__ import annotations

from typing import Any

from finetune_operator.api import Condition
from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageState
from finetune_trainer.contract import Reason, Stage
from tests.unit.operator.build import (
    DONE_MESSAGE,
    EXPORT,
    FINE,
    PREPARE,
    TRAIN,
    Claim,
    at,
    conditions,
    finetunejob,
    pending,
    planned,
    pod,
    resolved,
    running,
    said,
    spec,
    stamp,
    status,
    trouble,
)
from tests.unit.operator.endings import (
    DONE,
    LAST,
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
