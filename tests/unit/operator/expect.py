"""What should follow: actions, events, and the cases that compare whole Plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune_operator.api.observed import FineTuneJobStatus
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.plan import Event, Plan, Policy, StartStage, StopJob, plan
from finetune_trainer.contract import Resolved, Stage
from tests.unit.operator.build import EXPORT, NOW, PREPARE, SETTINGS, TRAIN, resolved


def normal(reason: str, message: str) -> Event:
    return Event("Normal", reason, message)


def warning(reason: str, message: str) -> Event:
    return Event("Warning", reason, message)


def start(
    stage: Stage, attempt: int = 1, found: Resolved | None = None, key: str = ""
) -> StartStage:
    default = {PREPARE: "1", TRAIN: "train-a", EXPORT: "export-a"}[stage]
    known = None if stage is PREPARE else found or resolved()
    return StartStage(stage, key or default, attempt, known)


def stop(stage: Stage, attempt: int = 1) -> StopJob:
    return StopJob(f"{stage}-{attempt}", f"uid-{stage}-{attempt}")


def started(stage: Stage, attempt: int = 1) -> Event:
    return normal("StageStarted", f"Started {stage}, attempt {attempt}.")


def stopped(stage: Stage, attempt: int = 1) -> Event:
    return normal("StageStopped", f"Stopped {stage} (Job {stage}-{attempt}).")


def finished(stage: Stage) -> Event:
    return normal("StageSucceeded", f"Finished {stage}: {stage} is done")


def was_cached(stage: Stage) -> Event:
    return normal("StageCached", f"The object store already holds the result of {stage}.")


@dataclass(frozen=True)
class Case:
    """A sentence, what is given, and the whole Plan that follows."""

    says: str
    finetunejob: ObservedFineTuneJob
    jobs: Sequence[ObservedJob]
    plan: Plan


def decide(case: Case) -> Plan:
    """The plan that is made of what is given, without its explanations."""
    return unexplained(plan(case.finetunejob, case.jobs, SETTINGS, Policy(), NOW))


def unexplained(made: Plan) -> Plan:
    """The plan without the words that say why stages run, which test_plan_why compares."""
    none = {"why": None, "stale_because": ()}
    stages = tuple(stage.model_copy(update=none) for stage in made.status.stages)
    update = {"stages": stages, "resolved_inputs": {}}
    return replace(made, status=made.status.model_copy(update=update))


def unchanged(given: FineTuneJobStatus, requeue_after: float | None = None) -> Plan:
    """The plan that does nothing."""
    return Plan(given, requeue_after=requeue_after)
