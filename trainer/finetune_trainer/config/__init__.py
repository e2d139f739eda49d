"""What a run is told: the part of a FineTuneJob's spec that can change its result.

The operator imports these types for its API and writes them to ``run.json``; the trainer reads
that file. So a field is named, described, defaulted and bounded once. Nothing here imports torch.
"""

from __future__ import annotations

from finetune_trainer.config.base import LOCATION_RULE, Base, Location, Stage, cel, describe
from finetune_trainer.config.dataset import (
    Columns,
    CountOrShare,
    DataFormat,
    Dataset,
    Message,
    allowed,
)
from finetune_trainer.config.model import Model
from finetune_trainer.config.output import (
    UNQUANTIZED,
    Export,
    Hub,
    Output,
    QualityLimit,
    Quantization,
    Signing,
    Storage,
)
from finetune_trainer.config.run import (
    Fingerprints,
    Hardware,
    JobReference,
    Resolved,
    RunConfig,
    TrainingPlan,
    read_run_config,
)
from finetune_trainer.config.training import EarlyStopping, Lora, TargetModule, Tracker, Training

__all__ = [
    "LOCATION_RULE",
    "UNQUANTIZED",
    "Base",
    "Columns",
    "CountOrShare",
    "DataFormat",
    "Dataset",
    "EarlyStopping",
    "Export",
    "Fingerprints",
    "Hardware",
    "Hub",
    "JobReference",
    "Location",
    "Lora",
    "Message",
    "Model",
    "Output",
    "QualityLimit",
    "Quantization",
    "Resolved",
    "RunConfig",
    "Signing",
    "Stage",
    "Storage",
    "TargetModule",
    "Tracker",
    "Training",
    "TrainingPlan",
    "allowed",
    "cel",
    "describe",
    "read_run_config",
]
