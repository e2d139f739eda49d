"""The plan after an edit that reruns nothing, and after one that can't be reached.

A finished model stays Ready, and what runs goes on.
"""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api import Condition
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageState
from finetune_operator.observe import ObservedJob
from finetune_operator.plan import Plan, Policy, plan, refuse
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    ALL_DONE,
    DONE_MESSAGE,
    EXPORT,
    FINISHED,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    conditions,
    ended,
    failing,
    finetunejob,
    finished_status,
    job,
    planned,
    prepared,
    resolved,
    said,
    spec,
    spec_of,
    stamp,
    status,
)
from tests.unit.operator.endings import EMPTY, LAST, training
from tests.unit.operator.expect import start, unexplained, warning

DONE = finished_status(*ALL_DONE)
MORE_MEMORY = {"resources": {"limits": {"memory": "8Gi"}}}
UNTOUCHED: list[Any] = [
    pytest.param({"ttlSecondsAfterFinished": 60}, id="how long pods are kept"),
    pytest.param({"backoffLimit": 5}, id="how often a stage is tried"),
    pytest.param({"stages": {"train": MORE_MEMORY}}, id="resources of a stage that is done"),
    pytest.param({"storage": {"secretRef": {"name": "new"}}}, id="another Secret"),
]


def edited(before: FineTuneJobStatus, given: FineTuneJobSpec, *jobs: ObservedJob) -> Plan:
    """The plan for the second generation."""
    return plan(finetunejob(before, generation=2, spec=given), jobs, SETTINGS, Policy(), NOW)


def ready(made: Plan) -> Condition:
    return made.status.conditions[0]


@pytest.mark.parametrize("change", UNTOUCHED)
def test_an_edit_that_no_fingerprint_knows_keeps_a_finished_job_ready(
    change: dict[str, Any],
) -> None:
    made = edited(DONE, spec(**change))
    assert made == Plan(finished_status(*ALL_DONE, generation=2, planned=planned(1)))


def test_an_edit_that_no_fingerprint_knows_leaves_a_running_training_alone() -> None:
    made = edited(training(), spec(backoffLimit=5), job(TRAIN))
    assert (made.actions, made.events) == ((), ())
    assert made.status.stages == training().stages
    assert made.status.observed_generation == 2


def test_other_resources_of_a_training_to_come_are_planned_for() -> None:
    made = edited(training(), spec(stages={"train": MORE_MEMORY}), job(TRAIN))
    assert made.actions == (start(PREPARE, key="2"),)
    assert made.status.planned is not None
    assert made.status.planned.generation == 2


def test_an_edit_after_a_failure_looks_again_whatever_it_touches() -> None:
    failed = status(
        Phase.FAILED, PREPARE, failing(PREPARE, Reason.DATASET_EMPTY, EMPTY), conditions=()
    )
    assert edited(failed, spec(backoffLimit=5)).actions == (start(PREPARE, key="2"),)


def preparing() -> FineTuneJobStatus:
    """The second generation's prepare runs, and a model is there."""
    return edited(DONE, spec_of(2)).status


BAD = job(PREPARE, key="2", **ended(10, said(PREPARE, Reason.DATASET_EMPTY, message=EMPTY)))


def test_a_spec_that_cannot_be_reached_leaves_the_former_version_current() -> None:
    made = unexplained(edited(preparing(), spec_of(2), BAD))
    words = f"The new spec can't be reached: {EMPTY} The former version stays current."
    no_more = (
        "No further attempt is made until the spec changes, or the annotation "
        "finetune.dev/retry-requested-at asks for one."
    )
    assert made == Plan(
        status(
            Phase.FAILED,
            PREPARE,
            failing(PREPARE, Reason.DATASET_EMPTY, EMPTY).model_copy(
                update={"start_time": preparing().stages[0].start_time}
            ),
            *ALL_DONE[1:],
            generation=2,
            conditions=conditions(
                ready=(True, "Succeeded", DONE_MESSAGE),
                progressing=(False, "DatasetEmpty", no_more),
                degraded=(True, "DatasetEmpty", words),
                generation=2,
                ready_since=1,
            ),
            **FINISHED,
        ),
        events=(warning("DatasetEmpty", EMPTY),),
    )
    assert edited(made.status, spec_of(2), BAD) == Plan(made.status), "settled"


def test_a_training_of_the_former_spec_is_followed_to_its_end_and_no_further() -> None:
    first = edited(training(), spec_of(2), job(TRAIN)).status
    stuck = edited(first, spec_of(2), BAD, job(TRAIN)).status
    assert stuck.phase is Phase.FAILED
    assert edited(stuck, spec_of(2), BAD, job(TRAIN)) == Plan(stuck)
    over = edited(stuck, spec_of(2), BAD, job(TRAIN, **ended(0, said(TRAIN))))
    assert over.actions == ()
    assert over.status.stages[1].state is StageState.SUCCEEDED
    assert edited(over.status, spec_of(2)) == Plan(over.status), "settled"


def test_a_training_that_has_not_started_is_not_made_anew_for_a_spec_that_cannot_be() -> None:
    waits = job(TRAIN, pod=None, pod_settings="older", created=NOW)
    first = edited(training(), spec_of(2), waits).status
    assert first.stages[1].state is StageState.PENDING, "it was, while there was hope"
    stuck = status(
        Phase.FAILED,
        PREPARE,
        failing(PREPARE, Reason.DATASET_EMPTY, EMPTY),
        training().stages[1],
        LAST,
        generation=2,
        resolved=resolved(),
        conditions=(),
    )
    assert edited(stuck, spec_of(2), waits).actions == ()


def test_a_spec_that_the_server_refuses_leaves_the_former_version_current() -> None:
    second = finetunejob(DONE, generation=2)
    refused = refuse(second, Reason.INVALID_SPEC, "cpu: lots", NOW)
    assert ready(refused) == ready(Plan(DONE))
    assert refused.status.phase is Phase.FAILED
    # The refusal came from the API server, so each pass tries again. It must not take the former
    # version for what this spec asks for.
    assert edited(refused.status, spec_of(2)).actions == (start(PREPARE, key="2"),)
    mended = plan(
        finetunejob(refused.status, generation=3, spec=spec_of(1)), [], SETTINGS, Policy(), NOW
    )
    assert mended.status.phase is Phase.SUCCEEDED
    assert mended.actions == ()


def test_a_version_that_the_store_has_lost_is_not_ready() -> None:
    long_ago = (each.model_copy(update={"completion_time": stamp(-600)}) for each in ALL_DONE)
    before = edited(finished_status(*long_ago), spec_of(2)).status
    made = edited(before, spec_of(2), job(PREPARE, key="2", **ended(0, prepared())))
    assert ready(made).status == "False"


def test_the_new_version_takes_the_place_of_the_former_one() -> None:
    found = resolved(train="train-b", export="export-b")
    answer = job(PREPARE, key="2", **ended(0, prepared([PREPARE], found)))
    made = edited(preparing(), spec_of(2), answer)
    assert (ready(made).status, ready(made).observed_generation) == ("True", 1)
    exporting = status(
        Phase.EXPORTING,
        EXPORT,
        *(each.model_copy(update={"state": StageState.SUCCEEDED}) for each in made.status.stages),
        generation=2,
        conditions=made.status.conditions,
        **FINISHED,
    )
    done = edited(exporting, spec_of(2))
    assert (ready(done).status, ready(done).observed_generation) == ("True", 2)
