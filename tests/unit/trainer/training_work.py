"""The work of a training that nobody runs."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.contract import RunConfig
from finetune_trainer.model import ModelFolder
from finetune_trainer.train.link import TrainingWork, default_plan


def work_in(folder: Path, **training: str) -> TrainingWork:
    """Of a small training, with these fields of spec.training."""
    config = RunConfig.model_validate(
        {
            "model": {"source": "org/base"},
            "dataset": {"source": "s3://data/faq.csv"},
            "output": {"uri": "s3://models/support"},
            "training": training,
        }
    )
    return TrainingWork(
        config=config,
        plan=default_plan(config),
        max_sequence_length=64,
        engine="transformers",
        examples=folder / "examples",
        held_out=None,
        model=ModelFolder(path=folder),
        workdir=folder,
    )
