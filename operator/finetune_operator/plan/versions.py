"""When `prepare` looks again although nobody has edited the spec, and what becomes of that; the
history of versions, and going back to one of them. Pure.

A look has a number, which is part of its Job's name. So it runs once, whenever the operator dies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from finetune_operator.api import RETRY_ANNOTATION
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import (
    LookCause,
    StageState,
    StageStatus,
    VersionState,
    VersionStatus,
)
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.plan.draft import Draft, Plan
from finetune_operator.plan.verdict import Done, Failure, Verdict
from finetune_operator.status import Summary, failed_summary, look_failed_summary, timestamp
from finetune_trainer.contract import Reason, Stage, StageResult, VersionSummary


def due_look(finetunejob: ObservedFineTuneJob, now: datetime, *, settled: bool) -> LookCause | None:
    """Why `prepare` has to look now; None where it need not.

    A request to try again is met at once: as after an edit, what runs goes on until the answer is
    there. A refresh waits for what is at work: data that changes often must not keep a training
    from ever coming to its end.
    """
    before = finetunejob.status.last_handled_retry_at
    if before is not None and handled_retry(finetunejob) != before:
        return LookCause.RETRY_REQUESTED
    left = seconds_to_refresh(finetunejob, now) if settled else None
    return LookCause.REFRESH if left is not None and left <= 0 else None


def handled_retry(finetunejob: ObservedFineTuneJob) -> str | None:
    """The last request to try again that has been met when this pass has ended.

    It has to wait while nothing can be started: suspended, or without a spec that can be read. The
    first one also waits until status holds an empty string: an older definition drops the field,
    and what can't be remembered would be met without an end.
    """
    spec, status = finetunejob.spec, finetunejob.status
    before, asked = status.last_handled_retry_at, finetunejob.retry_requested
    if not asked or spec is None or spec.suspend:
        return before
    begun = status.observed_generation is not None
    return "" if begun and before is None else asked


def tell_of_retry(draft: Draft, look: LookCause | None) -> None:
    if look is LookCause.RETRY_REQUESTED:
        words = f"prepare looks again, as {RETRY_ANNOTATION} asks"
        draft.add_event(look, f"{words} ({draft.finetunejob.retry_requested}).")


def seconds_to_refresh(finetunejob: ObservedFineTuneJob, now: datetime) -> float | None:
    """Until the next look of a FineTuneJob at rest is due; None where there will be none."""
    spec, stages = finetunejob.spec, finetunejob.status.stages
    prepare = next((stage for stage in stages if stage.name is Stage.PREPARE), None)
    due = next_refresh(spec, prepare) if spec is not None and prepare is not None else None
    return None if due is None else (due - now).total_seconds()


def next_refresh(spec: FineTuneJobSpec, prepare: StageStatus) -> datetime | None:
    """When dataset and model are looked at again: so long after the last look began."""
    held = spec.suspend or spec.rollback_to is not None
    interval = None if held else spec.refresh_interval
    if interval is None or prepare.start_time is None:
        return None
    return datetime.fromisoformat(prepare.start_time) + interval


def with_looks(draft: Draft, made: Plan) -> Plan:
    """The plan, whose status says when dataset and model are looked at, and at whose request."""
    prepare = draft.stages[Stage.PREPARE]
    due = next_refresh(draft.spec, prepare)
    times = {
        "last_refresh_time": prepare.start_time if due else None,
        "next_refresh_time": timestamp(due) if due else None,
        "last_handled_retry_at": handled_retry(draft.finetunejob),
    }
    return replace(made, status=made.status.model_copy(update=times))


def stays_failed(draft: Draft, stage: StageStatus) -> bool:
    """Whether a refresh leaves a stage alone that failed with these very inputs.

    It would fail again, at each interval and for hours of a GPU. A request to try again is another
    thing.
    """
    refreshed = draft.planned.cause is LookCause.REFRESH
    return refreshed and stage.state is StageState.FAILED


def failure_summary(draft: Draft, stage: StageStatus) -> Summary:
    """What to say when a stage has failed for good."""
    after = _what_follows(draft)
    if stage.name is Stage.PREPARE and _spec_is_reached(draft):
        return look_failed_summary(stage, after)
    if draft.planned.cause is LookCause.REFRESH and stage.name is not Stage.PREPARE:
        what = "No new version can be made"
        return failed_summary(stage, _what_stays(draft), after, what)
    return failed_summary(stage, _what_stays(draft), after)


def _spec_is_reached(draft: Draft) -> bool:
    """Whether the artifacts of this very spec are there, and only a further look at it failed."""
    ready = draft.ready
    return (
        draft.planned.cause is not None
        and draft.former_stands
        and ready is not None
        and ready.status == "True"
        and ready.observed_generation == draft.finetunejob.generation
    )


def _what_stays(draft: Draft) -> str:
    """What the failure of a newer spec, or of newer data, leaves alone."""
    running = [name for name, each in draft.stages.items() if each.state is StageState.RUNNING]
    words = [f"The {running[0]} of the former spec goes on."] if running else []
    if draft.is_ready and draft.former_stands:
        words.append("The former version stays current.")
    return " ".join(words)


def _what_follows(draft: Draft) -> str | None:
    """When it is looked at again without anybody's doing."""
    due = next_refresh(draft.spec, draft.stages[Stage.PREPARE])
    if due is None:
        return None
    return f"Dataset and model are looked at again at {timestamp(max(due, draft.now))}."


