"""Whether this pod has the memory and the disk that an export takes, before it takes them."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

from finetune_trainer.contract import Export, Quantization, Reason, RunConfig, StageError
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.memory.disk import check_disk, export_disk
from finetune_trainer.memory.machine import free_memory
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime import GIB, binary, size

log = logging.getLogger(__name__)

MEMORY_BYTES = 3 * GIB // 2
"""For all processes of an export, beside mapped files: 1.16 GB were measured with the gate, an
importance matrix and the adapter's file at 1.07 billion parameters; layers are streamed."""

CONVERTING_BYTES = 7
"""For each value of the largest tensor while the converter writes it: in float32, in 16 bits, and
in part once more."""

EXPERT = re.compile(r"\.experts\.\d+\.")
DISK_RATE = 250 * 10**6  # bytes a second, of a usual volume


def memory_need(weights: MergedWeights, export: Export) -> int:
    """Bytes for all processes of an export, beside mapped files.

    transformers stacks a model's experts as it loads them, so that they are no mapped file; and
    the converter has all of one layer's in memory.
    """
    values: Counter[str] = Counter()
    experts = 0
    for info in weights.infos.values():
        values[EXPERT.sub(".experts.", info.name)] += math.prod(info.shape)
        experts += info.nbytes if EXPERT.search(info.name) else 0
    if not export.gguf:
        return MEMORY_BYTES
    converting = CONVERTING_BYTES * max(values.values(), default=0)
    return MEMORY_BYTES + max(converting, 0 if export.verify == "off" else experts)


def check_memory(weights: MergedWeights, export: Export) -> None:
    """Raise StageError(OutOfMemory) when the pod has less than an export takes; and say so where
    it will take long, since the files don't fit into what is left."""
    free, need = free_memory(), memory_need(weights, export)
    if free < need:
        raise StageError(
            Reason.OUT_OF_MEMORY,
            f"The export needs {binary(need)} of memory, and there are {binary(free)}: set "
            f"spec.stages.export.resources.limits.memory to at least {binary(need, up=True)}.",
        )
    largest = sum(info.nbytes for info in weights.infos.values())
    if export.gguf and export.verify != "off" and free - need < largest:
        log.warning(
            "The model has %s in 16 bits. What doesn't fit into memory is read from the disk again "
            "and again, about %d minutes each time at 250 MB/s. With "
            "spec.stages.export.resources.limits.memory: %s it is read once",
            size(largest),
            max(1, round(largest / DISK_RATE / 60)),
            binary(need + largest, up=True),
        )


def check_space(config: RunConfig, base: Path, workspace: Path, own: Quantization) -> None:
    """Raise StageError(OutOfDisk) when merged model and GGUF files will not fit beside the base.

    `base` is the folder with the base model, `own` its weights' type; where its widths can't be
    read, nothing is checked.
    """
    shape = Shape.of_model(base)
    if shape is None:
        return
    need = export_disk(shape, config.training, config.export, 0, own)
    # Nothing here is downloaded any more, so that no slack is needed for it.
    need = replace(need, slack=0)
    limit = "set stages.export.resources.limits.ephemeral-storage (or the volume) to"
    check_disk(need, shutil.disk_usage(workspace).free, "The export", limit)
