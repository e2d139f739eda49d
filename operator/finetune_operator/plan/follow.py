"""Follow the attempt at a stage: which Job it is, what has become of it, and what holds or ends it
from outside: an earlier pod, spec.suspend, its deadline. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import Phase, StageState
from finetune_operator.observe import ObservedJob
from finetune_operator.plan import results, versions
from finetune_operator.plan.draft import Draft, Plan
from finetune_operator.plan.verdict import (
    PREEMPTED,
    Done,
    Failure,
    Pending,
    Verdict,
    judge,
    lost_node,
    lost_pods,
    made_room,
    until_lost,
)
from finetune_operator.pods import ObservedPod
from finetune_operator.status import (
    ALL_WELL,
    AS_EXPECTED,
    PHASES,
    SUSPENDED,
    ConditionValue,
    PendingReason,
    Summary,
    shorten,
    timestamp,
    working_summary,
)
from finetune_trainer.contract import Reason, Stage, parse_duration


def follow_stage(draft: Draft, stage: Stage) -> None:
    """Record what has become of the current attempt at a stage."""
    job = _current_job(draft, stage)
    if job is None:
        return
    if _has_outdated_settings(draft, job):
        draft.add_event(
            "StageRecreated", f"The pod of {stage} is made anew with its changed settings."
        )
        _undo_start(draft, stage)
        return
    verdict = versions.check_rollback(draft, job, _judge(draft, job))
    if stage is Stage.PREPARE and not isinstance(verdict, Pending):
        results.record_dataset(draft, job)
    match verdict:
        case Pending():
            draft.requeue_after(verdict.requeue_after)
            if verdict.reason is not None:
                draft.pending_reasons[stage] = verdict.reason
            if verdict.disruption is not None:
                _remember_disruption(draft, stage, verdict.disruption)
        case Done():
            results.record_success(draft, job, verdict)
            versions.record_versions(draft, verdict.result)
        case Failure():
            results.record_published_files(draft, job, verdict)
            versions.record_versions(draft, verdict.result)
            _record_failure(draft, stage, verdict)
            if _newer_jobs(draft, stage):
                follow_stage(draft, stage)  # the next attempt was started without a word in status


def _judge(draft: Draft, job: ObservedJob) -> Verdict:
    """Judge the attempt, after its lost pods were counted."""
    _tell_of_lost_pods(draft, job)
    verdict = judge(job, draft.stages[job.stage], draft.policy, draft.now)
    if job.past_deadline:
        return after_deadline(draft.spec, job, verdict, draft.now)
    verdict = check_silence(draft, job, verdict)
    match verdict:
        case Failure(free=True) if job.pod is None and draft.stages[job.stage].reason is None:
            # Nobody saw how its pod was lost.
            disruptions = draft.stages[job.stage].disruptions + 1
            draft.change(job.stage, disruptions=disruptions)
            return _too_many(draft, job.stage, verdict) or verdict
        case Failure(free=True) as lost:
            return _too_many(draft, job.stage, lost) or lost
        case Pending(disruption=Failure() as lost):
            return _too_many(draft, job.stage, lost) or verdict
    return verdict


def _tell_of_lost_pods(draft: Draft, job: ObservedJob) -> None:
    """Count and tell each pod once: the Job may make the next one before anybody looks."""
    lost, told = lost_pods(job, draft.policy, draft.now), draft.stages[job.stage].lost_pod
    if job.deleting or job.past_deadline or draft.spec.suspend:  # it is stopped with its pods
        lost = [each for each in lost if each[1].reason is Reason.NODE_LOST]
    names = [name for name, _ in lost]
    for name, failure in lost[names.index(told) + 1 if told in names else 0 :]:
        if made_room(job, failure):
            draft.change(job.stage, lost_pod=name)
            _tell_of_eviction(draft, job, name)
            continue
        disruptions = draft.stages[job.stage].disruptions + 1
        draft.change(job.stage, disruptions=disruptions, lost_pod=name)
        draft.warn_of_attempt(job.stage, failure.reason, failure.message)


def _tell_of_eviction(draft: Draft, job: ObservedJob, pod: str) -> None:
    state = job.queue_state
    reason = PREEMPTED if state is not None and state.preempted else "Evicted"
    why = f": {state.message}" if state is not None else "."
    words = f"{job.stage} had to make room in Kueue's queue {job.queue}{why}"
    draft.add_event(reason, words, pod)


def _too_many(draft: Draft, stage: Stage, last: Failure) -> Failure | None:
    """The end of a stage that loses one pod after the other."""
    count, limit = draft.stages[stage].disruptions, draft.policy.disruption_limit
    if count <= limit:
        return None
    message = (
        f"{last.message} {stage} has lost {count} pods; the operator's limit is {limit}. See why "
        f"they are taken away, e.g. for memory that it doesn't request, then ask for a retry."
    )
    return replace(last, reason=Reason.POD_DISRUPTED, message=message, free=False, final=True)


def _remember_disruption(draft: Draft, stage: Stage, disruption: Failure) -> None:
    """Keep in status how the pod ended: it may be gone by the time its Job fails."""
    message = shorten(disruption.message)
    draft.change(stage, reason=str(disruption.reason), message=message)


def _current_job(draft: Draft, stage: Stage) -> ObservedJob | None:
    status, jobs = draft.stages[stage], draft.jobs_of(stage)
    if status.state is StageState.RUNNING:
        mine = [job for job in jobs if job.attempt == status.attempt]
        if mine:
            return min(mine, key=lambda job: job.deleting)
        if _newer_jobs(draft, stage):
            return _adopt(draft, stage)
        # Somebody deleted the Job, or its TTL did while the operator was down, or the operator died
        # before it made it. Start the same attempt again. If the watch just doesn't show the Job
        # yet, its name prevents a second.
        if not draft.spec.suspend:
            draft.unstarted[stage] = status
        _undo_start(draft, stage)
        return None
    if status.state is StageState.PENDING:
        return _adopt(draft, stage)
    return None


def _newer_jobs(draft: Draft, stage: Stage) -> list[ObservedJob]:
    """Jobs that were started although status doesn't say so, whether or not they have ended."""
    attempt = draft.stages[stage].attempt
    newer = [job for job in draft.jobs_of(stage) if job.attempt > attempt and not job.deleting]
    return [job for job in newer if not _has_outdated_settings(draft, job)]


