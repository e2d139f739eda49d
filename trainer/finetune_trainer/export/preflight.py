"""Whether there is room for what the export will write, before hours of it are written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from finetune_trainer.config import RunConfig
from finetune_trainer.memory.disk import check_disk, export_disk
from finetune_trainer.memory.machine import free_memory
from finetune_trainer.memory.shape import Shape
from finetune_trainer.memory.units import GIB, binary
from finetune_trainer.outcome import Reason, StageError

MEMORY_BYTES = 3 * GIB // 2
"""For all processes of an export, beside mapped files: 1.16 GB were measured with the gate, an
importance matrix and the adapter's file at 1.07 billion parameters; layers are streamed."""


def check_memory() -> None:
    """Raise StageError(OutOfMemory) when the pod has less than an export takes."""
    free = free_memory()
    if free < MEMORY_BYTES:
        raise StageError(
            Reason.OUT_OF_MEMORY,
            f"The export needs {binary(MEMORY_BYTES)} of memory, and there are {binary(free)}: set "
            f"spec.stages.export.resources.limits.memory to at least "
            f"{binary(MEMORY_BYTES, up=True)}.",
        )


def check_space(config: RunConfig, base: Path, workspace: Path) -> None:
    """Raise StageError(OutOfDisk) when merged model and GGUF files will not fit beside the base.

    `base` is the folder with the base model; where its widths can't be read, nothing is checked.
    """
    shape = Shape.from_config(json.loads((base / "config.json").read_bytes()))
    if shape is None:
        return
    need = export_disk(shape, config.training.lora, config.export, 0)
    # Nothing here is downloaded any more, so that no slack is needed for it.
    need = replace(need, slack=0)
    limit = "set stages.export.resources.limits.ephemeral-storage (or the volume) to"
    check_disk(need, shutil.disk_usage(workspace).free, "The export", limit)
