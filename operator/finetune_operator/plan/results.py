"""Record results of the stages and notices of the training in the draft."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from finetune_operator.api.observed import (
    ArtifactStatus,
    Lineage,
    LookCause,
    StageState,
    StageStatus,
)
from finetune_operator.observe import ObservedJob
from finetune_operator.plan.draft import Draft
from finetune_operator.plan.verdict import Done, Failure
from finetune_operator.plan.versions import stays_failed
from finetune_operator.plan.why import Change, Why, spec_inputs
from finetune_operator.status import quality_hint, timestamp, warnings_hint
from finetune_trainer.contract import (
    Artifact,
    Notice,
    Reason,
    Resolved,
    Stage,
    StageResult,
    version_folder,
)
from finetune_trainer.contract.verdict import quality_fault

OVER_LIMIT = "QualityLimitExceeded"  # the event about a file that `verify: warn` lets pass
NOTICES_LIMIT = 50  # notices in status; the log has the others


def record_success(draft: Draft, job: ObservedJob, done: Done) -> None:
    stage, result = job.stage, done.result
    draft.change(
        stage,
        state=StageState.SUCCEEDED,
        reason=None,
        message=result.message or None if result else None,
        completion_time=timestamp(done.at),
    )
    draft.add_event("StageSucceeded", f"Finished {stage}: {result.message if result else 'done'}")
    if result is not None and result.metrics:
        draft.found.metrics = dict(result.metrics)
    match stage:
        case Stage.PREPARE if result is not None and result.resolved is not None:
            _record_resolved(draft, job, result, result.resolved)
        case Stage.EXPORT:
            _record_artifacts(draft, result, job.image)
            warn_of_failed_files(draft, result, OVER_LIMIT)


def record_published_files(draft: Draft, job: ObservedJob, failure: Failure) -> None:
    """Show the files that an export published although it failed: those that passed the quality
    gate, and those below `rejected/`."""
    result = failure.result
    if job.stage is not Stage.EXPORT or result is None or result.manifest_uri is None:
        return
    if draft.planned.cause is LookCause.REFRESH and _other_is_current(result):
        return  # nobody has asked for another version than the one that stays
    draft.former_stands = False  # these took its place
    _record_artifacts(draft, result, job.image)


def _other_is_current(result: StageResult) -> bool:
    """Whether the store's current version is another one than that of the result."""
    return any(each.current and each.version != result.version for each in result.versions or ())


def warn_of_failed_files(draft: Draft, result: StageResult | None, reason: str) -> bool:
    """Warn of each file that failed the quality gate; return whether there are any."""
    failed = [each for each in result.artifacts if each.failed] if result is not None else []
    for each in failed:
        # Of the merged model one file has the figures, and stands for the others.
        if each.quality is not None or (each.path.endswith(".gguf") and not each.follows):
            draft.add_warning(reason, quality_fault(each.path, each.quality))
    return bool(failed)


def record_dataset(draft: Draft, job: ObservedJob) -> None:
    """Show what `prepare` found in the dataset, also if it failed because of that."""
    result = job.pod.result if job.pod is not None else None
    mine = result is not None and result.stage is Stage.PREPARE
    found = result.dataset if result is not None and mine else None
    if found is None and draft.planned.cause is not None:
        return  # a further look came to nothing, so what the last one found holds
    draft.found.dataset = found


def _record_resolved(
    draft: Draft, job: ObservedJob, result: StageResult, resolved: Resolved
) -> None:
    """Compare the fingerprints that `prepare` computed with those in status, stage by stage."""
    complete = set(result.complete)
    if Stage.EXPORT in complete:
        complete.add(Stage.TRAIN)  # only an export needs the adapter
    before, change = dict(draft.stages), _change(draft, resolved)
    draft.found.resolved, draft.found.resolved_inputs = resolved, dict(change.inputs_now)
    draft.change(Stage.PREPARE, fingerprint=resolved.fingerprints.prepare)
    kept = {
        stage: _resolve_stage(draft, stage, resolved, job, cached=stage in complete)
        for stage in (Stage.TRAIN, Stage.EXPORT)
    }
    for stage, stays in kept.items():
        if draft.spec.rollback_to is None:
            why = change.explain(before[stage], draft.stages[stage], kept=stays)
        else:
            why = Why("The version that spec.rollbackTo names has its result.")
        draft.change(stage, why=why.why, stale_because=why.stale_because)
    if not kept[Stage.TRAIN] and not result.metrics:
        draft.found.metrics = {}
    if Stage.EXPORT in complete and not kept[Stage.EXPORT]:
        _record_artifacts(draft, result, image=None)


def _change(draft: Draft, resolved: Resolved) -> Change:
    """What `prepare` resolved before, and now."""
    asked = draft.planned.inputs == draft.spec.inputs_digest  # not, if edited while suspended
    now = spec_inputs(draft.spec) if asked else {}
    return Change(draft.found.resolved, draft.found.resolved_inputs, resolved, now)


