"""The plan with `rollbackTo`, and the history of versions in status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import (
    FineTuneJobStatus,
    Phase,
    StageState,
    VersionState,
    VersionStatus,
)
from finetune_operator.observe import ObservedJob
from finetune_operator.plan import Plan, Policy, plan
from finetune_operator.plan.versions import history
from finetune_operator.pods import ObservedPod
from finetune_trainer.contract import (
    Artifact,
    Fingerprints,
    Reason,
    Resolved,
    Stage,
    VersionSummary,
)
from tests.unit.operator.build import (
    ALL_DONE,
    EXPORT,
    EXPORTED_VERSION,
    FINISHED,
    FOLDER,
    IMAGE,
    NOW,
    PREPARE,
    SETTINGS,
    SPEC,
    TRAIN,
    at,
    cached,
    ended,
    exported,
    finetunejob,
    finished_status,
    job,
    planned,
    pod,
    prepared,
    resolved,
    running,
    said,
    spec,
    status,
    succeeded,
)
from tests.unit.operator.expect import start, stop

OLD = "aaaaaaaaaaaa"
OLD_FOLDER = f"{FOLDER}/versions/{OLD}"
BACK = spec(rollbackTo=OLD)
OLD_FOUND = Resolved(
    fingerprints=Fingerprints(prepare="prepare-0", train="train-0", export="export-0"),
    dataset_etag="old-etag",
    dataset_rows=90,
    eval_rows=4,
    model_revision="old",
)
STORED = (
    VersionSummary(version=EXPORTED_VERSION, created="2026-11-24T11:00:00Z", eval_loss=0.4),
    VersionSummary(version=OLD, current=True, created="2026-11-20T11:00:00Z", dataset_rows=90),
)
ROLLED_BACK = prepared(
    Stage,
    OLD_FOUND,
    artifacts=(Artifact(path="gguf/model-F16.gguf", bytes=9, sha256="bb"),),
    version=OLD,
    manifest_uri=f"{OLD_FOLDER}/manifest.json",
    metrics={"evalLoss": 0.5},
    versions=STORED,
)
DONE = finished_status(*ALL_DONE)


def decided(
    before: FineTuneJobStatus,
    *jobs: ObservedJob,
    given: FineTuneJobSpec = BACK,
    generation: int = 2,
    old_pods: Mapping[Stage, ObservedPod] | None = None,
) -> Plan:
    observed = finetunejob(before, generation=generation, spec=given)
    return plan(observed, jobs, SETTINGS, Policy(), NOW, old_pods=old_pods)


def answer(result: Any = ROLLED_BACK) -> ObservedJob:
    return job(PREPARE, key="2", **ended(0, result))


def test_only_prepare_runs_and_the_version_is_ready_meanwhile() -> None:
    made = decided(DONE)
    assert made.actions == (start(PREPARE, key="2"),)
    assert made.status.phase is Phase.PREPARING
    assert made.status.conditions[0] == DONE.conditions[0]


def test_then_status_is_that_of_the_old_version() -> None:
    made = decided(decided(DONE).status, answer())
    assert made.actions == ()
    found = made.status
    assert found.phase is Phase.SUCCEEDED
    assert found.version == OLD
    assert [each.uri for each in found.artifacts] == [f"{OLD_FOLDER}/gguf/model-F16.gguf"]
    assert found.manifest_uri == f"{OLD_FOLDER}/manifest.json"
    assert found.metrics == {"evalLoss": 0.5}
    assert found.lineage is not None
    assert (found.lineage.dataset_etag, found.lineage.dataset_rows) == ("old-etag", 90)
    why = "The version that spec.rollbackTo names has its result."
    assert found.stages[1:] == (
        cached(TRAIN, "train-0", why=why),
        cached(EXPORT, "export-0", why=why),
    )
    words = (
        f"Rolled back to version {OLD} (spec.rollbackTo). The artifacts are in {OLD_FOLDER}; "
        f"{OLD_FOLDER}/manifest.json lists them."
    )
    ready = found.conditions[0]
    assert (ready.status, ready.message, ready.observed_generation) == ("True", words, 2)
    assert ("Succeeded", words) in [(each.reason, each.message) for each in made.events]
    assert decided(found, answer()) == Plan(found), "settled"


def test_without_it_the_version_of_the_spec_is_looked_up_and_nothing_is_trained() -> None:
    back = decided(decided(DONE).status, answer()).status
    first = decided(back, given=spec(), generation=3)
    assert first.actions == (start(PREPARE, key="3"),)
    stored = exported()
    newest = prepared(
        Stage,
        artifacts=stored.artifacts,
        version=stored.version,
        manifest_uri=stored.manifest_uri,
        metrics={"trainLoss": 0.5},
    )
    again = job(PREPARE, key="3", **ended(0, newest))
    made = decided(first.status, again, given=spec(), generation=3)
    assert made.actions == ()
    assert (made.status.phase, made.status.version) == (Phase.SUCCEEDED, EXPORTED_VERSION)
    assert "Rolled back" not in made.status.conditions[0].message


def test_a_version_that_is_not_there_leaves_the_present_one_current() -> None:
    words = f"spec.rollbackTo: the version {OLD} is not there."
    missing = job(
        PREPARE, key="2", **ended(11, said(PREPARE, Reason.VERSION_NOT_FOUND, message=words))
    )
    made = decided(decided(DONE).status, missing)
    assert made.actions == ()
    assert made.status.phase is Phase.FAILED
    assert made.status.version == EXPORTED_VERSION
    assert made.status.conditions[0] == DONE.conditions[0]
    degraded = made.status.conditions[2]
    assert (degraded.reason, words in degraded.message) == ("VersionNotFound", True)


def test_an_image_that_knows_no_rollback_is_named_and_nothing_is_trained() -> None:
    ignored = prepared([PREPARE], resolved(train="train-b", export="export-b"))
    made = decided(decided(DONE).status, answer(ignored))
    assert made.actions == ()
    assert made.status.phase is Phase.FAILED
    message = made.status.conditions[2].message
    assert f"The trainer image {IMAGE} doesn't know spec.rollbackTo" in message


def exporting() -> FineTuneJobStatus:
    """A new version is about to be published."""
    found: FineTuneJobStatus = status(
        Phase.EXPORTING,
        EXPORT,
        succeeded(PREPARE, fingerprint="prepare-a"),
        succeeded(TRAIN, fingerprint="train-a"),
        running(EXPORT, fingerprint="export-a"),
        **FINISHED,
    )
    return found


def test_an_export_is_stopped_first_since_it_would_publish_its_own_version() -> None:
    made = decided(exporting(), job(EXPORT))
    assert made.actions == (stop(EXPORT),)
    assert made.status.stages[2].state is StageState.PENDING
    going = decided(made.status, job(EXPORT, deleting=True))
    assert going.actions == ()
    progressing = going.status.conditions[1]
    assert progressing.message == "prepare starts when the pod of export has stopped."
    pod_left = decided(going.status, old_pods={EXPORT: pod()})
    assert pod_left.actions == ()
    gone = decided(going.status)
    assert gone.actions == (start(PREPARE, key="2"),)


def test_an_export_that_has_just_ended_is_rolled_back_as_well() -> None:
    made = decided(exporting(), job(EXPORT, **ended(0, exported())))
    assert made.status.stages[2].state is StageState.SUCCEEDED
    assert made.actions == (start(PREPARE, key="2"),)


def test_a_training_goes_on_until_prepare_has_answered_and_no_further() -> None:
    trains = status(
        Phase.TRAINING,
        TRAIN,
        succeeded(PREPARE, fingerprint="prepare-a"),
        running(TRAIN, fingerprint="train-a"),
        **FINISHED,
    )
    first = decided(trains, job(TRAIN))
    assert first.actions == (start(PREPARE, key="2"),)
    made = decided(first.status, job(TRAIN), answer())
    assert made.actions == (stop(TRAIN),)
    assert made.status.phase is Phase.SUCCEEDED


def test_nothing_is_refreshed_meanwhile() -> None:
    hourly = {**SPEC["dataset"], "refresh": "1h"}
    given = spec(dataset=hourly, rollbackTo=OLD)
    back = decided(decided(DONE, given=given).status, answer(), given=given).status
    assert back.next_refresh_time is None
    late = plan(finetunejob(back, generation=2, spec=given), [], SETTINGS, Policy(), at(1e6))
    assert late == Plan(back)


# The history


def told(version: str, created: str | None = None, **fields: Any) -> VersionSummary:
    return VersionSummary(version=version, created=created, **fields)


def kept(version: str, state: str, made: str | None = None, **fields: Any) -> VersionStatus:
    return VersionStatus(version=version, state=VersionState(state), completion_time=made, **fields)


def test_prepare_and_export_bring_the_history_up_to_date() -> None:
    back = decided(decided(DONE).status, answer()).status
    assert back.versions == (
        kept(EXPORTED_VERSION, "Available", "2026-11-24T11:00:00Z", eval_loss=0.4),
        kept(OLD, "Current", "2026-11-20T11:00:00Z", dataset_rows=90),
    )
    result = exported().model_copy(update={"versions": STORED[:1]})
    made = decided(
        exporting().model_copy(update={"versions": back.versions, "planned": planned(1)}),
        job(EXPORT, **ended(0, result)),
        given=spec(),
        generation=1,
    )
    assert [each.state for each in made.status.versions] == ["Available", "Deleted"]


@pytest.mark.parametrize(
    ("says", "known", "found", "expected"),
    [
        (
            "a version that is gone is kept as deleted",
            [kept("a", "Current", "2026-01-01", eval_loss=1.0)],
            [told("b", "2026-01-02", current=True)],
            [
                kept("b", "Current", "2026-01-02"),
                kept("a", "Deleted", "2026-01-01", eval_loss=1.0),
            ],
        ),
        (
            "what had no room in a message is remembered",
            [kept("a", "Current", "2026-01-01", dataset_rows=5)],
            [told("b", "2026-01-02", current=True), told("a")],
            [
                kept("b", "Current", "2026-01-02"),
                kept("a", "Available", "2026-01-01", dataset_rows=5),
            ],
        ),
        (
            "a version that is made again is there again",
            [kept("a", "Deleted", "2026-01-01")],
            [told("a", "2026-01-03", current=True)],
            [kept("a", "Current", "2026-01-03")],
        ),
        (
            "one with files that the gate refused is no way back",
            [],
            [told("b", "2026-01-02", rejected=True), told("a", "2026-01-01", current=True)],
            [kept("b", "Rejected", "2026-01-02"), kept("a", "Current", "2026-01-01")],
        ),
    ],
)
def test_the_history(
    says: str, known: list[VersionStatus], found: list[VersionSummary], expected: list[Any]
) -> None:
    assert history(known, found) == tuple(expected), says


def test_a_long_history_is_cut_and_the_current_version_stays_in_it() -> None:
    days = [f"2026-01-{day:02}" for day in range(1, 31)]
    newest = [told(f"v{day}", day) for day in reversed(days)][:20]
    found = [*newest, told("v2026-01-01", "2026-01-01", current=True)]
    known = history([kept("v2026-01-05", "Current", "2026-01-05")], found)
    assert len(known) == 21
    assert [each.version for each in known[:20]] == [each.version for each in newest]
    assert known[20] == kept("v2026-01-01", "Current", "2026-01-01")


def test_an_old_version_that_nobody_was_told_of_is_not_called_deleted() -> None:
    newest = [told(f"v{day}", f"2026-01-{day:02}") for day in range(30, 10, -1)]
    before = [kept("v5", "Current", "2026-01-05")]
    (*_, last) = history(before, newest[:20])
    assert last.version == "v11", "it has no room"
    assert history(before, newest[:3])[-1] == kept("v5", "Deleted", "2026-01-05")


def test_an_older_trainer_that_tells_nothing_changes_nothing() -> None:
    before = DONE.model_copy(update={"versions": (kept("a", "Current", "2026-01-01"),)})
    first = decided(before, given=spec(training={"seed": 2}))
    made = decided(
        first.status,
        job(PREPARE, key="2", **ended(0, prepared())),
        given=spec(training={"seed": 2}),
    )
    assert made.status.versions == before.versions
