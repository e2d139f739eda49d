"""Phase, conditions and messages in status, and the patch that writes them. Pure.

Conditions follow the API conventions, so `kubectl wait` and GitOps tools can rely on them: reasons
are CamelCase words, and lastTransitionTime moves only when a condition's status changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from finetune_operator.api import RETRY_ANNOTATION, Condition
from finetune_operator.api.observed import (
    ArtifactStatus,
    FineTuneJobStatus,
    Phase,
    StageState,
    StageStatus,
)
from finetune_trainer.contract import Notice, Reason, Stage
from finetune_trainer.contract.verdict import quality_fault

PHASES = {
    Stage.PREPARE: Phase.PREPARING,
    Stage.TRAIN: Phase.TRAINING,
    Stage.EXPORT: Phase.EXPORTING,
}
AS_EXPECTED = "AsExpected"
ALL_WELL = "Nothing needs attention."
RETRYING = "Retrying"
VERSION_SKEW = "VersionSkew"
SUSPENDED = "Suspended"
# Flux and other tools that read conditions by kstatus go by these two.
RECONCILING, STALLED = "Reconciling", "Stalled"
SKEW_WORDS = (
    "This operator doesn't know {}, and leaves it out of account. Upgrade the operator to the "
    "version of the CustomResourceDefinition."
)
NO_MORE = "No further attempt is made until the spec changes."
UNTIL_ASKED = (
    "No further attempt is made until the spec changes, or the annotation "
    f"{RETRY_ANNOTATION} asks for one."
)
MESSAGE_LIMIT = 1024  # characters of a message in a condition, an event or a stage


@dataclass(frozen=True)
class PendingReason:
    """Why a stage has to wait, for the conditions."""

    reason: str
    message: str
    degraded: bool = False
    """Whether it needs a person's attention."""

    phase: Phase = Phase.WAITING
    """The FineTuneJob's phase meanwhile."""


@dataclass(frozen=True)
class ConditionValue:
    """Whether a condition holds, and why."""

    holds: bool
    reason: str
    message: str


@dataclass(frozen=True)
class Summary:
    """The phase and the three conditions that belong together."""

    phase: Phase
    ready: ConditionValue
    progressing: ConditionValue
    degraded: ConditionValue

    @property
    def reason(self) -> str | None:
        """What stands in the way or why it failed; None while all is well."""
        if self.phase in {Phase.QUEUED, Phase.WAITING}:
            return self.progressing.reason
        return self.degraded.reason if self.degraded.holds else None


def working_summary(
    stage: StageStatus,
    note: PendingReason | None,
    earlier_artifacts: bool,
    notices: Iterable[Notice] = (),
) -> Summary:
    """A stage runs, or waits to run; `notices` are those of the current training."""
    phase = PHASES[stage.name]
    if note is not None:
        phase = note.phase
    elif stage.name is Stage.PREPARE and stage.state is StageState.PENDING and not stage.attempt:
        phase = Phase.PENDING
    absent = "The artifacts are not there yet."
    if earlier_artifacts:
        absent = "The artifacts in status are those of an earlier spec."
    return Summary(
        phase=phase,
        ready=ConditionValue(False, phase, absent),
        progressing=_progressing(stage, phase, note, notices),
        degraded=_degraded(stage, note),
    )


def failed_summary(
    phase_stage: StageStatus,
    stays: str = "",
    after: str | None = None,
    what: str = "The new spec can't be reached",
) -> Summary:
    """A stage failed for good, and with it the FineTuneJob.

    `stays` says what it leaves alone, `after` what happens next, `what` couldn't be done.
    """
    reason = phase_stage.reason or Reason.INTERNAL_ERROR
    message = phase_stage.message or ""
    if stays:
        message = f"{what}: {message} {stays}"
    return refused_summary(reason, message, after or UNTIL_ASKED)


def look_failed_summary(prepare: StageStatus, after: str | None) -> Summary:
    """A further look at dataset and model failed. The spec is reached, and stays so."""
    reason = prepare.reason or Reason.INTERNAL_ERROR
    after = after or UNTIL_ASKED
    message = (
        f"The last look at dataset and model failed: {prepare.message} The current version stays. "
        f"{after}"
    )
    return Summary(
        phase=Phase.SUCCEEDED,
        ready=ConditionValue(False, reason, message),  # the condition stays as it was
        progressing=ConditionValue(False, reason, after),
        degraded=ConditionValue(True, reason, message),
    )


def refused_summary(reason: str, message: str, after: str = NO_MORE) -> Summary:
    """The FineTuneJob failed; `after` says what can change that."""
    return Summary(
        phase=Phase.FAILED,
        ready=ConditionValue(False, reason, message),
        progressing=ConditionValue(False, reason, after),
        degraded=ConditionValue(True, reason, message),
    )


def succeeded_summary(message: str) -> Summary:
    return Summary(
        phase=Phase.SUCCEEDED,
        ready=ConditionValue(True, Reason.SUCCEEDED, message),
        progressing=ConditionValue(False, Reason.SUCCEEDED, "There is nothing to do."),
        degraded=ConditionValue(False, AS_EXPECTED, ALL_WELL),
    )


