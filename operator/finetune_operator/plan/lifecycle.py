"""What holds or ends a stage from outside: an earlier pod, spec.suspend, its deadline. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import Phase, StageState
from finetune_operator.observe import ObservedJob
from finetune_operator.plan import results
from finetune_operator.plan.draft import Draft, Plan
from finetune_operator.plan.verdict import Done, Failure, Pending, Verdict, lost_node, until_lost
from finetune_operator.pods import ObservedPod
from finetune_operator.status import (
    ALL_WELL,
    AS_EXPECTED,
    PHASES,
    SUSPENDED,
    ConditionValue,
    PendingReason,
    Summary,
    timestamp,
    working_summary,
)
from finetune_trainer.contract import Reason, Stage, parse_duration

SUSPENDING, RESUMED = "Suspending", "Resumed"
HEARTBEATS = 3  # that a trainer may miss without being taken for dead


def has_pod_at_work(draft: Draft, stage: Stage) -> bool:
    """Whether an earlier pod of a stage runs, or may yet begin to."""
    mine = any(job.stage is stage and job.may_have_pod_at_work for job in draft.jobs)
    return mine or stage in draft.old_pods


def wait_for_earlier_pods(draft: Draft, stage: Stage) -> None:
    """Say what the stage waits for: a pod that stops, or a node that nobody reaches."""
    words = f"{stage} starts when its earlier pod has stopped."
    draft.pending_reasons[stage] = PendingReason("Stopping", words)
    for pod in _earlier_pods(draft, stage):
        if lost := lost_node(stage, pod, draft.policy, draft.now):
            reason = PendingReason(lost.reason, lost.message, degraded=True)
            draft.pending_reasons[stage] = reason
            draft.warn_once(lost.reason, lost.message)
            return
        draft.requeue_after(until_lost(pod, draft.policy, draft.now))


def _earlier_pods(draft: Draft, stage: Stage) -> list[ObservedPod]:
    jobs = [job for job in draft.jobs if job.stage is stage]
    own = [pod for job in jobs for pod in job.pods_at_work]
    return own + ([draft.old_pods[stage]] if stage in draft.old_pods else [])


def suspend(draft: Draft) -> Plan:
    """Start nothing and stop what runs. What has ended meanwhile is in the draft already."""
    draft.stop_obsolete_jobs()
    left = [each for each in draft.stages.values() if each.state is not StageState.SUCCEEDED]
    stage = left[0].name if left else Stage.EXPORT
    at_work = [job.stage for job in draft.jobs if job.may_have_pod_at_work]
    if stopping := [*at_work, *sorted(draft.old_pods)]:
        wait_for_earlier_pods(draft, stopping[0])
        note = draft.pending_reasons.get(stopping[0])
        if note is None or note.reason != Reason.NODE_LOST:
            words, phase = _stopping_words(stopping[0]), PHASES[stopping[0]]
            note = PendingReason(SUSPENDING, words, phase=phase)
        shown = draft.stages[stopping[0]]
        return draft.finish(shown.name, working_summary(shown, note, bool(draft.found.artifacts)))
    summary = _suspended_summary(draft, stage, done=not left)
    if draft.finetunejob.status.phase is not Phase.SUSPENDED:
        draft.add_event(SUSPENDED, summary.progressing.message)
    return draft.finish(stage, summary)


def tell_of_resumption(draft: Draft) -> None:
    """Say that spec.suspend is false again."""
    if draft.finetunejob.status.phase is Phase.SUSPENDED:
        draft.add_event(RESUMED, "spec.suspend is false: what is left is started.")


def after_deadline(
    spec: FineTuneJobSpec, job: ObservedJob, verdict: Verdict, now: datetime
) -> Verdict:
    """Judge an attempt that took longer than it may; `verdict` is what its pod alone says.

    The Job controller stops its pods. A limit that was raised meanwhile holds for another attempt.
    """
    final = isinstance(verdict, Failure) and not verdict.reason.retryable
    if isinstance(verdict, Done) or final:
        return verdict  # it had come to its end by itself
    if job.may_have_pod_at_work:
        return verdict if isinstance(verdict, Pending) else Pending()
    stage, was = job.stage, job.deadline_seconds or 0
    limit = spec.pod_settings(stage).active_deadline_seconds
    message = f"{stage} took longer than the {was} s of spec.stages.{stage}.activeDeadlineSeconds."
    if raised := limit is None or limit > was:
        message += " The limit is higher by now, so it is tried again."
    else:
        message += " Raise it, or find out what takes so long."
    if stage is Stage.TRAIN:
        message += " The training goes on from its last checkpoint."
    return Failure(Reason.DEADLINE_EXCEEDED, message, job.finished_at or now, free=raised)


def check_silence(draft: Draft, job: ObservedJob, verdict: Verdict) -> Verdict:
    """Notice a training whose trainer hangs, process or node, so that it can't notice it itself.

    It reports at each heartbeat while it lives, and that the worker works is its own to watch. It
    is told first and ended only if it goes on to be silent: after an outage of the API server, when
    nobody could report, it has time for its next heartbeat.
    """
    last = _last_report(draft, job, verdict)
    if last is None:
        return verdict
    timeout = parse_duration(draft.spec.training.stall_timeout)
    # The report is dated by the node.
    left = last.at + max(timeout, last.allowance) + draft.policy.clock_skew - draft.now
    if left > timedelta():
        return Pending(requeue_after=left.total_seconds() + 1)
    silence = (
        f"The trainer in pod {last.pod} has not reported since {timestamp(last.at)}, though it "
        f"does every {last.heartbeat.total_seconds():.0f} s while it lives: it hangs, or its node "
        f"{last.node} does."
    )
    told = (
        f"{silence} It is stopped if it stays so for {last.allowance.total_seconds():.0f} s more."
    )
    note = PendingReason(Reason.STALLED, told, degraded=True, phase=PHASES[job.stage])
    before = draft.condition("Degraded")
    if before is None or before.reason != Reason.STALLED:
        return Pending(note, last.allowance.total_seconds() + 1)
    if before.message != told:
        return verdict  # it has reported since, by a clock that is wrong
    left = datetime.fromisoformat(before.last_transition_time) + last.allowance - draft.now
    if left > timedelta():
        return Pending(note, left.total_seconds() + 1)
    end = f"{silence} Its pod is stopped; the training goes on from its last checkpoint."
    return Failure(Reason.STALLED, end, draft.now)


@dataclass(frozen=True)
class _LastReport:
    """When a training that is at work, and promised to report, did so last."""

    at: datetime
    heartbeat: timedelta
    pod: str
    node: str

    @property
    def allowance(self) -> timedelta:
        return HEARTBEATS * self.heartbeat


def _last_report(draft: Draft, job: ObservedJob, verdict: Verdict) -> _LastReport | None:
    """None where nothing follows from silence, e.g. of an older trainer, or of one that has never
    reached the API server."""
    pod, reported = job.pod, draft.finetunejob.reported
    at_work = isinstance(verdict, Pending) and verdict.reason is None and not job.deleting
    if job.stage is not Stage.TRAIN or pod is None or not (at_work and pod.at_work):
        return None
    if reported.job != job.name or reported.at is None or not reported.heartbeat_seconds:
        return None
    heartbeat = timedelta(seconds=reported.heartbeat_seconds)
    return _LastReport(reported.at, heartbeat, pod.name, pod.node or "")


def _stopping_words(stage: Stage) -> str:
    saves = "; a training saves its last step first" if stage is Stage.TRAIN else ""
    return f"{stage} is being stopped, as spec.suspend asks{saves}."


def _suspended_summary(draft: Draft, stage: Stage, *, done: bool) -> Summary:
    next_one = "Nothing is started" if done else f"{stage} is not started"
    words = f"{next_one} until spec.suspend is false."
    ready = ConditionValue(False, SUSPENDED, words)
    if done and draft.planned.inputs == draft.spec.inputs_digest:
        ready = ConditionValue(True, Reason.SUCCEEDED, results.tell_of_success(draft))
    degraded = ConditionValue(False, AS_EXPECTED, ALL_WELL)
    why = draft.stages[stage].reason
    if not done and why is not None:
        degraded = ConditionValue(True, why, draft.stages[stage].message or "")
    return Summary(Phase.SUSPENDED, ready, ConditionValue(False, SUSPENDED, words), degraded)
