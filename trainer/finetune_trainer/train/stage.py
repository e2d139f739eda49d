"""train: fetch examples and base model, run the recipe, leave the adapter in the store."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_trainer.base_model import source
from finetune_trainer.config import RunConfig, Stage
from finetune_trainer.marker import METRICS, save_stage, stage_folder
from finetune_trainer.outcome import Reason, StageResult
from finetune_trainer.progress import Reporter, duration
from finetune_trainer.storage import open_folder
from finetune_trainer.train import sft


def run(config: RunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Train the adapter for `config.resolved`; raises StageError."""
    reporter.begin(Stage.TRAIN, "Fetching the examples")
    prints = source.resolved_of(config).fingerprints
    output = open_folder(config.output.uri, config.storage)
    examples = workspace / "examples.jsonl"
    output.download(f"{stage_folder(Stage.PREPARE, prints.prepare)}/examples.jsonl", examples)
    model = source.fetch_resolved(config, workspace / "model", reporter)

    result = workspace / "trained"
    trained = sft.fine_tune(config, examples, model, result / "adapter", reporter)
    (result / METRICS).write_text(
        json.dumps({"metrics": trained.metrics, "hyperparameters": trained.effective}, indent=2)
    )
    reporter.message("Saving the adapter")
    save_stage(output, Stage.TRAIN, prints.train, result)
    seconds = trained.metrics["trainRuntimeSeconds"]
    return StageResult(
        stage=Stage.TRAIN,
        reason=Reason.SUCCEEDED,
        message=f"loss {trained.metrics['finalLoss']:.4f} after {duration(seconds)}",
        metrics=trained.metrics,
    )
