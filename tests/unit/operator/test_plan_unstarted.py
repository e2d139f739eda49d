"""The plan for an attempt that status names and that has no Job: it is started again, in time.

Somebody deleted the Job, or the operator died before it made it. Status takes nothing back
meanwhile: an attempt that was counted stays counted.
"""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.observed import FineTuneJobStatus
from finetune_operator.plan import Plan, Policy, StartStage, plan
from finetune_trainer.contract import Stage
from tests.unit.operator.build import NOW, PREPARE, SETTINGS, TRAIN, finetunejob, pod
from tests.unit.operator.endings import PREPARING, training


@pytest.mark.parametrize(
    ("status", "stage", "number"), [(training(attempt=3), TRAIN, 1), (PREPARING, PREPARE, 0)]
)
@pytest.mark.parametrize(
    ("hindrance", "reason"),
    [
        ({"denial": "exceeded quota: gpus"}, "RequestDenied"),
        ({"old_pods": {TRAIN: pod(), PREPARE: pod()}}, "Stopping"),
    ],
)
def test_it_stays_counted_while_it_can_not_be_started_again(
    status: FineTuneJobStatus, stage: Stage, number: int, hindrance: dict[str, Any], reason: str
) -> None:
    observed = finetunejob(status)
    made: Plan = plan(observed, [], SETTINGS, Policy(), NOW, **hindrance)
    assert made.actions == ()
    assert made.status.stages[number] == observed.status.stages[number]
    told = {each.type: each.reason for each in made.status.conditions}
    assert told["Progressing"] == reason

    again: Plan = plan(finetunejob(made.status), [], SETTINGS, Policy(), NOW)
    [begun] = again.actions
    assert isinstance(begun, StartStage)
    assert (begun.stage, begun.attempt) == (stage, observed.status.stages[number].attempt)
