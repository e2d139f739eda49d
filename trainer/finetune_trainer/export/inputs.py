"""What the export starts from: the adapter, what was measured in training, and the examples."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from finetune_trainer.contract import (
    DatasetReport,
    Example,
    PreparedRunConfig,
    Reason,
    RunConfig,
    Stage,
    StageError,
    TrainingRecord,
)
from finetune_trainer.memory.disk import check_disk, export_disk
from finetune_trainer.memory.machine import free_memory
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime.units import GIB, binary
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import (
    DATASET_REPORT,
    EXAMPLES,
    HELD_OUT,
    METRICS,
    StageFiles,
    open_stage,
)

MOST_ROWS = 5000
"""Examples in memory, more than the gate or an importance matrix measures on."""


@dataclass(frozen=True)
class ExampleFiles:
    """What `prepare` made of the dataset: files with one example as JSON a line."""

    trained: Path
    held_out: Path | None

    def measured(self) -> list[Example]:
        """The rows that files are measured on: the held-out ones, or else those trained on."""
        return read_examples(self.held_out or self.trained)


@dataclass(frozen=True)
class ExportInputs:
    """What the stages before left."""

    adapter: Path
    """Folder with the adapter and its tokenizer."""

    examples: ExampleFiles

    training: TrainingRecord

    dataset_report: Path

    @property
    def dataset(self) -> DatasetReport:
        return DatasetReport.model_validate_json(self.dataset_report.read_bytes())


def fetch_inputs(config: PreparedRunConfig, output: Folder, workspace: Path) -> ExportInputs:
    """Bring what the stages before left to the folder `workspace`; StageError if it changed."""
    prints = config.resolved.fingerprints
    trained = open_stage(output, Stage.TRAIN, prints.train)
    prepared = open_stage(output, Stage.PREPARE, prints.prepare)
    return ExportInputs(
        adapter=trained.fetch_folder("adapter", workspace / "adapter"),
        examples=_fetch_examples(config, prepared, workspace),
        training=TrainingRecord.model_validate_json(trained.read(METRICS)),
        dataset_report=prepared.fetch(DATASET_REPORT, workspace / DATASET_REPORT),
    )


def fetch_examples(config: PreparedRunConfig, output: Folder, workspace: Path) -> ExampleFiles:
    """Bring the examples to the folder `workspace`; StageError if they changed."""
    prepared = open_stage(output, Stage.PREPARE, config.resolved.fingerprints.prepare)
    return _fetch_examples(config, prepared, workspace)


def _fetch_examples(
    config: PreparedRunConfig, prepared: StageFiles, workspace: Path
) -> ExampleFiles:
    trained = prepared.fetch(EXAMPLES, workspace / EXAMPLES)
    held_out = None
    if config.resolved.eval_rows:
        held_out = prepared.fetch(HELD_OUT, workspace / HELD_OUT)
    return ExampleFiles(trained, held_out)


def read_examples(file: Path, most: int = MOST_ROWS) -> list[Example]:
    """At most so many of a file's examples, one a line as JSON, at equal distances."""
    with file.open(encoding="utf-8") as lines:
        total = sum(1 for _ in lines)
    step = -(-total // most) or 1
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, 0, None, step)]


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