def _adopt(draft: Draft, stage: Stage) -> ObservedJob | None:
    """Record the next of them as running; when it has ended, the one after it follows."""
    job = min(_newer_jobs(draft, stage), key=lambda job: job.attempt, default=None)
    if job is not None:
        mark_running(draft, stage, job.attempt, job.created)
    return job


def _has_outdated_settings(draft: Draft, job: ObservedJob) -> bool:
    """Whether the pod has not started yet and would get other settings now."""
    if job.finished is not None or job.deleting or (job.pod is not None and job.pod.started):
        return False
    if draft.stages[Stage.PREPARE].state is StageState.FAILED or draft.spec.suspend:
        return False  # it couldn't be started again
    return job.pod_settings != draft.pod_settings[job.stage]


def mark_running(draft: Draft, stage: Stage, attempt: int, since: datetime) -> None:
    draft.change(
        stage,
        state=StageState.RUNNING,
        attempt=attempt,
        reason=None,
        message=None,
        start_time=timestamp(since),
        completion_time=None,
    )


def _undo_start(draft: Draft, stage: Stage) -> None:
    """Undo the start of an attempt, so that it starts again under the same number.

    One that was stopped by spec.suspend took place: the next one gets another number.
    """
    attempt = draft.stages[stage].attempt
    if draft.spec.suspend:
        draft.change(stage, reason=None, message=None)
    else:
        attempt -= 1
    draft.change(stage, state=StageState.PENDING, attempt=attempt, start_time=None)


def _record_failure(draft: Draft, stage: Stage, failure: Failure) -> None:
    status = draft.stages[stage]
    failures = status.failures if failure.free or failure.final else status.failures + 1
    limit = draft.spec.backoff_limit
    retryable = failure.reason.retryable and not failure.final
    again = failure.free or (retryable and failures <= limit)
    message = failure.message
    if retryable and not again:
        times = "once" if failures == 1 else f"{failures} times"
        message = f"{message} It failed {times}; spec.backoffLimit is {limit}."
    draft.change(
        stage,
        state=StageState.PENDING if again else StageState.FAILED,
        failures=failures,
        reason=str(failure.reason),
        message=shorten(message),
        completion_time=timestamp(failure.at),
    )
    if not results.warn_of_failed_files(draft, failure.result, failure.reason):
        draft.warn_of_attempt(stage, failure.reason, message)


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
