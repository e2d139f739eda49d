"""Whether there is room for what the export will write, before hours of it are written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from finetune_trainer.config import RunConfig
from finetune_trainer.memory.disk import check_disk, export_disk
from finetune_trainer.memory.shape import Shape


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
