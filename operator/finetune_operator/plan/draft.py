"""The plan while it is being made, and the types that it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, Self, TypedDict, Unpack

from finetune_operator.api import Condition
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import (
    ArtifactStatus,
    FineTuneJobStatus,
    Lineage,
    LookCause,
    PlannedStatus,
    StageState,
    StageStatus,
    VersionStatus,
)
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.plan.why import why_prepare
from finetune_operator.pods import ObservedPod
from finetune_operator.status import (
    PendingReason,
    Summary,
    attempt_occasion,
    conditions,
    shorten,
)
from finetune_trainer.contract import (
    DatasetSummary,
    ImageReference,
    Notice,
    Reason,
    Resolved,
    Stage,
)


@dataclass(frozen=True)
class StartStage:
    """Create the Job of this attempt and the objects that it needs."""

    stage: Stage
    stage_key: str
    """The stage's fingerprint; for `prepare`, the generation and which look it is."""

    attempt: int
    resolved: Resolved | None
    """What `prepare` found out, for the stages after it."""


@dataclass(frozen=True)
class StopJob:
    """Delete a Job and its pods."""

    name: str
    uid: str


Action = StartStage | StopJob


@dataclass(frozen=True)
class Event:
    """An Event about the FineTuneJob, as `kubectl describe` shows it."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    scope: str = field(default="", compare=False)
    """Tells apart events with the same words; left empty, the spec and the attempts do."""


@dataclass(frozen=True)
class Plan:
    """The actions, status and events that follow from one pass."""

    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    """Seconds until the next pass, if nothing happens before."""

    notices: tuple[Event, ...] = ()
    """Events to post before `status` is written, since status remembers that they were posted."""


@dataclass(frozen=True)
class Policy:
    """How long to wait before something is said to be wrong, and between attempts."""

    secret_grace: timedelta = timedelta(seconds=30)
    """A Secret may be created a little later than the FineTuneJob that names it."""

    report_grace: timedelta = timedelta(seconds=90)
    """The end of a Job may be seen before the end of its pod, since they are watched separately.
    `clock_skew` is in it."""

    pod_grace: timedelta = timedelta(seconds=30)
    """A Job without a pod is reported this long after its controller has taken it up."""

    queue_grace: timedelta = timedelta(minutes=15)
    """The Job controller may take this long to take a Job up. It makes 20 requests a second by
    default, and so needs minutes for a burst of Jobs."""

    queue_first_look: timedelta = timedelta(seconds=3)
    queue_look: timedelta = timedelta(seconds=30)
    """Between two looks at what Kueue says of a Job that waits in its queue. As long as it says
    nothing, or the operator may not ask it, the looks become rarer from one to the other."""

    wake_interval: timedelta = timedelta(seconds=60)
    """Between two touches of a Job without a pod. Its controller may have lost what it had to do in
    an outage of the API server, and pauses for minutes after a pod that was refused."""

    clock_skew: timedelta = timedelta(seconds=60)
    """By how much the clocks of nodes, control plane and operator may differ."""

    disruption_limit: int = 50
    """Pods that a stage may lose before it fails."""

    sidecar_grace: timedelta = timedelta(seconds=60)
    """A pod whose trainer has ended may go on for this time, e.g. to send its last logs."""

    retry_base: timedelta = timedelta(seconds=10)
    retry_cap: timedelta = timedelta(minutes=5)
    """The pause before an attempt: retry_base, doubled each time up to retry_cap."""


class StageFields(TypedDict, total=False):
    """The fields of a StageStatus that a plan changes."""

    state: StageState
    fingerprint: str
    attempt: int
    failures: int
    disruptions: int
    lost_pod: str | None
    reason: str | None
    message: str | None
    start_time: str | None
    completion_time: str | None
    why: str | None
    stale_because: tuple[str, ...]


@dataclass
class StageResults:
    """The part of status that holds the stages' results."""

    version: str | None
    artifacts: tuple[ArtifactStatus, ...]
    images: tuple[ImageReference, ...]
    manifest_uri: str | None
    metrics: dict[str, float]
    dataset: DatasetSummary | None
    notices: tuple[Notice, ...]
    lineage: Lineage | None
    resolved: Resolved | None
    resolved_inputs: dict[str, str]
    versions: tuple[VersionStatus, ...]

    @classmethod
    def in_status(cls, status: FineTuneJobStatus) -> Self:
        return cls(
            version=status.version,
            artifacts=status.artifacts,
            images=status.images,
            manifest_uri=status.manifest_uri,
            metrics=status.metrics,
            dataset=status.dataset,
            notices=status.notices,
            lineage=status.lineage,
            resolved=status.resolved,
            resolved_inputs=status.resolved_inputs,
            versions=status.versions,
        )


