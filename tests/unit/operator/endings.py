"""How the stages of these tests end."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.observed import FineTuneJobStatus, Phase, StageState
from finetune_operator.plan import Plan
from finetune_operator.pods import ObservedPod
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    EXPORT,
    PREPARE,
    TRAIN,
    dead,
    failing,
    pending,
    pod,
    resolved,
    running,
    status,
    succeeded,
    trouble,
)
from tests.unit.operator.expect import warning

NOTHING_YET = (pending(TRAIN), pending(EXPORT))
PREPARING = status(Phase.PREPARING, PREPARE, running(PREPARE, since=-60), *NOTHING_YET)
DONE = succeeded(PREPARE, fingerprint="prepare-a")
LAST = pending(EXPORT, fingerprint="export-a")


def training(**fields: Any) -> FineTuneJobStatus:
    train = running(TRAIN, **{"fingerprint": "train-a", "since": -60, **fields})
    given: FineTuneJobStatus = status(Phase.TRAINING, TRAIN, DONE, train, LAST, resolved=resolved())
    return given


def prepare_fails(reason: Reason, message: str) -> Plan:
    """`prepare` has failed for good."""
    return Plan(
        status(
            Phase.FAILED,
            PREPARE,
            failing(PREPARE, reason, message),
            *NOTHING_YET,
            conditions=dead(reason, message),
        ),
        events=(warning(reason, message),),
    )


def train_fails(reason: Reason, message: str, **fields: Any) -> Plan:
    """`train` has failed for good."""
    return Plan(
        status(
            Phase.FAILED,
            TRAIN,
            DONE,
            failing(TRAIN, reason, message, fingerprint="train-a", **fields),
            LAST,
            resolved=resolved(),
            conditions=dead(reason, message),
        ),
        events=(warning(reason, message),),
    )


def train_retries(reason: Reason, message: str, after: float = 10, **fields: Any) -> Plan:
    """`train` will be tried again."""
    attempt = fields.get("attempt", 1)
    more = f"Attempt {attempt + 1} of train follows. The last one ended: {message}"
    again = failing(
        TRAIN, reason, message, state=StageState.PENDING, fingerprint="train-a", **fields
    )
    return Plan(
        status(
            Phase.TRAINING,
            TRAIN,
            DONE,
            again,
            LAST,
            resolved=resolved(),
            conditions=trouble(Phase.TRAINING, ("Retrying", more), (reason, message)),
        ),
        events=(warning(reason, message),),
        requeue_after=after,
    )


EMPTY = "s3://data/faq.csv has no rows."
CRASH = "train ended with exit code 1: RuntimeError: no luck"
EVICTED = "Evicted: The node was low on resource: memory."
EVICTED_MESSAGE = f"The pod of train was disrupted ({EVICTED})."
OOM = (
    "train was killed because it used more memory than it may. "
    "Raise spec.stages.train.resources.limits.memory."
)
FULL = "Pod ephemeral local storage usage exceeds the total limit of containers 10Gi."
FULL_MESSAGE = (
    "train used more disk than it may (Pod ephemeral local storage usage exceeds the total limit "
    "of containers 10Gi). Raise spec.stages.train.resources.limits.ephemeral-storage, or "
    "workspace.sizeLimit where it is set."
)
RETRY = failing(
    TRAIN, Reason.INTERNAL_ERROR, CRASH, state=StageState.PENDING, fingerprint="train-a"
)
RETRYING = train_retries(Reason.INTERNAL_ERROR, CRASH).status


def evicted(**fields: Any) -> ObservedPod:
    return pod(phase="Failed", started=False, disruption=EVICTED, **fields)
