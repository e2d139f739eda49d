"""The decision: what to do about a FineTuneJob, given what is. Pure.

`plan` follows the Job of each stage, records its result and starts the next stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageState, StageStatus
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.plan import follow, results, versions
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
from finetune_operator.plan.follow import follow_stage, mark_running
from finetune_operator.pods import ObservedPod
from finetune_operator.status import (
    PendingReason,
    conditions,
    refused_summary,
    shorten,
    succeeded_summary,
    working_summary,
)
from finetune_trainer.contract import Reason, Stage

__all__ = [
    "Action",
    "Event",
    "Plan",
    "Policy",
    "StartStage",
    "StopJob",
    "has_ended",
    "plan",
    "refuse",
]

TERMINAL = {Phase.SUCCEEDED, Phase.FAILED}


def plan(
    finetunejob: ObservedFineTuneJob,
    jobs: Sequence[ObservedJob],
    pod_settings: Mapping[Stage, str],
    policy: Policy,
    now: datetime,
    *,
    old_pods: Mapping[Stage, ObservedPod] | None = None,
    denial: str | None = None,
) -> Plan:
    """Decide what to do next to get the artifacts that the spec asks for.

    `jobs` are the attempts so far. `pod_settings` maps each stage to the digest of the settings
    that its pods would get now. `old_pods` still run although their Job is gone, or are those of an
    earlier FineTuneJob of the same name. `denial` is what the API server said when a
    stage was about to be started.
    """
    if finetunejob.deleting:
        return Plan(finetunejob.status)
    settled = _is_settled(finetunejob)
    look = versions.due_look(finetunejob, now, settled=settled)
    if settled and look is None:
        held = stop_what_outlives_trainers(jobs, policy, now)
        delays = (held.requeue_after, versions.seconds_to_refresh(finetunejob, now))
        soonest = min((each for each in delays if each is not None), default=None)
        handled = {"last_handled_retry_at": versions.handled_retry(finetunejob)}
        status = finetunejob.status.model_copy(update=handled)
        return replace(held, status=status, requeue_after=soonest)
    if finetunejob.spec is None:
        return refuse(finetunejob, Reason.INVALID_SPEC, finetunejob.spec_error or "", now)
    draft = Draft(
        finetunejob,
        finetunejob.spec,
        jobs,
        pod_settings=pod_settings,
        policy=policy,
        now=now,
        old_pods=old_pods or {},
        denial=denial,
        look=look,
    )
    versions.tell_of_retry(draft, look)
    for stage in Stage:
        follow_stage(draft, stage)
    results.record_notices(draft)
    if draft.spec.suspend:
        made = follow.suspend(draft)
    else:
        follow.tell_of_resumption(draft)
        versions.halt_export(draft)
        made = _advance(draft)
    return versions.with_looks(draft, made)


def has_ended(status: FineTuneJobStatus, generation: int) -> bool:
    """Whether it came to its end, well or badly, and no stage is still followed."""
    current = status.observed_generation == generation and status.phase in TERMINAL
    return current and all(stage.state is not StageState.RUNNING for stage in status.stages)


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
            return draft.finish(stage, versions.failure_summary(draft, left[0]))
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
    if not _may_start(draft, stage):
        # Status goes on to name an attempt that has to be started again: its number is taken.
        draft.stages[stage] = draft.unstarted.get(stage, draft.stages[stage])
        return
    key = draft.stage_key(stage)
    if key is None:
        raise ValueError(f"{stage} has no fingerprint though prepare succeeded")
    attempt = draft.stages[stage].attempt + 1
    resolved = None if stage is Stage.PREPARE else draft.found.resolved
    draft.add_action(StartStage(stage, key, attempt, resolved))
    draft.add_event("StageStarted", f"Started {stage}, attempt {attempt}.")
    mark_running(draft, stage, attempt, draft.now)


def _may_start(draft: Draft, stage: Stage) -> bool:
    """Whether the next attempt can begin now; else say what it waits for."""
    wait = _retry_delay(draft.stages[stage], draft.policy, draft.now)
    if wait > timedelta():
        draft.requeue_after(wait.total_seconds())
        return False
    if follow.has_pod_at_work(draft, stage):
        # Two pods at a time would write the same files, e.g. checkpoints.
        follow.wait_for_earlier_pods(draft, stage)
        return False
    if versions.awaits_export(draft, stage):
        draft.pending_reasons[stage] = PendingReason(
            "Stopping", "prepare starts when the pod of export has stopped."
        )
        return False
    if draft.denial is not None:
        _wait_for_admission(draft, stage, draft.denial)
        return False
    return True


def _wait_for_admission(draft: Draft, stage: Stage, words: str) -> None:
    message = f"The API server denies the Job of {stage}; it is tried again. It says: {words}"
    draft.pending_reasons[stage] = PendingReason(Reason.REQUEST_DENIED, message, degraded=True)
    draft.warn_once(Reason.REQUEST_DENIED, message)


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


def _finish(draft: Draft) -> Plan:
    return draft.finish(Stage.EXPORT, succeeded_summary(results.tell_of_success(draft)))


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
            "reason": summary.reason,
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