class Draft:
    """Collects a plan within one call of `plan`; `finish` freezes it."""

    def __init__(
        self,
        finetunejob: ObservedFineTuneJob,
        spec: FineTuneJobSpec,
        jobs: Sequence[ObservedJob],
        *,
        pod_settings: Mapping[Stage, str],
        policy: Policy,
        now: datetime,
        old_pods: Mapping[Stage, ObservedPod],
        denial: str | None,
        look: LookCause | None = None,
    ) -> None:
        self.finetunejob = finetunejob
        self.spec = spec
        self.jobs = jobs
        self.pod_settings = pod_settings
        self.policy = policy
        self.now = now
        self.old_pods = old_pods
        self.denial = denial
        self.planned = _planned(finetunejob, spec)
        edited = self.planned != finetunejob.status.planned and not _is_seen(finetunejob)
        if look is not None and not edited:  # an edit makes `prepare` look anyway
            self.planned = self.planned.again(look)
        self.stages = _stages(finetunejob)
        if edited or look is not None:
            why = why_prepare(finetunejob.status, self.planned, spec)
            self.stages[Stage.PREPARE] = StageStatus(name=Stage.PREPARE, **vars(why))
        self.found = StageResults.in_status(finetunejob.status)
        self.former_stands = True
        """Whether artifacts that were there before this pass still are."""

        self.pending_reasons: dict[Stage, PendingReason] = {}
        self.unstarted: dict[Stage, StageStatus] = {}
        """Attempts that status names and that have no Job, as status has them."""

        self._actions: list[Action] = []
        self._events: list[Event] = []
        self._notices: list[Event] = []
        self._delays: list[float] = []

    def stage_key(self, stage: Stage) -> str | None:
        """The key by which the Jobs of this spec are known: fingerprint, or look."""
        if stage is Stage.PREPARE:
            return self.planned.prepare_key
        return self.stages[stage].fingerprint

    def jobs_of(self, stage: Stage) -> list[ObservedJob]:
        """The attempts at this stage for the current spec, oldest first."""
        key = self.stage_key(stage)
        return [job for job in self.jobs if job.stage is stage and job.stage_key == key]

    def change(self, stage: Stage, **fields: Unpack[StageFields]) -> None:
        self.stages[stage] = StageStatus.model_validate({**dict(self.stages[stage]), **fields})

    @property
    def is_ready(self) -> bool:
        """Whether artifacts were there before this pass, of this spec or an earlier one."""
        return self.ready is not None and self.ready.status == "True"

    @property
    def ready(self) -> Condition | None:
        """The condition, as it was before this pass."""
        return self.condition("Ready")

    def condition(self, kind: str) -> Condition | None:
        """Any condition, as it was before this pass."""
        found = self.finetunejob.status.conditions
        return next((each for each in found if each.type == kind), None)

    def add_action(self, action: Action) -> None:
        self._actions.append(action)

    def add_event(self, reason: str, message: str, scope: str = "") -> None:
        self._events.append(Event("Normal", str(reason), shorten(message), scope))

    def add_warning(self, reason: str, message: str, scope: str = "") -> None:
        event = Event("Warning", str(reason), shorten(message), scope)
        if event not in self._events:
            self._events.append(event)

    def warn_of_attempt(self, stage: Stage, reason: str, message: str) -> None:
        """Post a warning about the attempt that the stage is at.

        The pass that first sees the end of an attempt and the one that starts the next may say the
        same: it stays one Event.
        """
        self.add_warning(reason, message, f"{stage}/{attempt_occasion(self.stages[stage])}")

    def warn_once(self, reason: str, message: str) -> None:
        """Post a warning, unless a condition already says the same."""
        if shorten(message) not in {each.message for each in self.finetunejob.status.conditions}:
            self.add_warning(reason, message)

    def add_notice(self, notice: Notice, scope: str) -> None:
        kind: Literal["Normal", "Warning"] = "Warning" if notice.warning else "Normal"
        self._notices.append(Event(kind, notice.code, shorten(notice.text), scope))

    def requeue_after(self, seconds: float | None) -> None:
        """Make another pass after this time, even if nothing happens; None: no need to."""
        if seconds is not None:
            self._delays.append(seconds)

    def stop_obsolete_jobs(self) -> None:
        """Stop each active Job that is not the current attempt of its stage.

        This one rule covers Jobs of an earlier spec, Jobs of a stage that the store already holds,
        Jobs of a stage that failed while its pod waited, and pods with outdated settings.
        """
        for job in self.jobs:
            if job.active and not job.deleting and not self._is_current(job):
                self.add_action(StopJob(job.name, job.uid))
                self.add_event("StageStopped", f"Stopped {job.stage} (Job {job.name}).")
        told = [job for job in self.jobs if not self._is_current(job)]
        self.add(stop_what_outlives_trainers(told, self.policy, self.now))

    def add(self, other: Plan) -> None:
        """Take over what another plan does."""
        self._actions += other.actions
        self._events += other.events
        self.requeue_after(other.requeue_after)

    def finish(self, stage: Stage, summary: Summary) -> Plan:
        previous, generation = self.finetunejob.status, self.finetunejob.generation
        status = previous.model_copy(
            update={
                "observed_generation": generation,
                "phase": summary.phase,
                "reason": summary.reason,
                "stage": stage,
                "conditions": conditions(
                    previous.conditions,
                    summary,
                    generation,
                    self.now,
                    self.finetunejob.not_understood,
                    former_stands=self.former_stands,
                ),
                "stages": tuple(self.stages.values()),
                "planned": self.planned,
                **vars(self.found),
            }
        )
        return Plan(
            status=status,
            actions=tuple(self._actions),
            notices=tuple(self._notices),
            events=tuple(self._events),
            requeue_after=min(self._delays, default=None),
        )

    def _is_current(self, job: ObservedJob) -> bool:
        """Whether it is the attempt at work, or one after it, which takes its place in time."""
        if self.spec.suspend:
            return False
        stage = self.stages[job.stage]
        current = job.stage_key == self.stage_key(job.stage) and job.attempt >= stage.attempt
        return stage.state is StageState.RUNNING and current


