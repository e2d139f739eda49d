"""Operator, CRD and trainer image of different versions: nothing is stopped, and nothing forgotten.

Each test is a pair of versions in the table of docs/operations.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageState
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob, observe_finetunejob
from finetune_operator.plan import Plan, Policy, plan
from finetune_trainer.contract import RunConfig, StageResult, Tolerated, read_known
from tests.unit.operator.build import (
    ALL_DONE,
    EXPORT,
    NOW,
    PREPARE,
    SETTINGS,
    SPEC,
    TRAIN,
    ended,
    finetunejob,
    finished_status,
    job,
    prepared,
    resolved,
    running,
    said,
    succeeded,
)
from tests.unit.operator.edits import answer, preparing
from tests.unit.operator.endings import LAST, training

NEWER_SPEC: dict[str, Any] = {
    **SPEC,
    "training": {"epochs": 3, "curriculum": "easyFirst"},
    "stages": {"train": {"topology": {"spread": True}}},
}


def written(status: FineTuneJobStatus) -> dict[str, Any]:
    """A status as the API server holds it."""
    dumped: dict[str, Any] = json.loads(status.model_dump_json(exclude_none=True))
    return dumped


def read(
    status: FineTuneJobStatus | Mapping[str, Any], spec: Mapping[str, Any] = SPEC
) -> ObservedFineTuneJob:
    meta = {"name": "support", "namespace": "ml", "uid": "uid-1", "resourceVersion": "7"}
    raw = written(status) if isinstance(status, FineTuneJobStatus) else dict(status)
    return observe_finetunejob(
        {"metadata": {**meta, "generation": 1}, "spec": dict(spec), "status": raw}
    )


def decided(observed: ObservedFineTuneJob, *jobs: ObservedJob) -> Plan:
    return plan(observed, jobs, SETTINGS, Policy(), NOW)


def words(made: Plan, kind: str) -> str:
    """What a condition says, if it is there."""
    return next((each.message for each in made.status.conditions if each.type == kind), "")


def test_a_newer_definition_touches_no_running_stage_and_status_says_what_is_new() -> None:
    made = decided(read(training(), NEWER_SPEC), job(TRAIN))
    assert made.actions == ()
    assert made.status.phase is Phase.TRAINING
    assert made.status.stages == training().stages
    skew = words(made, "VersionSkew")
    assert "spec.training.curriculum, spec.stages.train.topology" in skew
    assert "Upgrade the operator" in skew


def test_the_condition_goes_with_its_cause() -> None:
    before = decided(read(training(), NEWER_SPEC), job(TRAIN)).status
    after = decided(read(before), job(TRAIN))
    assert "VersionSkew" in {each.type for each in before.conditions}
    assert "VersionSkew" not in {each.type for each in after.status.conditions}


def test_a_newer_definition_starts_no_settled_job_anew() -> None:
    done = finished_status(*ALL_DONE)
    assert decided(read(done, NEWER_SPEC)) == Plan(done)


def test_a_value_that_only_a_newer_version_knows_stops_nothing() -> None:
    """The user edits the spec with the newer definition's words while the old operator runs."""
    odd = {**SPEC, "dataset": {"source": "s3://data/faq.csv", "format": "arrow"}}
    made = decided(read(training(), odd), job(TRAIN))
    assert made.actions == ()
    assert made.status.stages == training().stages
    assert "spec.dataset.format" in words(made, "Degraded")
    again = decided(read(made.status, odd), job(TRAIN))
    assert again == Plan(made.status), "said once"


def test_the_newer_operator_goes_on_where_the_older_one_gave_up() -> None:
    odd = {**SPEC, "dataset": {"source": "s3://data/faq.csv", "format": "arrow"}}
    given_up = decided(read(training(), odd), job(TRAIN)).status
    made = decided(read(given_up), job(TRAIN))
    assert made.status == training()
    settled = finished_status(*ALL_DONE)
    refused = decided(read({**written(settled), "observedGeneration": 0}, odd)).status
    assert refused.phase is Phase.FAILED
    assert decided(read(refused)).status.phase is Phase.SUCCEEDED


def test_an_older_definition_that_lacks_fields_means_their_defaults() -> None:
    older = {name: value for name, value in SPEC.items() if name != "stages"}
    assert read(training(), older).spec == read(training()).spec


def test_a_training_that_0_1_0_began_goes_on() -> None:
    """Its fingerprint is of the former formula, and status knows no commit of its model."""
    raw = written(training())
    raw["resolved"].pop("modelCommit", None)
    assert decided(read(raw), job(TRAIN)) == Plan(training())


def test_prepare_that_keeps_the_fingerprint_of_0_1_0_leaves_its_training_alone() -> None:
    """An edit makes `prepare` run: it finds checkpoints of then, and today's export to be made."""
    found = resolved(export="export-of-today").model_copy(
        update={"model_revision": "sha256:today", "model_commit": "abc"}
    )
    given = finetunejob(preparing(running(TRAIN, fingerprint="train-a"), LAST), generation=2)
    made = decided(given, answer([PREPARE], found), job(TRAIN))
    assert made.actions == ()
    assert made.status.stages[1] == running(TRAIN, fingerprint="train-a")
    assert made.status.resolved == found