def _resolve_stage(
    draft: Draft, stage: Stage, resolved: Resolved, prepare: ObservedJob, *, cached: bool
) -> bool:
    """Update one stage; return whether its status stayed as it was."""
    before = draft.stages[stage]
    fingerprint: str = getattr(resolved.fingerprints, stage)
    same = before.fingerprint == fingerprint
    if stage is Stage.TRAIN and not same:
        draft.found.notices = ()  # they are about another training
    if same and (
        _still_holds(draft, before, cached=cached) or (not cached and stays_failed(draft, before))
    ):
        return True
    if same and stage is Stage.EXPORT and before.state is StageState.SUCCEEDED:
        draft.former_stands = False  # the store doesn't hold it any more
    if cached:
        draft.stages[stage] = StageStatus(
            name=stage,
            state=StageState.SUCCEEDED,
            fingerprint=fingerprint,
            cached=True,
            message="The object store already holds the result.",
            completion_time=timestamp(draft.now),
        )
        draft.add_event("StageCached", f"The object store already holds the result of {stage}.")
    else:
        draft.stages[stage] = StageStatus(name=stage, fingerprint=fingerprint)
        # The number of an attempt is part of its Job's name, so skip those of ended Jobs from
        # before `prepare`. Any other Job is the next attempt itself: it was started, and has maybe
        # ended, before status could be written. (The API server dates both.) One that is being
        # deleted has its name for as long; with other pod settings, that is another name.
        used = [
            job.attempt
            for job in draft.jobs_of(stage)
            if (job.deleting and job.pod_settings == draft.pod_settings[stage])
            or (job.finished and job.created < prepare.created)
        ]
        draft.change(stage, attempt=max([before.attempt if same else 0, *used]))
    return False


def _still_holds(draft: Draft, stage: StageStatus, *, cached: bool) -> bool:
    if stage.state is StageState.RUNNING:
        return True
    if stage.state is not StageState.SUCCEEDED:
        return False
    # The store decides, except about a result that was written after `prepare` looked.
    skew = draft.policy.clock_skew  # a node dates the one, the operator the other
    return cached or _is_later(stage.completion_time, draft.stages[Stage.PREPARE].start_time, skew)


def _is_later(one: str | None, other: str | None, skew: timedelta) -> bool:
    """Whether it may be later, for all that the clocks say."""
    if one is None or other is None:
        return False
    return datetime.fromisoformat(one) + skew >= datetime.fromisoformat(other)


def _record_artifacts(draft: Draft, result: StageResult | None, image: str | None) -> None:
    draft.found.version = result.version if result else None
    folder = artifacts_folder(draft)
    artifacts = result.artifacts if result else ()
    manifest = result.manifest_uri if result else None
    draft.found.artifacts = tuple(_artifact(folder, each) for each in artifacts)
    draft.found.images = result.images if result else ()
    # Where the result was lost, the output folder's own manifest names the version.
    draft.found.manifest_uri = manifest or f"{draft.spec.output.folder}/manifest.json"
    draft.found.lineage = _lineage(draft.found.resolved, image) if draft.found.resolved else None


def tell_of_success(draft: Draft) -> str:
    """Where the artifacts are, in words; an event as well, when they are new."""
    folder, manifest = artifacts_folder(draft), draft.found.manifest_uri
    message = f"The artifacts are in {folder}; {manifest} lists them."
    if draft.spec.rollback_to is not None:
        message = f"Rolled back to version {draft.spec.rollback_to} (spec.rollbackTo). {message}"
    message += warnings_hint(draft.found.notices) + quality_hint(draft.found.artifacts)
    before = draft.finetunejob.status
    changed = draft.planned != before.planned or draft.found.version != before.version
    if not draft.is_ready or changed:
        draft.add_event(Reason.SUCCEEDED, message)
    return message


def artifacts_folder(draft: Draft) -> str:
    """Where the artifacts in status are."""
    below = version_folder(draft.found.version)
    return f"{draft.spec.output.folder}/{below}" if below else draft.spec.output.folder


def _lineage(resolved: Resolved, image: str | None) -> Lineage:
    return Lineage(
        dataset_etag=resolved.dataset_etag,
        dataset_rows=resolved.dataset_rows,
        eval_rows=resolved.eval_rows,
        model_revision=resolved.model_revision,
        model_commit=resolved.model_commit,
        image=image,
    )


def _artifact(folder: str, artifact: Artifact) -> ArtifactStatus:
    return ArtifactStatus(
        uri=f"{folder}/{artifact.path}",
        bytes=artifact.bytes,
        sha256=artifact.sha256,
        quality=artifact.quality,
    )


def record_notices(draft: Draft) -> None:
    """Post each notice of the current training that is not in status yet, and add it there."""
    known = draft.found.notices
    fresh = [notice for notice in dict.fromkeys(_reported_notices(draft)) if notice not in known]
    for notice in fresh[: max(NOTICES_LIMIT - len(known), 0)]:
        draft.add_notice(notice, scope=draft.stage_key(Stage.TRAIN) or "")
        known = (*known, notice)
    if fresh:
        draft.found.notices = known


def _reported_notices(draft: Draft) -> Iterator[Notice]:
    """The notices in the live progress, and in the result of each attempt.

    The progress of an earlier training stays until the next one reports. So it counts only if a
    Job of this training wrote it, or of the export of what it left.
    """
    jobs = draft.jobs_of(Stage.TRAIN)
    names = {job.name for job in (*jobs, *draft.jobs_of(Stage.EXPORT))}
    if draft.finetunejob.reported.job in names:
        yield from draft.finetunejob.reported.notices
    for job in jobs:
        result = job.pod.result if job.pod is not None else None
        if result is not None and result.stage is Stage.TRAIN:
            yield from result.notices
