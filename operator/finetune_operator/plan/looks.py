"""When `prepare` looks again although nobody has edited the spec, and what becomes of that. Pure.

A look has a number, which is part of its Job's name. So it runs once, whenever the operator dies.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_operator.api import RETRY_ANNOTATION
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import LookCause, StageState, StageStatus
from finetune_operator.observe import ObservedFineTuneJob
from finetune_operator.plan.draft import Draft, Plan
from finetune_operator.status import Summary, failed_summary, look_failed_summary, timestamp
from finetune_trainer.contract import Stage


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
