"""The decision: what to do about a FineTuneJob, given what is. Pure.

`plan` follows the Job of each stage, records its result and starts the next stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageState, StageStatus
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.plan import results
from finetune_operator.plan.draft import (
    Action,
    Draft,
    Event,
    Plan,
    Policy,
    StartStage,
    StopJob,
    stop_what_outlives_trainers,
    was_refused,
)
from finetune_operator.plan.verdict import Done, Failure, Pending, Verdict, judge, lost_pods
from finetune_operator.status import (
    PendingReason,
    conditions,
    failed_summary,
    quality_hint,
    refused_summary,
    shorten,
    succeeded_summary,
    timestamp,
    warnings_hint,
    working_summary,
)
from finetune_trainer.contract import Reason, Stage

__all__ = ["Action", "Event", "Plan", "Policy", "StartStage", "StopJob", "plan", "refuse"]

TERMINAL = {Phase.SUCCEEDED, Phase.FAILED}


def plan(
    finetunejob: ObservedFineTuneJob,
    jobs: Sequence[ObservedJob],
    pod_settings: Mapping[Stage, str],
    policy: Policy,
    now: datetime,
    *,
    stages_with_old_pods: frozenset[Stage] = frozenset(),
    denial: str | None = None,
) -> Plan:
    """Decide what to do next to get the artifacts that the spec asks for.

    `jobs` are the attempts so far. `pod_settings` maps each stage to the digest of the settings
    that its pods would get now. Of `stages_with_old_pods`, a pod still runs whose Job is gone, or
    one of an earlier FineTuneJob of the same name. `denial` is what the API server said when a
    stage was about to be started.
    """
    if finetunejob.deleting:
        return Plan(finetunejob.status)
    if _is_settled(finetunejob):
        held = stop_what_outlives_trainers(jobs, policy, now)
        return replace(held, status=finetunejob.status)
    if finetunejob.spec is None:
        return refuse(finetunejob, Reason.INVALID_SPEC, finetunejob.spec_error or "", now)
    draft = Draft(
        finetunejob,
        finetunejob.spec,
        jobs,
        pod_settings=pod_settings,
        policy=policy,
        now=now,
        stages_with_old_pods=stages_with_old_pods,
        denial=denial,
    )
    for stage in Stage:
        _follow_stage(draft, stage)
    results.record_notices(draft)
    return _advance(draft)


def _is_settled(finetunejob: ObservedFineTuneJob) -> bool:
    """Whether there is nothing left to do, or to follow, for this generation."""
    status = finetunejob.status
    if status.observed_generation != finetunejob.generation:
        return False
    if any(stage.state is StageState.RUNNING for stage in status.stages):
        return False
    if status.phase is None:  # or in a phase that only a newer operator knows
        return any(
            each.type == "Progressing" and each.status == "False" for each in status.conditions
        )
    if was_refused(status):
        return finetunejob.spec is None
    return status.phase in TERMINAL


def _follow_stage(draft: Draft, stage: Stage) -> None:
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
    verdict = _judge(draft, job)
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
        case Failure():
            results.record_published_files(draft, job, verdict)
            _record_failure(draft, stage, verdict)
            if _newer_jobs(draft, stage):
                _follow_stage(draft, stage)  # the next attempt was started without a word in status


def _judge(draft: Draft, job: ObservedJob) -> Verdict:
    """Judge the attempt, after its lost pods were counted."""
    _tell_of_lost_pods(draft, job)
    verdict = judge(job, draft.stages[job.stage], draft.policy, draft.now)
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
    names = [name for name, _ in lost]
    for name, failure in lost[names.index(told) + 1 if told in names else 0 :]:
        disruptions = draft.stages[job.stage].disruptions + 1
        draft.change(job.stage, disruptions=disruptions, lost_pod=name)
        draft.add_warning(failure.reason, failure.message)


def _too_many(draft: Draft, stage: Stage, last: Failure) -> Failure | None:
    """The end of a stage that loses one pod after the other."""
    count, limit = draft.stages[stage].disruptions, draft.policy.disruption_limit
    if count <= limit:
        return None
    message = (
        f"{last.message} {stage} has lost {count} pods; the operator's limit is {limit}. See why "
        f"they are taken away, e.g. for memory that it doesn't request, then change the spec."
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
        _mark_running(draft, stage, job.attempt, job.created)
    return job


def _has_outdated_settings(draft: Draft, job: ObservedJob) -> bool:
    """Whether the pod has not started yet and would get other settings now."""
    if job.finished is not None or job.deleting or (job.pod is not None and job.pod.started):
        return False
    if draft.stages[Stage.PREPARE].state is StageState.FAILED:
        return False  # it couldn't be started again
    return job.pod_settings != draft.pod_settings[job.stage]


def _mark_running(draft: Draft, stage: Stage, attempt: int, since: datetime) -> None:
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
    """Undo the start of an attempt, so that it starts again under the same number."""
    attempt = draft.stages[stage].attempt - 1
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
        draft.add_warning(failure.reason, message)


def _advance(draft: Draft) -> Plan:
    """Start the first stage that is not done, if it isn't running, waiting or failed."""
    left = [each for each in draft.stages.values() if each.state is not StageState.SUCCEEDED]
    if not left:
        draft.stop_obsolete_jobs()
        return _finish(draft)
    stage = left[0].name
    match left[0].state:
        case StageState.FAILED:
            if stage is not Stage.PREPARE:
                _halt_running_stages(draft)
            draft.stop_obsolete_jobs()
            return draft.finish(stage, failed_summary(left[0], _what_stays(draft)))
        case StageState.PENDING:
            draft.stop_obsolete_jobs()
            _start(draft, stage)
        case _:
            draft.stop_obsolete_jobs()
    earlier = bool(draft.found.artifacts)
    notices = draft.found.notices
    summary = working_summary(
        draft.stages[stage], draft.pending_reasons.get(stage), earlier, notices
    )
    return draft.finish(stage, summary)