def conditions(
    previous: Iterable[Condition],
    summary: Summary,
    generation: int,
    now: datetime,
    not_understood: Iterable[str] = (),
    *,
    former_stands: bool = True,
) -> tuple[Condition, ...]:
    """The three conditions, and those that are there only while they hold.

    One whose status is unchanged keeps its transition time. Artifacts of an earlier spec stay Ready
    while `former_stands`: Ready then goes on to say of which generation they are.
    """
    before = {condition.type: condition for condition in previous}
    claims = {
        "Ready": summary.ready,
        "Progressing": summary.progressing,
        "Degraded": summary.degraded,
    }
    if fields := ", ".join(not_understood):
        claims[VERSION_SKEW] = ConditionValue(True, "NotUnderstood", SKEW_WORDS.format(fields))
    if summary.progressing.holds:
        claims[RECONCILING] = summary.progressing
    elif summary.phase is Phase.FAILED:
        claims[STALLED] = summary.degraded
    elif summary.phase is Phase.SUSPENDED:
        claims[SUSPENDED] = ConditionValue(True, SUSPENDED, summary.progressing.message)
    made = {
        kind: _condition(kind, claim, before.get(kind), generation, now)
        for kind, claim in claims.items()
    }
    ready = before.get("Ready")
    if former_stands and ready is not None and ready.status == "True" and not summary.ready.holds:
        made["Ready"] = ready
    return tuple(made.values())


def older_phase(status: FineTuneJobStatus) -> Phase:
    """The phase in words that every definition knows: what the stage is about."""
    return PHASES[status.stage or Stage.PREPARE]


def status_patch(old: FineTuneJobStatus, new: FineTuneJobStatus) -> dict[str, Any]:
    """The merge patch from one status to the other; empty when they are the same.

    It never contains `progress`, which only the trainer writes.
    """
    return _merge_patch(_dump(old), _dump(new))


def occasion(status: FineTuneJobStatus) -> str:
    """Of which spec, attempts and pods an event is: it tells apart events with the same words."""
    return "/".join((str(status.observed_generation), *map(attempt_occasion, status.stages)))


def attempt_occasion(stage: StageStatus) -> str:
    """Of which attempt and pod of a stage an event is."""
    return f"{stage.attempt}.{stage.disruptions}@{stage.start_time or ''}"


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with whole seconds, as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def shorten(message: str) -> str:
    """Cut a message at MESSAGE_LIMIT."""
    return message if len(message) <= MESSAGE_LIMIT else message[: MESSAGE_LIMIT - 1] + "…"


def warnings_hint(notices: Iterable[Notice]) -> str:
    """A sentence to append to a message; empty if the training gave no warning.

    A warning doesn't make the FineTuneJob Degraded: the training goes on, and a person can judge
    its result.
    """
    codes = dict.fromkeys(notice.code for notice in notices if notice.warning)
    return f" The training warned of {', '.join(codes)}: see status.notices." if codes else ""


def quality_hint(artifacts: Iterable[ArtifactStatus]) -> str:
    """A sentence to append to a message; empty if every file passed the quality gate.

    Only with `verify: warn`: otherwise such a file makes the FineTuneJob fail.
    """
    failed = [each for each in artifacts if each.quality is not None and not each.quality.passed]
    words = [quality_fault(each.uri.rpartition("/")[2], each.quality) for each in failed]
    return f" Short of the quality asked for: {' '.join(words)}" if words else ""


def _progressing(
    stage: StageStatus, phase: Phase, note: PendingReason | None, notices: Iterable[Notice]
) -> ConditionValue:
    if note is not None:
        return ConditionValue(True, note.reason, note.message)
    if stage.state is StageState.RUNNING:
        hint = _lost_pods_hint(stage)
        hint += warnings_hint(notices) if stage.name is Stage.TRAIN else ""
        return ConditionValue(
            True, phase, f"{stage.name} is at work, attempt {stage.attempt}.{hint}"
        )
    if stage.reason:
        upcoming = f"Attempt {stage.attempt + 1} of {stage.name} follows."
        return ConditionValue(True, RETRYING, f"{upcoming} The last one ended: {stage.message}")
    return ConditionValue(True, phase, f"{stage.name} is about to start.")


def _lost_pods_hint(stage: StageStatus) -> str:
    if not stage.disruptions:
        return ""
    times = "once" if stage.disruptions == 1 else f"{stage.disruptions} times"
    return f" It lost its pod {times}."


def _degraded(stage: StageStatus, note: PendingReason | None) -> ConditionValue:
    if note is not None and note.degraded:
        return ConditionValue(True, note.reason, note.message)
    if stage.state is StageState.PENDING and stage.reason:
        return ConditionValue(True, stage.reason, stage.message or "")
    return ConditionValue(False, AS_EXPECTED, ALL_WELL)


def _condition(
    kind: str, claim: ConditionValue, before: Condition | None, generation: int, now: datetime
) -> Condition:
    state: Literal["True", "False"] = "True" if claim.holds else "False"
    kept = before is not None and before.status == state
    return Condition(
        type=kind,
        status=state,
        reason=str(claim.reason),
        message=shorten(claim.message),
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before and kept else timestamp(now),
    )


def _dump(status: FineTuneJobStatus) -> dict[str, Any]:
    dumped: dict[str, Any] = status.model_dump(
        mode="json", by_alias=True, exclude_none=True, exclude={"progress"}
    )
    return dumped


def _merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7386: a removed field becomes null, and objects are compared field by field."""
    patch: dict[str, Any] = dict.fromkeys(old.keys() - new.keys())
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := _merge_patch(before, value):
                patch[key] = inner
        elif key not in old or before != value:
            patch[key] = value
    return patch
