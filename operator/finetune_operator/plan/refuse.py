"""The plan for a FineTuneJob that can't be carried out as it is written."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune_operator import status as say
from finetune_operator.api.finetunejob import StageState, StageStatus
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob
from finetune_operator.plan.types import Event, Plan, StopJob
from finetune_operator.status import shorten
from finetune_trainer.contract import Reason, Stage


def refuse(
    job: ObservedFineTuneJob,
    runs: Sequence[ObservedJob],
    reason: Reason,
    message: str,
    now: datetime,
) -> Plan:
    """Fail for good, and stop what an earlier spec has started."""
    message = shorten(message)
    known = {stage.name: stage for stage in job.status.stages}
    outlook = say.refused(reason, message)
    status = job.status.model_copy(
        update={
            "observed_generation": job.generation,
            "phase": outlook.phase,
            "stages": tuple(_halted(known.get(name, StageStatus(name=name))) for name in Stage),
            "conditions": say.conditions(job.status.conditions, outlook, job.generation, now),
        }
    )
    stops = tuple(StopJob(run.name, run.uid) for run in runs if run.active and not run.deleting)
    return Plan(status, actions=stops, events=(Event("Warning", reason, message),))


def _halted(stage: StageStatus) -> StageStatus:
    if stage.state is not StageState.RUNNING:
        return stage
    return stage.model_copy(update={"state": StageState.PENDING, "start_time": None})
