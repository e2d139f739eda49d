"""The plan while it is being made: the stages as they will stand, and what leads there."""

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
from finetune_operator.status import Note, Outlook, conditions, shorten
from finetune_trainer.contract import DatasetSummary, Notice, Resolved, Stage


@dataclass(frozen=True)
class StartStage:
    """Make this attempt's Job, with all that it needs."""

    stage: Stage
    key: str
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
    """What `kubectl describe` shows to have happened."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    scope: str = ""
    """What the words are about, where the same words may be said again of something else."""


@dataclass(frozen=True)
class Plan:
    """What to do now, what to say, and when to look again if nothing happens before."""

    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    notices: tuple[Event, ...] = ()
    """Events to post before `status`, which remembers that they were, is written."""


@dataclass(frozen=True)
class Policy:
    """For how long the decision is patient."""

    secret_grace: timedelta = timedelta(seconds=30)
    """A Secret may be created a little later than the job that names it."""

    report_grace: timedelta = timedelta(seconds=30)
    """A Job's end may be seen before its pod's: the two are watched apart."""

    pod_grace: timedelta = timedelta(seconds=30)
    """After this the user is told that a Job still has no pod."""

    retry_base: timedelta = timedelta(seconds=10)
    retry_cap: timedelta = timedelta(minutes=5)
    """Further attempts follow after retry_base, doubled each time up to retry_cap."""


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
class Found:
    """What status holds of the stages' results, as it will be."""

    artifacts: tuple[ArtifactStatus, ...]
    manifest_uri: str | None
    metrics: dict[str, float]
    dataset: DatasetSummary | None
    notices: tuple[Notice, ...]
    lineage: Lineage | None
    resolved: Resolved | None

    @classmethod
    def in_status(cls, status: FineTuneJobStatus) -> Self:
        """As it is now."""
        return cls(
            artifacts=status.artifacts,
            manifest_uri=status.manifest_uri,
            metrics=status.metrics,
            dataset=status.dataset,
            notices=status.notices,
            lineage=status.lineage,
            resolved=status.resolved,
        )


class Draft:
    """Collects a plan; `finish` freezes it. Lives within one call of `plan`."""

    def __init__(
        self,
        job: ObservedFineTuneJob,
        spec: FineTuneJobSpec,
        runs: Sequence[ObservedJob],
        *,
        pod_settings: Mapping[Stage, str],
        policy: Policy,
        now: datetime,
        occupied: frozenset[Stage],
    ) -> None:
        self.job = job
        self.spec = spec
        self.runs = runs
        self.pod_settings = pod_settings
        self.policy = policy
        self.now = now
        self.occupied = occupied
        self.stages = _stages(job)
        self.found = Found.in_status(job.status)
        self.notes: dict[Stage, Note] = {}
        self._actions: list[Action] = []
        self._events: list[Event] = []
        self._notices: list[Event] = []
        self._looks: list[float] = []

    def key(self, stage: Stage) -> str | None:
        """What tells this stage's Jobs from those of another spec."""
        if stage is Stage.PREPARE:
            return str(self.job.generation)
        return self.stages[stage].fingerprint

    def runs_of(self, stage: Stage) -> list[ObservedJob]:
        """The attempts at this stage for the spec as it is now, oldest first."""
        key = self.key(stage)
        return [run for run in self.runs if run.stage is stage and run.key == key]

    def change(self, stage: Stage, **fields: Unpack[StageFields]) -> None:
        """Change fields of a stage."""
        self.stages[stage] = StageStatus.model_validate({**dict(self.stages[stage]), **fields})

    def act(self, action: Action) -> None:
        """Do this."""
        self._actions.append(action)

    def tell(self, reason: str, message: str) -> None:
        """Record that something happened as it should."""
        self._events.append(Event("Normal", str(reason), shorten(message)))

    def warn(self, reason: str, message: str) -> None:
        """Record that something went wrong."""
        self._events.append(Event("Warning", str(reason), shorten(message)))

    def announce(self, notice: Notice, scope: str) -> None:
        """Record what the training noticed or did."""
        kind: Literal["Normal", "Warning"] = "Warning" if notice.warning else "Normal"
        self._notices.append(Event(kind, notice.code, shorten(notice.text), scope))

    def look_again(self, seconds: float | None) -> None:
        """Make another pass after this time, though nothing may have happened."""
        if seconds is not None:
            self._looks.append(seconds)

    def stop_unclaimed(self) -> None:
        """Stop each Job at work that is not its stage's current attempt.

        This one rule stops Jobs of an earlier spec, of a stage that turned out to be done, of a
        stage that failed while its pod waited, and pods that are to be made anew.
        """
        for run in self.runs:
            if run.active and not run.deleting and not self._claimed(run):
                self.act(StopJob(run.name, run.uid))
                self.tell("StageStopped", f"Stopped {run.stage} (Job {run.name}).")

    def finish(self, stage: Stage, outlook: Outlook) -> Plan:
        """The plan, with the status that it leads to."""
        previous, generation = self.job.status, self.job.generation
        status = FineTuneJobStatus(
            observed_generation=generation,
            phase=outlook.phase,
            stage=stage,
            conditions=conditions(previous.conditions, outlook, generation, self.now),
            stages=tuple(self.stages.values()),
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
            requeue_after=min(self._looks, default=None),
        )

    def _claimed(self, run: ObservedJob) -> bool:
        stage = self.stages[run.stage]
        current = run.key == self.key(run.stage) and run.attempt == stage.attempt
        return stage.state is StageState.RUNNING and current


def _stages(job: ObservedFineTuneJob) -> dict[Stage, StageStatus]:
    """The stages as status remembers them; a new generation has `prepare` look at all anew."""
    known = {stage.name: stage for stage in job.status.stages}
    stages = {name: known.get(name, StageStatus(name=name)) for name in Stage}
    if job.status.observed_generation != job.generation:
        stages[Stage.PREPARE] = StageStatus(name=Stage.PREPARE)
    return stages
