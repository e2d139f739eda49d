"""A plan for the GPUs that the pod turned out to have, where nobody could tell `prepare`.

That is so without training.gpuMemory and without the nodes' label (a cluster without GPU feature
discovery, an operator that may not read nodes). Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.config import Hardware, RunConfig, TrainingPlan
from finetune_trainer.memory.plan import Lengths, describe, plan
from finetune_trainer.memory.shape import Shape
from finetune_trainer.train.devices import Gpu
from finetune_trainer.train.distributed import processes_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needs:
    """What decides on the memory that a training takes."""

    shape: Shape | None
    """None where the widths of the model are not known."""

    longest: int
    """Tokens of the longest example, as it is trained on."""


def read_needs(model: Path, summary: bytes) -> Needs:
    """From the folder of the base model, and what `prepare` left as summary.json."""
    shape = Shape.from_config(json.loads((model / "config.json").read_bytes()))
    return Needs(shape, int(json.loads(summary)["tokens"]["max"]))


def plan_for(
    config: RunConfig, prepared: TrainingPlan, needs: Needs, gpus: Sequence[Gpu]
) -> TrainingPlan:
    """The plan of `prepare` where it knew what a GPU holds, else one for the GPUs that are here.

    The effective batch stays. Raises StageError(OutOfGPUMemory) when not even one example fits a
    pass, with the changes that would fit.
    """
    told = config.hardware
    if not gpus or (told is not None and told.gpus and prepared.memory_bytes is not None):
        return prepared
    if needs.shape is None:
        return prepared
    hardware = Hardware(
        gpus=processes_for(config.training, len(gpus)),
        gpu_memory_bytes=min(gpu.memory_bytes for gpu in gpus),
        memory_bytes=told.memory_bytes if told else None,
    )
    made = plan(config.training, needs.shape, Lengths(needs.longest), hardware)
    log.info("Plan for this pod's %s: %s", gpus[0].name, describe(made, hardware))
    return made