def test_a_finished_job_that_0_1_0_made_reruns_nothing_under_todays_fingerprints() -> None:
    found = resolved("train-of-today", "export-of-today").model_copy(
        update={"model_revision": "sha256:today", "model_commit": "abc"}
    )
    given = finetunejob(
        preparing(
            succeeded(TRAIN, fingerprint="train-a"), succeeded(EXPORT, fingerprint="export-a")
        ),
        generation=2,
    )
    said_by_prepare = answer([PREPARE, TRAIN, EXPORT], found, metrics={"evalLoss": 1.5})
    made = decided(given, said_by_prepare)
    assert made.actions == ()
    assert made.status.phase is Phase.SUCCEEDED
    assert made.status.metrics == {"evalLoss": 1.5}
    assert [stage.cached for stage in made.status.stages] == [False, True, True]
    lineage = made.status.lineage
    assert lineage is not None
    assert (lineage.model_revision, lineage.model_commit) == ("sha256:today", "abc")


def newer_status(before: FineTuneJobStatus, **fields: Any) -> dict[str, Any]:
    """A status that a newer operator wrote."""
    raw = written(before)
    for stage in raw["stages"]:
        stage["carbon"] = {"grams": 7}
    return {**raw, "carbon": {"grams": 7}, **fields}


def test_an_operator_that_was_rolled_back_starts_no_settled_job_anew() -> None:
    done = finished_status(*ALL_DONE)
    assert decided(read(newer_status(done))) == Plan(done)
    parked = read(newer_status(done, phase="Archived"))
    assert decided(parked) == Plan(parked.status), "a phase that it doesn't know"


def test_an_operator_that_was_rolled_back_touches_no_running_stage() -> None:
    made = decided(read(newer_status(training())), job(TRAIN))
    assert made == Plan(training())
    raw = newer_status(training(), phase="Warming")
    raw["stages"][1]["state"] = "Warming"
    made = decided(read(raw), job(TRAIN))
    assert made.actions == ()
    assert made.status.stages[1].state is StageState.RUNNING
    assert "status.phase, status.stages.1.state" in words(made, "VersionSkew")


def test_a_stage_that_came_later_is_left_out() -> None:
    raw = newer_status(finished_status(*ALL_DONE))
    raw["stages"].append({"name": "judge", "state": "Running", "attempt": 1})
    assert decided(read(raw)).actions == ()


def test_a_newer_trainers_result_is_taken_in() -> None:
    text = prepared().model_dump_json(exclude_none=True)[:-1] + ',"energy":{"kWh":3}}'
    made = decided(read({}), job(PREPARE, **ended(0, StageResult.from_message(text))))
    assert made.status.stages[0].state is StageState.SUCCEEDED


@pytest.mark.parametrize(
    ("code", "reason", "state"),
    [
        pytest.param(11, "InvalidConfig", StageState.FAILED, id="that no retry cures"),
        pytest.param(1, "InternalError", StageState.PENDING, id="that a retry may cure"),
    ],
)
def test_a_newer_trainers_reason_counts_as_its_exit_code_says(
    code: int, reason: str, state: StageState
) -> None:
    text = '{"stage": "train", "reason": "OfALaterRelease", "message": "It is taken."}'
    made = decided(read(training()), job(TRAIN, **ended(code, StageResult.from_message(text))))
    stage = made.status.stages[1]
    assert (stage.state, stage.reason) == (state, reason)
    assert "OfALaterRelease: It is taken." in str(stage.message)


def test_an_older_trainers_result_lacks_nothing() -> None:
    """The fields that 0.1.0 wrote: whatever came later has a default."""
    text = (
        '{"stage":"prepare","reason":"Succeeded","message":"m","resolved":{"fingerprints":'
        '{"prepare":"a","train":"b","export":"c"},"datasetETag":"e","datasetRows":120,'
        '"evalRows":6,"modelRevision":"r"},"complete":["prepare"],"artifacts":[{"path":'
        '"gguf/model-F16.gguf","bytes":10,"sha256":"aa","quality":{"klDivergence":0.1,'
        '"sameTopToken":0.9,"perplexity":3.0}}],"metrics":{"trainLoss":0.5}}'
    )
    result = StageResult.from_message(text)
    assert result is not None
    assert result.resolved is not None
    assert result.artifacts[0].quality is not None


def test_an_older_operators_run_json_lacks_nothing() -> None:
    """The fields that 0.1.0 had to write: whatever came later has a default."""
    fields = {
        **SPEC,
        "job": {"name": "support", "namespace": "ml"},
        "hardware": {"gpus": 1},
        "resolved": {
            "fingerprints": {"prepare": "a", "train": "b", "export": "c"},
            "datasetETag": "e",
            "datasetRows": 120,
            "modelRevision": "r",
        },
    }
    read_fields = read_known(RunConfig, fields)
    assert read_fields == Tolerated(read_fields.value)


def test_what_is_written_is_strict() -> None:
    with pytest.raises(ValueError, match="extra"):
        said(TRAIN, energy=1)
