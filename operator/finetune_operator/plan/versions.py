"""The history of versions, and going back to one of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.api.observed import StageState, VersionState, VersionStatus
from finetune_operator.observe import ObservedJob
from finetune_operator.plan.draft import Draft
from finetune_operator.plan.verdict import Done, Failure, Verdict
from finetune_trainer.contract import Reason, Stage, StageResult, VersionSummary

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
