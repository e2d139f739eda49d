"""`plan`: follow each stage's Job, take in what `prepare` found, start what is next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from finetune_operator import status as say
from finetune_operator.api.finetunejob import Phase, StageState, StageStatus
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.plan import results
from finetune_operator.plan.draft import Draft, Event, Plan, Policy, StartStage, StopJob
from finetune_operator.plan.verdict import Done, Failure, Pending, judge
from finetune_operator.status import Note, shorten, timestamp
from finetune_trainer.contract import Reason, Stage

TERMINAL = {Phase.SUCCEEDED, Phase.FAILED}


def plan(
    job: ObservedFineTuneJob,
    runs: Sequence[ObservedJob],
    pod_settings: Mapping[Stage, str],
    policy: Policy,
    now: datetime,
    *,
    occupied: frozenset[Stage] = frozenset(),
) -> Plan:
    """Decide what leads from what is (job, runs) to the artifacts that the spec asks for.

    `pod_settings` holds, per stage, the digest of the settings that its pods would get now;
    `occupied` the stages at which a pod of an earlier FineTuneJob of this name is still at work.
    """
    if job.deleting or _settled(job):
        return Plan(job.status)
    if job.spec is None:
        return refuse(job, runs, Reason.INVALID_SPEC, job.spec_error or "", now)
    draft = Draft(
        job,
        job.spec,
        runs,
        pod_settings=pod_settings,
        policy=policy,
        now=now,
        occupied=occupied,
    )
    for stage in Stage:
        _follow(draft, stage)
    results.take_in_notices(draft)
    return _advance(draft)


def _settled(job: ObservedFineTuneJob) -> bool:
    status = job.status
    return status.observed_generation == job.generation and status.phase in TERMINAL


def _follow(draft: Draft, stage: Stage) -> None:
    """Take in what became of the stage's current attempt."""
    run = _current_run(draft, stage)
    if run is None:
        return
    if _outdated(draft, run):
        draft.tell("StageRecreated", f"The pod of {stage} is made anew with its changed settings.")
        _give_back(draft, stage)
        return
    verdict = judge(run, draft.stages[stage], draft.policy, draft.now)
    if stage is Stage.PREPARE and not isinstance(verdict, Pending):
        results.show_dataset(draft, run)
    match verdict:
        case Pending():
            draft.look_again(verdict.look_again)
            if verdict.note is not None:
                draft.notes[stage] = verdict.note
            if verdict.disruption is not None:
                _remember(draft, stage, verdict.disruption)
        case Done():
            results.take_in(draft, run, verdict)
        case Failure():
            results.show_published(draft, run, verdict)
            _fail(draft, stage, verdict)


def _remember(draft: Draft, stage: Stage, disruption: Failure) -> None:
    """Keep in status how the pod ended: it may be gone by the time its Job has failed."""
    message = shorten(disruption.message)
    draft.change(stage, reason=str(disruption.reason), message=message)


def _current_run(draft: Draft, stage: Stage) -> ObservedJob | None:
    status, runs = draft.stages[stage], draft.runs_of(stage)
    if status.state is StageState.RUNNING:
        mine = [run for run in runs if run.attempt == status.attempt]
        if not mine:
            # Deleted by hand, or by its TTL while the operator was away. The same attempt is made
            # again: should the Job merely not be visible yet, its name keeps it from being two.
            _give_back(draft, stage)
        return min(mine, key=lambda run: run.deleting, default=None)
    if status.state is StageState.PENDING:
        return _adopt(draft, stage, runs)
    return None


def _adopt(draft: Draft, stage: Stage, runs: Sequence[ObservedJob]) -> ObservedJob | None:
    """A Job that was started before its start could be written to status."""
    attempt = draft.stages[stage].attempt
    newer = [run for run in runs if run.attempt > attempt and not run.deleting]
    newer = [run for run in newer if not _outdated(draft, run)]
    if not newer:
        return None
    run = max(newer, key=lambda run: run.attempt)
    _running(draft, stage, run.attempt, run.created)
    return run


def _outdated(draft: Draft, run: ObservedJob) -> bool:
    """Whether its pod would be made differently now, and hasn't done anything yet."""
    if run.finished is not None or run.deleting or (run.pod is not None and run.pod.started):
        return False
    return run.pod_settings != draft.pod_settings[run.stage]


def _running(draft: Draft, stage: Stage, attempt: int, since: datetime) -> None:
    draft.change(
        stage,
        state=StageState.RUNNING,
        attempt=attempt,
        reason=None,
        message=None,
        start_time=timestamp(since),
        completion_time=None,
    )


