"""The plan for the training: what the model and the examples need, against the hardware."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from finetune_trainer.base_model.source import ModelFiles
from finetune_trainer.config import RunConfig, TrainingPlan
from finetune_trainer.memory.disk import check_disk, downloaded, training_disk
from finetune_trainer.memory.plan import Lengths, describe, plan
from finetune_trainer.memory.shape import Shape

log = logging.getLogger(__name__)


def plan_training(
    config: RunConfig, model: ModelFiles, folder: Path, longest: int
) -> TrainingPlan | None:
    """How to split a step; None where nothing is known of the hardware or of the model's widths.

    `folder` has the model's config.json; `longest` is the tokens of the longest example, as it is
    trained on. Raises StageError: OutOfGPUMemory, OutOfMemory, OutOfDisk, InvalidConfig.
    """
    if config.hardware is None:
        return None
    shape = Shape.from_config(json.loads((folder / "config.json").read_bytes()))
    if shape is None:
        log.warning(
            "The widths of %s can't be read from its config.json, so its memory is not predicted",
            config.model.source,
        )
        return None
    check_training_disk(config, model, shape)
    made = plan(config.training, shape, Lengths(longest), config.hardware)
    log.info("Plan: %s", describe(made, config.hardware))
    return made


def check_training_disk(config: RunConfig, model: ModelFiles, shape: Shape) -> None:
    """Raise StageError(OutOfDisk) when the base model alone would fill the training's disk."""
    available = config.hardware.ephemeral_storage_bytes if config.hardware else None
    if available is None:
        return
    need = training_disk(shape, config.training.lora, downloaded(config.model.source, model.sizes))
    limit = "set stages.train.resources.limits.ephemeral-storage to"
    check_disk(need, available, "The training", limit)