def stop_what_outlives_trainers(jobs: Sequence[ObservedJob], policy: Policy, now: datetime) -> Plan:
    """Stop the Jobs, of stages that are over, whose pods go on beside an ended trainer.

    The plan has the present status, which knows their results.
    """
    actions: list[Action] = []
    events: list[Event] = []
    delays: list[float] = []
    for job in jobs:
        if not job.outlives_trainer or job.pod is None:
            continue
        # The end is dated by the node's clock, which may be fast.
        left = policy.sidecar_grace - (now - (job.pod.finished_at or now))
        if left > timedelta():
            delays.append(min(left, policy.sidecar_grace).total_seconds())
            continue
        actions.append(StopJob(job.name, job.uid))
        words = f"Stopped what went on beside {job.stage} after its end (pod {job.pod.name})."
        events.append(Event("Normal", "SidecarStopped", words))
    return Plan(FineTuneJobStatus(), tuple(actions), tuple(events), min(delays, default=None))


def was_refused(status: FineTuneJobStatus) -> bool:
    """Whether nothing could be made of the spec. Another version of the operator may be able to."""
    return any(
        each.type == "Degraded" and each.reason == Reason.INVALID_SPEC for each in status.conditions
    )


def _is_seen(finetunejob: ObservedFineTuneJob) -> bool:
    """Whether the status is about the present spec, and something could be made of that."""
    status = finetunejob.status
    return status.observed_generation == finetunejob.generation and not was_refused(status)


def _planned(finetunejob: ObservedFineTuneJob, spec: FineTuneJobSpec) -> PlannedStatus:
    """What the stages are planned for: as before, unless an edit touches what they depend on."""
    status, generation = finetunejob.status, finetunejob.generation
    before = status.planned
    looked = before.look if before is not None and before.generation == generation else 0
    now = PlannedStatus(
        generation=generation,
        look=looked,  # no key twice
        inputs=spec.inputs_digest,
        hardware=spec.hardware_digest,
    )
    if spec.suspend or _is_seen(finetunejob):
        return before or now  # while it is suspended, nobody looks at what an edit touches
    states = {stage.name: stage.state for stage in status.stages}
    if before is None or before.inputs != now.inputs or StageState.FAILED in states.values():
        return now
    # How a training is split that has ended doesn't matter any more.
    trained = states.get(Stage.TRAIN) is StageState.SUCCEEDED
    return before if trained or before.hardware == now.hardware else now


def _stages(finetunejob: ObservedFineTuneJob) -> dict[Stage, StageStatus]:
    """The stages as status remembers them."""
    known = {stage.name: stage for stage in finetunejob.status.stages}
    return {name: known.get(name, StageStatus(name=name)) for name in Stage}
