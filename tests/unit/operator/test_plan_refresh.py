"""The plan with `dataset.refresh`: at each interval `prepare` looks, and nothing else happens by
itself."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.finetunejob import DatasetSpec, FineTuneJobSpec
from finetune_operator.api.observed import FineTuneJobStatus, LookCause, Phase
from finetune_operator.manifests.stage_job import Attempt, stage_job
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.plan import Plan, Policy, plan
from finetune_operator.settings import Settings
from finetune_trainer.contract import (
    Artifact,
    Hardware,
    Reason,
    Stage,
    VersionSummary,
    parse_duration,
)
from tests.unit.operator.build import (
    ALL_DONE,
    DONE_MESSAGE,
    EXPORT,
    EXPORTED_VERSION,
    PREPARE,
    SETTINGS,
    SPEC,
    TRAIN,
    at,
    ended,
    failing,
    finetunejob,
    finished_status,
    job,
    prepared,
    resolved,
    running,
    said,
    spec,
    stamp,
    status,
    succeeded,
)
from tests.unit.operator.endings import EMPTY, training
from tests.unit.operator.expect import start, started, unexplained

HOURLY = spec(dataset={**SPEC["dataset"], "refresh": "1h"})
DOWN = "s3://data/faq.csv: the store doesn't answer."


def refreshed(*stages: Any, **fields: Any) -> FineTuneJobStatus:
    """A finished job whose `prepare` last looked an hour ago."""
    looked = succeeded(PREPARE, since=-3600, until=-3540, fingerprint="prepare-a")
    given = {"last_refresh_time": stamp(-3600), "next_refresh_time": stamp(0), **fields}
    made: FineTuneJobStatus = finished_status(looked, *(stages or ALL_DONE[1:]), **given)
    return made


def decided(
    before: FineTuneJobStatus,
    *jobs: ObservedJob,
    given: FineTuneJobSpec = HOURLY,
    after: float = 0,
    generation: int = 1,
) -> Plan:
    observed = finetunejob(before, generation=generation, spec=given)
    return plan(observed, jobs, SETTINGS, Policy(), at(after))


def look(number: int = 1, **fields: Any) -> ObservedJob:
    return job(PREPARE, key=f"1.{number}", **fields)


def condition(made: Plan, kind: str) -> tuple[str, str, str]:
    found = {each.type: each for each in made.status.conditions}
    return found[kind].status, found[kind].reason, found[kind].message


def test_before_the_interval_is_over_nothing_happens_but_a_pass_is_due_then() -> None:
    made = decided(refreshed(), after=-900)
    assert made == Plan(refreshed(), requeue_after=900)


def test_with_on_edit_nothing_is_ever_due() -> None:
    assert decided(refreshed(), given=spec(), after=1e6) == Plan(refreshed())


def test_then_prepare_looks_under_a_name_of_its_own_and_the_version_stays_ready() -> None:
    made = decided(refreshed())
    assert made.actions == (start(PREPARE, key="1.1"),)
    assert made.events == (started(PREPARE),)
    assert made.status.phase is Phase.PREPARING
    assert condition(made, "Ready") == ("True", "Succeeded", DONE_MESSAGE)
    assert made.status.artifacts == refreshed().artifacts
    planned = made.status.planned
    assert planned is not None
    assert (planned.generation, planned.look, planned.cause) == (1, 1, LookCause.REFRESH)
    assert made.status.next_refresh_time == stamp(3600)


def test_a_look_that_is_begun_is_not_begun_again() -> None:
    begun = decided(refreshed()).status
    assert decided(begun, look(), after=5) == Plan(begun)
    late = decided(begun, look(), after=7200)
    assert late.actions == (), "also where it takes longer than the interval"
    again = decided(begun, after=5)
    assert again.actions == (start(PREPARE, key="1.1"),), "where the operator died before it"


def test_nothing_new_leaves_all_as_it_was() -> None:
    begun = decided(refreshed()).status
    made = decided(begun, look(**ended(0, prepared([PREPARE, TRAIN, EXPORT]))), after=60)
    assert made.actions == ()
    assert made.status.phase is Phase.SUCCEEDED
    assert {stage.why for stage in made.status.stages[1:]} == {
        "Nothing that it depends on has changed."
    }
    assert unexplained(made).status.stages[1:] == ALL_DONE[1:]
    assert made.status.artifacts == refreshed().artifacts
    assert condition(made, "Ready") == ("True", "Succeeded", DONE_MESSAGE)
    assert decided(made.status, after=3600).actions == (start(PREPARE, key="1.2"),)


def test_new_data_is_trained_on_while_the_old_version_stays_current() -> None:
    begun = decided(refreshed()).status
    found = resolved(train="train-b", export="export-b")
    made = decided(begun, look(**ended(0, prepared([PREPARE], found))), after=60)
    assert made.actions == (start(TRAIN, key="train-b", found=found),)
    assert made.status.phase is Phase.TRAINING
    assert made.status.version == refreshed().version
    assert made.status.artifacts == refreshed().artifacts
    assert condition(made, "Ready") == ("True", "Succeeded", DONE_MESSAGE)


def test_a_running_training_is_never_looked_behind() -> None:
    # Data that changes more often than a training takes would keep it from ever ending.
    late = decided(training(), job(TRAIN), after=1e6)
    assert late.actions == ()
    assert late.status.stages == training().stages


STORE_DOWN = said(PREPARE, Reason.STORAGE_UNAVAILABLE, message=DOWN)


def given_up() -> Plan:
    """The store was down at the third attempt as well."""
    begun = decided(refreshed()).status
    stages = (
        running(PREPARE, attempt=3, failures=2),
        *begun.stages[1:],
    )
    last = begun.model_copy(update={"stages": stages})
    return decided(last, look(attempt=3, **ended(1, STORE_DOWN)), after=60)


def test_a_store_that_is_down_leaves_the_version_current_and_is_told() -> None:
    made = given_up()
    times = "It failed 3 times; spec.backoffLimit is 2."
    again = f"Dataset and model are looked at again at {stamp(3600)}."
    words = (
        f"The last look at dataset and model failed: {DOWN} {times} The current version stays. "
        f"{again}"
    )
    assert made.status.phase is Phase.SUCCEEDED
    assert made.status.artifacts == refreshed().artifacts
    assert made.status.dataset == refreshed().dataset
    assert condition(made, "Ready") == ("True", "Succeeded", DONE_MESSAGE)
    assert condition(made, "Degraded") == ("True", "StorageUnavailable", words)
    assert condition(made, "Progressing") == ("False", "StorageUnavailable", again)
    assert "Stalled" not in {each.type for each in made.status.conditions}


def test_and_it_is_tried_again_at_the_next_interval() -> None:
    waits = decided(given_up().status, after=1800)
    assert (waits.actions, waits.requeue_after) == ((), 1800)
    again = decided(given_up().status, after=3600)
    assert again.actions == (start(PREPARE, key="1.2"),)
    well = decided(again.status, look(2, **ended(0, prepared([TRAIN, EXPORT]))), after=3660)
    assert well.status.phase is Phase.SUCCEEDED
    assert condition(well, "Degraded") == ("False", "AsExpected", "Nothing needs attention.")


def test_a_spec_that_was_never_reached_stays_failed_until_a_look_finds_better() -> None:
    bad = failing(PREPARE, Reason.DATASET_EMPTY, EMPTY)
    failed = status(
        Phase.FAILED, PREPARE, bad, conditions=decided(refreshed()).status.conditions[1:]
    )
    begun = decided(failed, after=3600)
    assert begun.actions == (start(PREPARE, key="1.1"),)
    answer = said(PREPARE, Reason.DATASET_EMPTY, message=EMPTY)
    still = decided(begun.status, look(**ended(10, answer)), after=3660)
    assert still.status.phase is Phase.FAILED
    again = f"Dataset and model are looked at again at {stamp(7200)}."
    assert condition(still, "Degraded") == ("True", "DatasetEmpty", EMPTY)
    assert condition(still, "Progressing") == ("False", "DatasetEmpty", again)
    better = decided(begun.status, look(**ended(0, prepared([PREPARE]))), after=3660)
    assert better.actions == (start(TRAIN),)


def test_a_training_that_failed_is_not_repeated_at_each_interval() -> None:
    broken = failing(TRAIN, Reason.OUT_OF_GPU_MEMORY, "lower it", fingerprint="train-a")
    before = refreshed(broken, ALL_DONE[2]).model_copy(update={"phase": Phase.FAILED})
    begun = decided(before).status
    same = decided(begun, look(**ended(0, prepared([PREPARE]))), after=60)
    assert same.actions == ()
    assert same.status.phase is Phase.FAILED
    assert same.status.stages[1] == broken
    words = "No new version can be made: lower it The former version stays current."
    assert condition(same, "Degraded")[2] == words
    other = resolved(train="train-b", export="export-b")
    made = decided(begun, look(**ended(0, prepared([PREPARE], other))), after=60)
    assert made.actions == (start(TRAIN, key="train-b", found=other),), (
        "newer data is another thing"
    )


def test_a_new_version_that_the_gate_refuses_takes_no_good_ones_place() -> None:
    exporting = begun_export()
    refused = said(
        EXPORT,
        Reason.QUALITY_GATE_FAILED,
        message="model-Q4_K_M.gguf is over its limit.",
        artifacts=(Artifact(path="rejected/model-Q4_K_M.gguf", bytes=1, sha256="cc"),),
        version="bbbbbbbbbbbb",
        manifest_uri="s3://models/support/versions/bbbbbbbbbbbb/manifest.json",
        versions=(
            VersionSummary(version="bbbbbbbbbbbb", rejected=True, created="2026-11-24T12:00:00Z"),
            VersionSummary(version=EXPORTED_VERSION, current=True, created="2026-11-20T12:00:00Z"),
        ),
    )
    made = decided(exporting, job(EXPORT, key="export-b", **ended(15, refused)), after=60)
    assert made.status.phase is Phase.FAILED
    assert condition(made, "Ready") == ("True", "Succeeded", DONE_MESSAGE)
    assert condition(made, "Degraded")[2].startswith("No new version can be made: ")
    assert (made.status.version, made.status.artifacts) == (
        EXPORTED_VERSION,
        refreshed().artifacts,
    )
    assert [each.state for each in made.status.versions] == ["Rejected", "Current"]


def begun_export() -> FineTuneJobStatus:
    """New data has been trained on, and its export is at work."""
    begun = decided(refreshed()).status
    found = resolved(train="train-b", export="export-b")
    stages = (
        succeeded(PREPARE, fingerprint="prepare-a"),
        succeeded(TRAIN, fingerprint="train-b"),
        running(EXPORT, fingerprint="export-b"),
    )
    return begun.model_copy(update={"stages": stages, "resolved": found})


def test_an_edit_of_the_interval_alone_runs_nothing_and_counts_from_the_last_look() -> None:
    every_two = spec(dataset={**SPEC["dataset"], "refresh": "2h"})
    made = decided(refreshed(), given=every_two, generation=2)
    assert made.actions == ()
    assert made.status.phase is Phase.SUCCEEDED
    assert made.status.next_refresh_time == stamp(3600)
    off = decided(refreshed(), given=spec(), generation=2)
    assert off.status.last_refresh_time is None
    assert off.status.next_refresh_time is None


def test_an_edit_that_touches_a_stage_makes_prepare_look_in_its_own_name() -> None:
    edited = spec(dataset={**SPEC["dataset"], "refresh": "1h"}, training={"seed": 2})
    made = decided(refreshed(), given=edited, generation=2)
    assert made.actions == (start(PREPARE, key="2"),)
    assert made.status.planned is not None
    assert made.status.planned.cause is None


def test_pods_that_look_at_an_interval_do_not_pile_up() -> None:
    def ttl(stage: Stage, **fields: Any) -> int:
        given = spec(dataset={**SPEC["dataset"], **fields})
        attempt = Attempt(stage, "key", 1, "run", Hardware())
        owner: ObservedFineTuneJob = finetunejob()
        made = stage_job(owner, given, attempt, Settings(trainer_image="trainer:1"))
        return int(made["spec"]["ttlSecondsAfterFinished"])

    assert ttl(PREPARE) == 86400
    assert ttl(PREPARE, refresh="10m") == 600
    assert ttl(TRAIN, refresh="10m") == 86400


@pytest.mark.parametrize(
    ("text", "minutes"), [("1m", 1), ("90s", 1.5), ("6h", 360), ("1h30m", 90), ("60s", 1)]
)
def test_intervals_are_written_as_go_writes_them(text: str, minutes: float) -> None:
    assert DatasetSpec(source="s3://data/faq.csv", refresh=text).refresh == text
    assert parse_duration(text) == timedelta(minutes=minutes)


@pytest.mark.parametrize("text", ["", "59s", "1d", "6", "30m6h", "hourly", "-1h", "1.5h"])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="refresh"):
        DatasetSpec(source="s3://data/faq.csv", refresh=text)
