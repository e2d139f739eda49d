"""The plan when pods are lost: each is told once, counted, and only so many may be."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.observed import FineTuneJobStatus, StageState, StageStatus
from finetune_operator.observe import ObservedJob, QueueState
from finetune_operator.plan import Plan, Policy, plan
from finetune_operator.pods import ObservedPod
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    ALL_DONE,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    at,
    ended,
    finetunejob,
    finished_status,
    job,
    pod,
    prepared,
    said,
    spec_of,
    stamp,
)
from tests.unit.operator.endings import EVICTED, EVICTED_MESSAGE, training
from tests.unit.operator.expect import normal, warning

POLICY = Policy(disruption_limit=3)


def decided(status: FineTuneJobStatus, *jobs: ObservedJob) -> Plan:
    return plan(finetunejob(status), jobs, SETTINGS, POLICY, NOW)


def train_of(made: Plan) -> StageStatus:
    return made.status.stages[1]


def progressing(made: Plan) -> tuple[str, str]:
    claims = {each.type: each for each in made.status.conditions}
    return claims["Progressing"].reason, claims["Progressing"].message


def evicted(name: str) -> ObservedPod:
    return pod(name=name, phase="Failed", started=False, disruption=EVICTED)


def test_a_pod_that_the_job_itself_replaced_unseen_is_told_and_counted() -> None:
    """The operator sees only the second pod at work, and the first among those that ended."""
    made = decided(training(), job(TRAIN, pod=pod(name="b"), earlier_pods=(evicted("a"),)))
    assert made.events == (warning("PodDisrupted", EVICTED_MESSAGE),)
    train = train_of(made)
    assert (train.state, train.attempt, train.failures) == (StageState.RUNNING, 1, 0)
    assert (train.disruptions, train.lost_pod) == (1, "a")
    assert progressing(made)[1] == "train is at work, attempt 1. It lost its pod once."


def test_each_is_told_once_whenever_it_is_seen() -> None:
    first = decided(training(), job(TRAIN, pod=evicted("a")))
    assert (len(first.events), train_of(first).disruptions) == (1, 1)
    again = decided(first.status, job(TRAIN, pod=evicted("a")))
    assert again == Plan(first.status)
    replaced = decided(first.status, job(TRAIN, pod=pod(name="b"), earlier_pods=(evicted("a"),)))
    assert (replaced.events, train_of(replaced).disruptions) == ((), 1)
    two = (evicted("a"), evicted("b"))
    second = decided(first.status, job(TRAIN, pod=pod(name="c"), earlier_pods=two))
    assert (train_of(second).disruptions, train_of(second).lost_pod) == (2, "b")
    assert progressing(second)[1].endswith("It lost its pod 2 times.")


def test_a_stage_that_loses_one_pod_after_the_other_ends() -> None:
    lost = tuple(evicted(name) for name in "abc")
    made = decided(training(), job(TRAIN, pod=pod(name="d"), earlier_pods=lost))
    assert train_of(made).state is StageState.RUNNING, "three may be"
    over = decided(made.status, job(TRAIN, pod=evicted("d"), earlier_pods=lost))
    train = train_of(over)
    assert (train.state, train.reason, train.failures) == (StageState.FAILED, "PodDisrupted", 0)
    assert "has lost 4 pods; the operator's limit is 3" in str(train.message)
    assert [type(each).__name__ for each in over.actions] == ["StopJob"]
    assert decided(over.status, job(TRAIN, deleting=True)) == Plan(over.status)


def test_so_does_one_whose_jobs_fail_one_after_the_other() -> None:
    before = training(attempt=4, disruptions=3, lost_pod="c")
    made = decided(before, job(TRAIN, 4, **ended(14, said(TRAIN, Reason.STOPPED), name="d")))
    assert train_of(made).state is StageState.FAILED


def deleted(by: float, **fields: Any) -> ObservedPod:
    return pod(name="a", deleting=True, delete_by=at(by), node="node-1", **fields)


NODE_LOST = (
    "The pod a of train should have stopped by now, and its node node-1 doesn't say that it has. "
    "When you know that the node is off: kubectl delete pod a --force --grace-period=0. "
    "Two pods would write the same files."
)


def test_a_pod_in_its_grace_period_is_said_to_be_stopping() -> None:
    made = decided(training(), job(TRAIN, pod=deleted(30)))
    assert progressing(made) == ("Stopping", "The pod a of train is being deleted.")
    assert made.requeue_after == 91, "when its node should have told, all clocks allowed for"
    assert made.events == ()


@pytest.mark.parametrize("deleting", [False, True])
def test_a_node_that_never_says_that_the_pod_has_stopped_is_told(deleting: bool) -> None:
    made = decided(training(), job(TRAIN, pod=deleted(-61), deleting=deleting))
    assert progressing(made) == ("NodeLost", NODE_LOST)
    assert {each.type: each.status for each in made.status.conditions}["Degraded"] == "True"
    assert made.events == (warning("NodeLost", NODE_LOST),)
    assert train_of(made).disruptions == 1
    assert made.actions == ()
    again = decided(made.status, job(TRAIN, pod=deleted(-61), deleting=deleting))
    assert again == Plan(made.status)


def test_a_lost_node_that_comes_back_costs_one_disruption() -> None:
    lost = decided(training(), job(TRAIN, pod=deleted(-61)))
    back = decided(lost.status, job(TRAIN, **ended(137, name="a", deleting=True)))
    assert (train_of(back).disruptions, train_of(back).failures) == (1, 0)


def due() -> FineTuneJobStatus:
    """The training is about to start: its next attempt, or one of another spec."""
    given = training()
    prepare, _, export = given.stages
    train = StageStatus(name=TRAIN, fingerprint="train-a")
    return given.model_copy(update={"stages": (prepare, train, export)})


def start_due(pod: ObservedPod, status: FineTuneJobStatus | None = None) -> Plan:
    """Before a start, such a pod is left behind whose Job is gone."""
    given = finetunejob(status or due())
    return plan(given, [], SETTINGS, POLICY, NOW, old_pods={TRAIN: pod})


def test_a_pod_without_its_job_on_a_lost_node_is_told_with_both_names() -> None:
    made = start_due(deleted(-61))
    assert progressing(made) == ("NodeLost", NODE_LOST)
    assert {each.type: each.status for each in made.status.conditions}["Degraded"] == "True"
    assert made.events == (warning("NodeLost", NODE_LOST),)
    assert made.actions == ()
    assert start_due(deleted(-61), made.status) == Plan(made.status), "told once"


def test_such_a_pod_in_its_grace_period_is_looked_at_again() -> None:
    made = start_due(deleted(30))
    assert progressing(made) == ("Stopping", "train starts when its earlier pod has stopped.")
    assert made.requeue_after == 91


def test_a_stopped_job_whose_pod_is_on_a_lost_node_is_told_too() -> None:
    old = job(TRAIN, key="train-of-before", pod=deleted(-61), deleting=True)
    made = decided(due(), old)
    assert progressing(made) == ("NodeLost", NODE_LOST)


FORCED = "The pod of train was disrupted (the pod a was deleted by force)."


def test_a_pod_deleted_by_force_is_given_up_with_its_job() -> None:
    """Its Job waits for ever for a node to say how it ended."""
    lost = decided(training(), job(TRAIN, pod=deleted(-61)))
    made = decided(lost.status, job(TRAIN, pod=deleted(-1, forced=True)))
    train = train_of(made)
    assert (train.state, train.failures, train.disruptions) == (StageState.PENDING, 0, 1)
    assert (train.reason, train.message) == ("PodDisrupted", FORCED)
    assert [type(each).__name__ for each in made.actions] == ["StopJob"]
    assert warning("PodDisrupted", FORCED) in made.events
    gone = decided(made.status, job(TRAIN, pod=deleted(-1, forced=True), deleting=True))
    assert gone.actions == (), "nor is another started while the Job is still there"


@pytest.mark.parametrize("code", [14, 137, 143])
def test_a_pod_that_somebody_deletes_is_told_as_such(code: int) -> None:
    words = "The pod of train was disrupted (the pod was deleted)."
    result = said(TRAIN, Reason.STOPPED, message="Stopped at step 5.") if code == 14 else None
    made = decided(training(), job(TRAIN, **ended(code, result, name="a", deleting=True)))
    told = f"{words} Stopped at step 5." if result else words
    assert made.events == (warning("PodDisrupted", told),)
    assert train_of(made).failures == 0


def test_a_suspended_job_is_said_to_be_when_its_pod_has_stopped() -> None:
    stopped = ended(14, said(TRAIN, Reason.STOPPED), name="a", deleting=True)
    held = {**stopped, "finished": None, "finished_at": None, "suspended": True}
    made = decided(training(), job(TRAIN, **held))
    assert progressing(made)[0] == "JobSuspended"
    assert train_of(made).disruptions == 1
    later = decided(made.status, job(TRAIN, pod=None, suspended=True))
    assert progressing(later)[0] == "JobSuspended"
    assert {each.type: each.status for each in later.status.conditions}["Degraded"] == "False"


def test_a_training_that_makes_room_in_a_queue_loses_nothing() -> None:
    stopped = ended(14, said(TRAIN, Reason.STOPPED), name="a", deleting=True)
    state = QueueState("Preempted to accommodate a workload", preempted=True)
    queue = {"queue": "team-a", "queue_state": state, "suspended": True}
    held = {**stopped, "finished": None, "finished_at": None, **queue}
    made = decided(training(), job(TRAIN, **held))
    words = "Kueue's queue team-a: Preempted to accommodate a workload"
    assert progressing(made) == ("Preempted", f"train waits in {words}")
    assert made.events == (normal("Preempted", f"train had to make room in {words}"),)
    assert (train_of(made).disruptions, train_of(made).lost_pod) == (0, "a")
    assert train_of(made).reason is None
    again = decided(made.status, job(TRAIN, **held))
    assert again.events == ()
    goes_on = {**held, "suspended": False, "queue_state": None, "taken_up": at(1)}
    later = decided(training(), job(TRAIN, **goes_on))  # nobody saw it while it was suspended
    assert [each.reason for each in later.events] == ["Evicted"]
    assert train_of(later).disruptions == 0


def test_a_pod_that_is_lost_after_its_turn_has_come_counts() -> None:
    stopped = ended(14, said(TRAIN, Reason.STOPPED), name="a", deleting=True)
    held = {**stopped, "finished": None, "finished_at": None, "queue": "team-a"}
    made = decided(training(), job(TRAIN, taken_up=at(-60), **held))
    assert train_of(made).disruptions == 1


def test_a_job_that_makes_another_pod_is_no_trouble() -> None:
    """The Job controller waits before it does so, and longer each time."""
    before = training(disruptions=1, lost_pod="a", reason="PodDisrupted", message=FORCED)
    made = decided(before, job(TRAIN, pod=None, taken_up=at(-3600)))
    assert progressing(made) == ("Queued", "The Job train-1 makes another pod of train.")
    refused = decided(before, job(TRAIN, pod=None, taken_up=at(-3600), refusal="exceeded quota"))
    assert progressing(refused)[0] == "PodNotCreated"


# Clocks: each machine has its own.


@pytest.mark.parametrize("behind", [0, 45, 59])
def test_a_node_whose_clock_is_slow_does_not_make_a_finished_training_run_again(
    behind: int,
) -> None:
    """It ended after prepare had looked, and dates that `behind` seconds too early."""
    begun = [
        each.model_copy(update={"start_time": stamp(-10), "completion_time": stamp(-10 - behind)})
        for each in ALL_DONE
    ]
    before = finished_status(*begun, generation=2).model_copy(
        update={
            "phase": None,
            "stages": (
                StageStatus(
                    name=PREPARE, state=StageState.RUNNING, attempt=1, start_time=stamp(-10)
                ),
                *begun[1:],
            ),
        }
    )
    answer = job(PREPARE, key="2", **ended(0, prepared([PREPARE])))
    given = finetunejob(before, generation=2, spec=spec_of(2))
    made = plan(given, [answer], SETTINGS, Policy(), NOW)
    assert train_of(made).state is StageState.SUCCEEDED
    assert made.actions == ()


def test_a_node_whose_clock_is_fast_makes_no_pause_longer() -> None:
    fast = ended(1, last_log_line="no luck")
    fast["pod"] = pod(phase="Failed", exit_code=1, finished_at=NOW + timedelta(hours=3))
    made = decided(training(), job(TRAIN, **fast))
    assert made.requeue_after == 10