def _give_back(draft: Draft, stage: Stage) -> None:
    """Undo the start of an attempt, which will be made again under the same number."""
    attempt = draft.stages[stage].attempt - 1
    draft.change(stage, state=StageState.PENDING, attempt=attempt, start_time=None)


def _fail(draft: Draft, stage: Stage, failure: Failure) -> None:
    status = draft.stages[stage]
    failures = status.failures if failure.free else status.failures + 1
    limit = draft.spec.backoff_limit
    again = failure.free or (failure.reason.retryable and failures <= limit)
    message = failure.message
    if failure.reason.retryable and not again:
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
    if not results.warn_of_quality(draft, failure.result, failure.reason):
        draft.warn(failure.reason, message)


def _advance(draft: Draft) -> Plan:
    """Start the first stage that is not done, unless it runs, waits or has failed."""
    left = [each for each in draft.stages.values() if each.state is not StageState.SUCCEEDED]
    if not left:
        draft.stop_unclaimed()
        return _succeed(draft)
    stage = left[0].name
    match left[0].state:
        case StageState.FAILED:
            _stop_all(draft)
            draft.stop_unclaimed()
            return draft.finish(stage, say.failed(left[0]))
        case StageState.PENDING:
            draft.stop_unclaimed()
            _start(draft, stage)
        case _:
            draft.stop_unclaimed()
    earlier = bool(draft.found.artifacts)
    notices = draft.found.notices
    outlook = say.working(draft.stages[stage], draft.notes.get(stage), earlier, notices)
    return draft.finish(stage, outlook)


def _start(draft: Draft, stage: Stage) -> None:
    status, key = draft.stages[stage], draft.key(stage)
    wait = _delay(status, draft.policy, draft.now)
    if wait > timedelta():
        draft.look_again(wait.total_seconds())
        return
    mine = any(run.stage is stage and run.occupied for run in draft.runs)
    if mine or stage in draft.occupied:
        # Two at a time would write the same files, a training's checkpoints for one.
        draft.notes[stage] = Note("Stopping", f"{stage} starts when its earlier pod has stopped.")
        return
    if key is None:
        raise ValueError(f"{stage} has no fingerprint though prepare succeeded")
    attempt = status.attempt + 1
    resolved = None if stage is Stage.PREPARE else draft.found.resolved
    draft.act(StartStage(stage, key, attempt, resolved))
    draft.tell("StageStarted", f"Started {stage}, attempt {attempt}.")
    _running(draft, stage, attempt, draft.now)


def _delay(status: StageStatus, policy: Policy, now: datetime) -> timedelta:
    """How long the next attempt has to wait still."""
    if status.reason is None or status.completion_time is None:
        return timedelta()
    pause = policy.retry_base * 2.0 ** min(status.attempt - 1, 16)
    due = datetime.fromisoformat(status.completion_time) + min(pause, policy.retry_cap)
    return max(timedelta(), due - now)


def _stop_all(draft: Draft) -> None:
    """No stage goes on when the FineTuneJob has failed."""
    for stage, status in draft.stages.items():
        if status.state is StageState.RUNNING:
            draft.change(stage, state=StageState.PENDING, start_time=None)


def _succeed(draft: Draft) -> Plan:
    folder, manifest = draft.spec.output.uri, draft.found.manifest_uri
    message = f"The artifacts are in {folder}; {manifest} lists them."
    message += say.warned_of(draft.found.notices) + say.fell_short(draft.found.artifacts)
    draft.tell(Reason.SUCCEEDED, message)
    return draft.finish(Stage.EXPORT, say.succeeded(message))


def refuse(
    job: ObservedFineTuneJob,
    runs: Sequence[ObservedJob],
    reason: Reason,
    message: str,
    now: datetime,
) -> Plan:
    """Fail for good, and stop what an earlier spec has started."""
    message = shorten(message)
    known = {stage.name: stage for stage in job.status.stages}
    outlook = say.refused(reason, message)
    status = job.status.model_copy(
        update={
            "observed_generation": job.generation,
            "phase": outlook.phase,
            "stages": tuple(_halted(known.get(name, StageStatus(name=name))) for name in Stage),
            "conditions": say.conditions(job.status.conditions, outlook, job.generation, now),
        }
    )
    stops = tuple(StopJob(run.name, run.uid) for run in runs if run.active and not run.deleting)
    return Plan(status, actions=stops, events=(Event("Warning", reason, message),))


def _halted(stage: StageStatus) -> StageStatus:
    if stage.state is not StageState.RUNNING:
        return stage
    return stage.model_copy(update={"state": StageState.PENDING, "start_time": None})
