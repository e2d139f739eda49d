"""Follow the attempt at a stage: which Job it is, and what has become of it. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_operator.api.observed import StageState
from finetune_operator.observe import ObservedJob
from finetune_operator.plan import lifecycle, results, versions
from finetune_operator.plan.draft import Draft
from finetune_operator.plan.verdict import (
    PREEMPTED,
    Done,
    Failure,
    Pending,
    Verdict,
    judge,
    lost_pods,
    made_room,
)
from finetune_operator.status import shorten, timestamp
from finetune_trainer.contract import Reason, Stage


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
        return lifecycle.after_deadline(draft.spec, job, verdict, draft.now)
    verdict = lifecycle.check_silence(draft, job, verdict)
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
