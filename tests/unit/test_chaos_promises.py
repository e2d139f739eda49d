"""The judge of the chaos: it finds what is broken in a made-up history, and nothing else."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_trainer.contract import Stage
from hack.chaos import promises
from hack.chaos.jobs import Course, Subject, subjects
from hack.chaos.promises import AT_ONCE, BACKWARDS, COMPLETED_TWICE, ORPHAN, Broken, check
from hack.chaos.recorder import Change

SEEN = datetime(2026, 5, 1, 12, tzinfo=UTC)
Raw = dict[str, Any]


def metadata(uid: str, kind: str, owner: str, attempt: int = 1, stage: str = "train") -> Raw:
    return {
        "uid": uid,
        "name": f"support-{uid}",
        "labels": {
            "finetune.dev/job-uid": "ftj-1",
            "finetune.dev/stage": stage,
            "finetune.dev/attempt": str(attempt),
        },
        "annotations": {"finetune.dev/job-name": "support", "finetune.dev/key": "train-a"},
        "ownerReferences": [{"controller": True, "kind": kind, "uid": owner}],
    }


def job(version: int, uid: str, *, deleted: bool = False, ends: str = "", **more: Any) -> Change:
    conditions = [{"type": ends, "status": "True"}] if ends else []
    raw = {"metadata": {**metadata(uid, "FineTuneJob", "ftj-1"), **more}}
    raw["status"] = {"conditions": conditions}
    return Change(version, "jobs", raw, deleted=deleted, seen=SEEN)


def pod(
    version: int,
    uid: str,
    job_uid: str,
    state: str = "",
    code: int = 0,
    *,
    second: int = 0,
    missed: bool = False,
    deleted: bool = False,
) -> Change:
    """A pod whose trainer is `running` or `terminated`, since that second."""
    when = SEEN.replace(second=second).isoformat()
    known: Raw = {
        "running": {"startedAt": when},
        "terminated": {"exitCode": code, "startedAt": when, "finishedAt": when},
    }
    container = {"name": "trainer", "state": {state: known[state]} if state else {}}
    phase = {"": "Pending", "running": "Running"}.get(state, "Failed" if code else "Succeeded")
    raw = {
        "metadata": metadata(uid, "Job", job_uid),
        "status": {"phase": phase, "containerStatuses": [container]},
    }
    return Change(version, "pods", raw, deleted=deleted, seen=SEEN, missed=missed)


def finetunejob(
    version: int,
    phase: str,
    *,
    attempt: int = 1,
    state: str = "Running",
    generation: int = 1,
    deleted: bool = False,
    **train: Any,
) -> Change:
    stage = {"name": "train", "state": state, "attempt": attempt, "fingerprint": "train-a", **train}
    status = {"phase": phase, "observedGeneration": generation, "stages": [stage]}
    raw = {"metadata": {"uid": "ftj-1", "name": "support"}, "status": status}
    return Change(version, "finetunejobs", raw, deleted=deleted, seen=SEEN)


def broken(*changes: Change) -> list[tuple[str, str]]:
    return [(each.promise, each.words) for each in check(changes, [], 1).broken]


WELL = (
    finetunejob(1, "Training"),
    job(2, "job-1"),
    pod(3, "pod-1", "job-1"),
    pod(4, "pod-1", "job-1", "running"),
    pod(5, "pod-1", "job-1", "terminated"),
    job(6, "job-1", ends="Complete"),
    finetunejob(7, "Succeeded", state="Succeeded"),
)


def test_a_life_without_faults_breaks_nothing() -> None:
    found = check(WELL, [], 1)
    assert found.broken == []
    assert found.checked[COMPLETED_TWICE] == "1 completions"
    assert found.checked[AT_ONCE] == "1 pods"


def test_a_wrong_end_is_handed_on() -> None:
    wrong = Broken(promises.RIGHT_END, "support", "it is gone")
    assert check(WELL, [wrong], 1).broken == [wrong]


def test_a_pod_that_begins_while_another_one_stops_is_found() -> None:
    [(promise, words)] = broken(
        finetunejob(1, "Training"),
        pod(2, "pod-1", "job-1", "running"),
        pod(3, "pod-2", "job-2", "running"),
        pod(4, "pod-1", "job-1", "terminated", 14),
        pod(5, "pod-2", "job-2", "terminated"),
    )
    assert promise == AT_ONCE
    assert "train: pod support-pod-1" in words
    assert "beside pod support-pod-2" in words


def test_a_pod_that_begins_when_another_one_has_stopped_is_none() -> None:
    assert not broken(
        finetunejob(1, "Training"),
        pod(2, "pod-1", "job-1", "running"),
        pod(3, "pod-2", "job-2"),
        pod(4, "pod-1", "job-1", "terminated", 14),
        pod(5, "pod-2", "job-2", "running"),
        pod(6, "pod-2", "job-2", "terminated"),
    )


@pytest.mark.parametrize(("end", "overlaps"), [(10, False), (20, True)])
def test_in_a_gap_of_the_watch_the_times_of_the_nodes_count(end: int, overlaps: bool) -> None:
    found = broken(
        finetunejob(1, "Training"),
        pod(2, "pod-1", "job-1", "running", second=1),
        pod(7, "pod-2", "job-2", "running", second=15, missed=True),
        pod(8, "pod-1", "job-1", "terminated", 14, second=end, missed=True),
        pod(9, "pod-2", "job-2", "terminated", second=30),
    )
    assert bool(found) is overlaps


def test_a_second_completion_is_found() -> None:
    [(promise, _)] = broken(
        *WELL[:5],
        job(6, "job-2"),
        pod(7, "pod-2", "job-2", "terminated"),
        job(8, "job-1", ends="Complete"),
        job(9, "job-2", ends="Complete"),
    )
    assert promise == COMPLETED_TWICE


def test_a_result_that_was_deleted_before_it_was_read_is_made_again() -> None:
    found = check(
        [
            *WELL[:5],
            job(6, "job-1", deleted=True),
            job(7, "job-2"),
            pod(8, "pod-2", "job-2", "terminated"),
            job(9, "job-2", ends="Complete"),
        ],
        [],
        1,
    )
    assert found.broken == []
    assert len(found.excused) == 1


def test_a_second_pod_of_the_same_job_is_the_job_controllers() -> None:
    found = check([*WELL[:6], pod(8, "pod-2", "job-1", "terminated"), WELL[-1]], [], 1)
    assert found.broken == []
    assert "the Job controller made two pods: support: train" in found.excused[0]


def test_a_result_that_was_deleted_after_it_was_read_is_not_made_again() -> None:
    [(promise, _)] = broken(
        *WELL,
        job(8, "job-1", deleted=True),
        job(9, "job-2", ends="Complete"),
        pod(10, "pod-2", "job-2", "terminated"),
    )
    assert promise == COMPLETED_TWICE


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            finetunejob(1, "Succeeded", state="Succeeded"),
            finetunejob(2, "Training", state="Succeeded"),
            "phase from Succeeded to Training",
        ),
        (
            finetunejob(1, "Training", attempt=3),
            finetunejob(2, "Training", attempt=2),
            "train's attempt from 3 to 2",
        ),
        (
            finetunejob(1, "Training", failures=1),
            finetunejob(2, "Training"),
            "train's failures from 1 to 0",
        ),
        (
            finetunejob(1, "Exporting", state="Succeeded"),
            finetunejob(2, "Exporting"),
            "train from Succeeded to Running",
        ),
        (
            finetunejob(1, "Training", generation=2),
            finetunejob(2, "Training", generation=1),
            "observedGeneration from 2 to 1",
        ),
    ],
)
def test_a_status_that_takes_something_back_is_found(
    before: Change, after: Change, words: str
) -> None:
    [found] = promises.backwards([before, after])
    assert found.promise == BACKWARDS
    assert words in found.words


def test_an_edit_may_take_back_what_it_touches() -> None:
    before = finetunejob(1, "Succeeded", attempt=3, state="Succeeded")
    after = finetunejob(2, "Training", generation=2, fingerprint="train-b")
    assert promises.backwards([before, after]) == []


def test_a_phase_of_a_waiting_pod_is_no_step_back() -> None:
    phases = [finetunejob(1, "Training"), finetunejob(2, "Queued"), finetunejob(3, "Training")]
    assert promises.backwards(phases) == []


def test_what_goes_on_when_all_is_over_is_an_orphan() -> None:
    [(promise, words)] = broken(*WELL, job(8, "job-2"))
    assert promise == ORPHAN
    assert "job support-job-2 of train goes on" in words


def test_what_is_left_of_a_deleted_finetunejob_is_an_orphan() -> None:
    found = broken(*WELL, finetunejob(8, "Succeeded", deleted=True))
    assert {promise for promise, _ in found} == {ORPHAN}
    assert len(found) == 2


def test_the_same_seed_gives_the_same_jobs() -> None:
    one, other = (subjects(40, random.Random(7)) for _ in range(2))  # noqa: S311 - to be repeated
    assert [(each.name, each.course, each.annotations) for each in one] == [
        (each.name, each.course, each.annotations) for each in other
    ]
    assert {each.course for each in one} == set(Course)


def test_a_job_at_another_end_is_at_fault() -> None:
    subject = Subject("support", Course.PLAIN, {stage: {} for stage in Stage}, after=1)
    found = finetunejob(7, "Training").raw
    found["metadata"]["generation"] = 1
    assert subject.fault(found).startswith("Training instead of Succeeded: train Running 1")
    assert subject.fault(None) == "it is gone, though nobody has deleted it"
    subject.course = Course.DELETED
    assert not subject.fault(None)