def _start(draft: Draft, stage: Stage) -> None:
    status, key = draft.stages[stage], draft.stage_key(stage)
    wait = _retry_delay(status, draft.policy, draft.now)
    if wait > timedelta():
        draft.requeue_after(wait.total_seconds())
        return
    mine = any(job.stage is stage and job.may_have_pod_at_work for job in draft.jobs)
    if mine or stage in draft.stages_with_old_pods:
        # Two pods at a time would write the same files, e.g. checkpoints.
        draft.pending_reasons[stage] = PendingReason(
            "Stopping", f"{stage} starts when its earlier pod has stopped."
        )
        return
    if draft.denial is not None:
        _wait_for_admission(draft, stage, draft.denial)
        return
    if key is None:
        raise ValueError(f"{stage} has no fingerprint though prepare succeeded")
    attempt = status.attempt + 1
    resolved = None if stage is Stage.PREPARE else draft.found.resolved
    draft.add_action(StartStage(stage, key, attempt, resolved))
    draft.add_event("StageStarted", f"Started {stage}, attempt {attempt}.")
    _mark_running(draft, stage, attempt, draft.now)


def _wait_for_admission(draft: Draft, stage: Stage, words: str) -> None:
    message = f"The API server denies the Job of {stage}; it is tried again. It says: {words}"
    draft.pending_reasons[stage] = PendingReason(Reason.REQUEST_DENIED, message, degraded=True)
    if shorten(message) not in {each.message for each in draft.finetunejob.status.conditions}:
        draft.add_warning(Reason.REQUEST_DENIED, message)


def _retry_delay(status: StageStatus, policy: Policy, now: datetime) -> timedelta:
    """How long the next attempt still has to wait."""
    if status.reason is None or status.completion_time is None:
        return timedelta()
    pause = min(policy.retry_base * 2.0 ** min(status.attempt - 1, 16), policy.retry_cap)
    due = datetime.fromisoformat(status.completion_time) + pause
    # The end may be dated by a node whose clock is fast.
    return max(timedelta(), min(due - now, pause))


def _halt_running_stages(draft: Draft) -> None:
    for stage, status in draft.stages.items():
        if status.state is StageState.RUNNING:
            draft.change(stage, state=StageState.PENDING, start_time=None)


def _what_stays(draft: Draft) -> str:
    """What the failure of a newer spec leaves alone."""
    running = [name for name, each in draft.stages.items() if each.state is StageState.RUNNING]
    words = [f"The {running[0]} of the former spec goes on."] if running else []
    if draft.is_ready and draft.former_stands:
        words.append("The former version stays current.")
    return " ".join(words)


def _finish(draft: Draft) -> Plan:
    folder, manifest = results.artifacts_folder(draft), draft.found.manifest_uri
    message = f"The artifacts are in {folder}; {manifest} lists them."
    message += warnings_hint(draft.found.notices) + quality_hint(draft.found.artifacts)
    if not draft.is_ready or draft.planned != draft.finetunejob.status.planned:
        draft.add_event(Reason.SUCCEEDED, message)
    return draft.finish(Stage.EXPORT, succeeded_summary(message))


def refuse(finetunejob: ObservedFineTuneJob, reason: Reason, message: str, now: datetime) -> Plan:
    """Fail for good, since nothing can be made of this spec.

    What runs goes on: it is of an earlier spec, or of this one as another version read it.
    """
    message = shorten(message)
    known = {stage.name: stage for stage in finetunejob.status.stages}
    summary = refused_summary(reason, message)
    before, generation = finetunejob.status, finetunejob.generation
    status = before.model_copy(
        update={
            "observed_generation": generation,
            "phase": summary.phase,
            "stages": tuple(known.get(name, StageStatus(name=name)) for name in Stage),
            "conditions": conditions(
                before.conditions, summary, generation, now, finetunejob.not_understood
            ),
        }
    )
    is_news = _degraded_words(before) != _degraded_words(status)
    return Plan(status, events=(Event("Warning", reason, message),) if is_news else ())


def _degraded_words(status: FineTuneJobStatus) -> list[tuple[str, int]]:
    return [
        (each.message, each.observed_generation)
        for each in status.conditions
        if each.type == "Degraded"
    ]
