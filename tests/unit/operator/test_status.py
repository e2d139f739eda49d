"""Conditions, phases and the patch that writes them."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api import Condition
from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageStatus
from finetune_operator.status import (
    MESSAGE_LIMIT,
    PendingReason,
    conditions,
    shorten,
    status_patch,
    succeeded_summary,
    timestamp,
    working_summary,
)
from finetune_trainer.contract import Progress
from tests.unit.operator.build import (
    FINISHED,
    NOW,
    PREPARE,
    TRAIN,
    at,
    failing,
    pending,
    running,
    stamp,
)


def the_three(
    stage: StageStatus, note: PendingReason | None = None, previous: tuple[Condition, ...] = ()
) -> dict[str, Condition]:
    made = conditions(previous, working_summary(stage, note, earlier_artifacts=False), 3, at(60))
    return {condition.type: condition for condition in made}


def test_all_three_conditions_are_always_there_with_the_generation() -> None:
    made = the_three(running(TRAIN))
    assert list(made) == ["Ready", "Progressing", "Degraded", "Reconciling"]
    assert {condition.observed_generation for condition in made.values()} == {3}


def test_a_condition_that_still_says_the_same_keeps_its_transition_time() -> None:
    before = conditions((), working_summary(running(TRAIN), None, earlier_artifacts=False), 2, NOW)
    after = the_three(running(TRAIN, attempt=2), previous=before)
    assert after["Progressing"].last_transition_time == stamp(0)
    assert after["Progressing"].message == "train is at work, attempt 2."


def test_a_condition_that_turns_takes_the_present_time() -> None:
    before = conditions((), working_summary(running(TRAIN), None, earlier_artifacts=False), 2, NOW)
    after = conditions(before, succeeded_summary("done"), 2, at(60))
    turned = {condition.type: condition.last_transition_time for condition in after}
    assert turned == {"Ready": stamp(60), "Progressing": stamp(60), "Degraded": stamp(0)}


@pytest.mark.parametrize(
    ("stage", "phase"),
    [
        pytest.param(pending(PREPARE), Phase.PENDING, id="nothing was started"),
        pytest.param(pending(PREPARE, attempt=1), Phase.PREPARING, id="prepare is tried again"),
        pytest.param(running(PREPARE), Phase.PREPARING, id="prepare runs"),
        pytest.param(pending(TRAIN), Phase.TRAINING, id="train is next"),
        pytest.param(running(TRAIN), Phase.TRAINING, id="train runs"),
    ],
)
def test_phase(stage: StageStatus, phase: Phase) -> None:
    assert working_summary(stage, None, earlier_artifacts=False).phase is phase


def test_a_note_that_needs_a_person_is_degraded() -> None:
    note = PendingReason("ImageNotPulled", "check the name", degraded=True)
    made = the_three(running(TRAIN), note)
    assert (made["Degraded"].status, made["Degraded"].reason) == ("True", "ImageNotPulled")
    assert (made["Progressing"].status, made["Progressing"].reason) == ("True", "ImageNotPulled")


def test_a_stage_that_was_never_tried_is_not_degraded() -> None:
    assert the_three(pending(TRAIN))["Degraded"].status == "False"


def test_a_failed_attempt_is_degraded_until_the_next_one_runs() -> None:
    from finetune_operator.api.observed import StageState
    from finetune_trainer.contract import Reason

    again = failing(TRAIN, Reason.INTERNAL_ERROR, "no luck", state=StageState.PENDING)
    assert the_three(again)["Degraded"].reason == "InternalError"
    assert the_three(running(TRAIN, 2))["Degraded"].status == "False"


def full_status(**fields: Any) -> FineTuneJobStatus:
    given = {"observed_generation": 1, "phase": Phase.TRAINING, "stages": (running(TRAIN),)}
    return FineTuneJobStatus(**{**given, **FINISHED, **fields})


def test_the_same_status_needs_no_patch() -> None:
    assert status_patch(full_status(), full_status()) == {}


def test_a_patch_holds_only_what_changed() -> None:
    patch = status_patch(full_status(), full_status(phase=Phase.SUCCEEDED))
    assert patch == {"phase": "Succeeded"}


def test_what_is_gone_becomes_null() -> None:
    patch = status_patch(full_status(), full_status(manifest_uri=None, metrics={"other": 1.0}))
    assert patch == {"manifestUri": None, "metrics": {"trainLoss": None, "other": 1.0}}


def test_a_list_is_replaced_as_a_whole() -> None:
    patch = status_patch(full_status(), full_status(stages=(running(TRAIN, 2),)))
    assert [stage["attempt"] for stage in patch["stages"]] == [2]


def test_progress_is_never_patched_since_it_is_the_trainers() -> None:
    mine = full_status(progress=Progress(percent="10%"))
    assert status_patch(full_status(), mine) == {}
    assert status_patch(mine, full_status()) == {}


def test_the_first_patch_is_the_whole_status() -> None:
    patch = status_patch(FineTuneJobStatus(), full_status())
    assert patch["lineage"] == {
        "datasetETag": "etag",
        "datasetRows": 120,
        "evalRows": 6,
        "modelRevision": "abc",
        "image": "trainer:1",
    }
    assert patch["resolved"]["fingerprints"]["train"] == "train-a"


def test_long_messages_are_cut() -> None:
    assert len(shorten("x" * 5000)) == MESSAGE_LIMIT
    assert shorten("short") == "short"


def test_timestamps_are_written_as_kubernetes_does() -> None:
    assert timestamp(at(1.75)) == "2026-11-24T12:00:01Z"
