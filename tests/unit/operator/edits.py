"""A second generation, in which `prepare` looks at what the edit touches."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.observed import FineTuneJobStatus, Phase
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    EXPORT,
    FINISHED,
    PREPARE,
    TRAIN,
    ended,
    failing,
    job,
    pending,
    prepared,
    resolved,
    running,
    status,
    succeeded,
)
from tests.unit.operator.expect import start

TRAINED = succeeded(TRAIN, since=-600, until=-300, fingerprint="train-a")
EXPORTED = succeeded(EXPORT, since=-300, until=-200, fingerprint="export-a")
PREPARED = succeeded(PREPARE, since=-60, fingerprint="prepare-a")
FIGURES = {"trainLoss": 0.4}


def preparing(train: Any, export: Any, **fields: Any) -> FineTuneJobStatus:
    """The second generation's `prepare` runs since a minute ago."""
    given: FineTuneJobStatus = status(
        Phase.PREPARING,
        PREPARE,
        running(PREPARE, since=-60),
        train,
        export,
        generation=2,
        **fields,
    )
    return given


def answer(*args: Any, **fields: Any) -> Any:
    """The Job of the second generation's `prepare`, with its answer."""
    return job(PREPARE, key="2", **ended(0, prepared(*args, **fields)))


def working(phase: Phase, stage: Any, *stages: Any, **fields: Any) -> FineTuneJobStatus:
    given: FineTuneJobStatus = status(phase, stage, *stages, generation=2, **fields)
    return given


FINISHED_BEFORE = preparing(TRAINED, EXPORTED, **FINISHED)
NEW_EXPORT = resolved(export="export-b")
NEW_TRAIN = resolved(train="train-b", export="export-b")
FAILED_BEFORE = failing(TRAIN, Reason.OUT_OF_GPU_MEMORY, "lower it", fingerprint="train-a")
START_NEW_TRAIN = start(TRAIN, found=NEW_TRAIN, key="train-b")


def training_anew(**fields: Any) -> FineTuneJobStatus:
    """The second generation trains with another learning rate."""
    return working(
        Phase.TRAINING,
        TRAIN,
        PREPARED,
        running(TRAIN, fingerprint="train-b"),
        pending(EXPORT, fingerprint="export-b"),
        **{"resolved": NEW_TRAIN, **fields},
    )