HISTORY_LIMIT = 20  # versions beside the current one; a trainer tells of no more


def record_versions(draft: Draft, result: StageResult | None) -> None:
    """Bring the history up to date with what a stage found in the store."""
    if result is not None and result.versions is not None:
        draft.found.versions = history(draft.found.versions, result.versions)


def history(
    known: Sequence[VersionStatus], told: Sequence[VersionSummary]
) -> tuple[VersionStatus, ...]:
    """The versions that the store holds, and those of before, the newest first.

    What a stage couldn't tell for want of room is taken from before.
    """
    before = {each.version: each for each in known}
    found = [_brought_up_to_date(before.get(each.version), each) for each in told]
    there = {each.version for each in found}
    oldest = min((each.completion_time or "" for each in found), default="")
    whole = len(told) < HISTORY_LIMIT
    for each in known:
        if each.version not in there:
            gone = whole or (each.completion_time or "") > oldest
            state = VersionState.DELETED if gone else _no_longer_current(each.state)
            found.append(each.model_copy(update={"state": state}))
    found.sort(key=lambda each: each.completion_time or "", reverse=True)
    newest = found[:HISTORY_LIMIT]
    others = [each for each in found[HISTORY_LIMIT:] if each.state is VersionState.CURRENT]
    return (*newest, *others)


def _brought_up_to_date(before: VersionStatus | None, told: VersionSummary) -> VersionStatus:
    fields = {
        "version": told.version,
        "completion_time": told.created,
        "dataset_etag": told.dataset_etag,
        "dataset_rows": told.dataset_rows,
        "model_revision": told.model_revision,
        "eval_loss": told.eval_loss,
    }
    earlier = dict(before) if before is not None else {}
    given = {name: value for name, value in fields.items() if value is not None}
    return VersionStatus.model_validate({**earlier, **given, "state": _state(told)})


def _state(told: VersionSummary) -> VersionState:
    if told.current:
        return VersionState.CURRENT
    return VersionState.REJECTED if told.rejected else VersionState.AVAILABLE


def _no_longer_current(state: VersionState) -> VersionState:
    return VersionState.AVAILABLE if state is VersionState.CURRENT else state


def check_rollback(draft: Draft, job: ObservedJob, verdict: Verdict) -> Verdict:
    """The verdict on `prepare`, unless its image is too old to know of `rollbackTo`."""
    wanted = draft.spec.rollback_to
    if job.stage is not Stage.PREPARE or wanted is None or not isinstance(verdict, Done):
        return verdict
    if verdict.result is not None and verdict.result.version == wanted:
        return verdict
    message = (
        f"The trainer image {job.image} doesn't know spec.rollbackTo, and has set nothing back. "
        "Name a newer one in spec.stages.prepare.image, or leave rollbackTo out."
    )
    return Failure(Reason.INVALID_CONFIG, message, verdict.at)


def halt_export(draft: Draft) -> None:
    """Before a version becomes current again, stop the export that would put its own in its place.

    A training may go on until `prepare` has answered; it is as good as its checkpoints.
    """
    looks = draft.stages[Stage.PREPARE].state is not StageState.SUCCEEDED
    exports = draft.stages[Stage.EXPORT].state is StageState.RUNNING
    if draft.spec.rollback_to is not None and looks and exports:
        draft.change(Stage.EXPORT, state=StageState.PENDING, start_time=None)


def awaits_export(draft: Draft, stage: Stage) -> bool:
    """Whether `prepare` has to wait until an export that was stopped has stopped."""
    if draft.spec.rollback_to is None or stage is not Stage.PREPARE:
        return False
    jobs = [job for job in draft.jobs if job.stage is Stage.EXPORT and job.may_have_pod_at_work]
    return bool(jobs) or Stage.EXPORT in draft.old_pods
