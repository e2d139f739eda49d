"""The plan while it is being made, and the types that it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Self, TypedDict, Unpack

from finetune_operator.api.finetunejob import (
    ArtifactStatus,
    FineTuneJobSpec,
    FineTuneJobStatus,
    Lineage,
    StageState,
    StageStatus,
)
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.status import PendingReason, Summary, conditions, shorten
from finetune_trainer.contract import DatasetSummary, Notice, Resolved, Stage


@dataclass(frozen=True)
class StartStage:
    """Create the Job of this attempt and the objects that it needs."""

    stage: Stage
    stage_key: str
    """The stage's fingerprint; for `prepare`, the generation."""

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
    scope: str = ""
    """Tells apart events with the same words about different things."""


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

    report_grace: timedelta = timedelta(seconds=30)
    """The end of a Job may be seen before the end of its pod, since they are watched separately."""

    pod_grace: timedelta = timedelta(seconds=30)
    """A Job without a pod is reported after this time."""

    retry_base: timedelta = timedelta(seconds=10)
    retry_cap: timedelta = timedelta(minutes=5)
    """The pause before an attempt: retry_base, doubled each time up to retry_cap."""


class StageFields(TypedDict, total=False):
    """The fields of a StageStatus that a plan changes."""

    state: StageState
    fingerprint: str
    attempt: int
    failures: int
    reason: str | None
    message: str | None
    start_time: str | None
    completion_time: str | None


@dataclass
class StageResults:
    """The part of status that holds the stages' results."""

    version: str | None
    artifacts: tuple[ArtifactStatus, ...]
    manifest_uri: str | None
    metrics: dict[str, float]
    dataset: DatasetSummary | None
    notices: tuple[Notice, ...]
    lineage: Lineage | None
    resolved: Resolved | None

    @classmethod
    def in_status(cls, status: FineTuneJobStatus) -> Self:
        return cls(
            version=status.version,
            artifacts=status.artifacts,
            manifest_uri=status.manifest_uri,
            metrics=status.metrics,
            dataset=status.dataset,
            notices=status.notices,
            lineage=status.lineage,
            resolved=status.resolved,
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
        stages_with_old_pods: frozenset[Stage],
        denial: str | None,
    ) -> None:
        self.finetunejob = finetunejob
        self.spec = spec
        self.jobs = jobs
        self.pod_settings = pod_settings
        self.policy = policy
        self.now = now
        self.stages_with_old_pods = stages_with_old_pods
        self.denial = denial
        self.stages = _stages(finetunejob)
        self.found = StageResults.in_status(finetunejob.status)
        self.pending_reasons: dict[Stage, PendingReason] = {}
        self._actions: list[Action] = []
        self._events: list[Event] = []
        self._notices: list[Event] = []
        self._delays: list[float] = []

    def stage_key(self, stage: Stage) -> str | None:
        """The key by which the Jobs of this spec are known: fingerprint, or generation."""
        if stage is Stage.PREPARE:
            return str(self.finetunejob.generation)
        return self.stages[stage].fingerprint

    def jobs_of(self, stage: Stage) -> list[ObservedJob]:
        """The attempts at this stage for the current spec, oldest first."""
        key = self.stage_key(stage)
        return [job for job in self.jobs if job.stage is stage and job.stage_key == key]

    def change(self, stage: Stage, **fields: Unpack[StageFields]) -> None:
        self.stages[stage] = StageStatus.model_validate({**dict(self.stages[stage]), **fields})

    def add_action(self, action: Action) -> None:
        self._actions.append(action)

    def add_event(self, reason: str, message: str) -> None:
        self._events.append(Event("Normal", str(reason), shorten(message)))

    def add_warning(self, reason: str, message: str) -> None:
        self._events.append(Event("Warning", str(reason), shorten(message)))

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

    def finish(self, stage: Stage, summary: Summary) -> Plan:
        previous, generation = self.finetunejob.status, self.finetunejob.generation
        status = FineTuneJobStatus(
            observed_generation=generation,
            phase=summary.phase,
            stage=stage,
            conditions=conditions(
                previous.conditions,
                summary,
                generation,
                self.now,
                self.finetunejob.not_understood,
            ),
            stages=tuple(self.stages.values()),
            version=self.found.version,
            artifacts=self.found.artifacts,
            manifest_uri=self.found.manifest_uri,
            metrics=self.found.metrics,
            dataset=self.found.dataset,
            notices=self.found.notices,
            lineage=self.found.lineage,
            resolved=self.found.resolved,
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
        stage = self.stages[job.stage]
        current = job.stage_key == self.stage_key(job.stage) and job.attempt >= stage.attempt
        return stage.state is StageState.RUNNING and current


def _stages(finetunejob: ObservedFineTuneJob) -> dict[Stage, StageStatus]:
    """The stages as status remembers them; a new generation starts again with `prepare`."""
    known = {stage.name: stage for stage in finetunejob.status.stages}
    stages = {name: known.get(name, StageStatus(name=name)) for name in Stage}
    if finetunejob.status.observed_generation != finetunejob.generation:
        stages[Stage.PREPARE] = StageStatus(name=Stage.PREPARE)
    return stages
