"""What the export starts from: the adapter, what was measured in training, and the examples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from finetune_trainer.base_model import source
from finetune_trainer.config import RunConfig, Stage
from finetune_trainer.marker import DATASET_REPORT, EXAMPLES, HELD_OUT, METRICS, stage_folder
from finetune_trainer.storage import Folder

MOST_ROWS = 5000
"""Examples in memory, more than the gate or an importance matrix measures on."""


@dataclass(frozen=True)
class Examples:
    """What `prepare` made of the dataset: files with one example as JSON a line."""

    trained: Path
    held_out: Path | None

    def measured(self) -> list[dict[str, Any]]:
        """The rows that files are measured on: the held-out ones, or else those trained on."""
        return read_lines(self.held_out or self.trained)


@dataclass(frozen=True)
class Inputs:
    """Files on disk, and what the small ones say."""

    adapter: Path
    """Folder with the adapter and its tokenizer."""

    examples: Examples

    training: dict[str, Any]
    """metrics.json: metrics, hyperparameters, notices and history of the training."""

    dataset_report: Path

    @property
    def dataset(self) -> dict[str, Any]:
        """What dataset-report.json says."""
        found: dict[str, Any] = json.loads(self.dataset_report.read_bytes())
        return found


def fetch(config: RunConfig, output: Folder, workspace: Path) -> Inputs:
    """Bring what the stages before left to the folder `workspace`."""
    prints = source.resolved_of(config).fingerprints
    trained = stage_folder(Stage.TRAIN, prints.train)
    output.download_tree(f"{trained}/adapter", workspace / "adapter")
    output.download(f"{trained}/{METRICS}", workspace / METRICS)
    report = workspace / DATASET_REPORT
    output.download(f"{stage_folder(Stage.PREPARE, prints.prepare)}/{DATASET_REPORT}", report)
    return Inputs(
        adapter=workspace / "adapter",
        examples=fetch_examples(config, output, workspace),
        training=json.loads((workspace / METRICS).read_bytes()),
        dataset_report=report,
    )


def fetch_examples(config: RunConfig, output: Folder, workspace: Path) -> Examples:
    """Bring the examples to the folder `workspace`."""
    resolved = source.resolved_of(config)
    prepared = stage_folder(Stage.PREPARE, resolved.fingerprints.prepare)
    names = (EXAMPLES, *([HELD_OUT] if resolved.eval_rows else []))
    for name in names:
        output.download(f"{prepared}/{name}", workspace / name)
    held_out = workspace / HELD_OUT if HELD_OUT in names else None
    return Examples(workspace / EXAMPLES, held_out)


def read_lines(file: Path, most: int = MOST_ROWS) -> list[dict[str, Any]]:
    """At most so many of a file's JSON values, one a line, at equal distances."""
    with file.open(encoding="utf-8") as lines:
        total = sum(1 for _ in lines)
    step = -(-total // most) or 1
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, 0, None, step)]
