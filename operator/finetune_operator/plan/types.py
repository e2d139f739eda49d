"""What a decision consists of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from finetune_operator.api.finetunejob import FineTuneJobStatus
from finetune_trainer.contract import Resolved, Stage


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
