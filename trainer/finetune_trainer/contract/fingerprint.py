"""Fingerprints: SHA-256 over what can change a stage's result, and nothing else.

Each stage's fingerprint contains the one of the stage before, so a change upstream reaches
everything downstream. Images, resources, names, credentials and logging are left out: an upgrade
retrains nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune_trainer.contract.base import Stage
from finetune_trainer.contract.run import Fingerprints, RunConfig

RECIPE = {Stage.PREPARE: 1, Stage.TRAIN: 1, Stage.EXPORT: 2}
"""Versions of the stages' code. Raise one by hand when the same inputs would give another result;
everybody's next run with that stage then repeats it."""


def canonical(value: Any) -> bytes:
    """JSON in one spelling only: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


UNCHANGING = {
    "checkpoint_steps",
    "gpu_memory",
    "gradient_checkpointing",
    "logging_steps",
    "parallelism",
    "report_to",
}
"""Fields of spec.training that decide on how the work is done and not on what comes out."""


def fingerprints(
    config: RunConfig, dataset_etag: str, model_revision: str, eval_etag: str | None = None
) -> Fingerprints:
    """The fingerprints of the three stages of a run.

    Fields that have their default are left out: a release that adds a field changes no
    fingerprint, and one that changes a default raises the stage's recipe version.
    """
    prepare = digest(
        {
            "recipe": RECIPE[Stage.PREPARE],
            "dataset": config.dataset.model_dump(
                mode="json", exclude={"storage"}, exclude_defaults=True
            ),
            "datasetETag": dataset_etag,
            "evalETag": eval_etag,
            "splitSeed": config.training.seed if config.dataset.splits else None,
            # A branch name stands for nothing: the commit that it led to does.
            "model": config.model.model_dump(
                mode="json", exclude={"revision", "storage"}, exclude_defaults=True
            ),
            "modelRevision": model_revision,
            "maxSequenceLength": config.training.max_sequence_length,
        }
    )
    train = digest(
        {
            "recipe": RECIPE[Stage.TRAIN],
            "prepare": prepare,
            "training": config.training.model_dump(
                mode="json", exclude=UNCHANGING, exclude_defaults=True
            ),
        }
    )
    export = digest(
        {
            "recipe": RECIPE[Stage.EXPORT],
            "train": train,
            "merged": config.export.merged,
            "gguf": sorted(config.export.gguf),
            **config.export.model_dump(
                mode="json", exclude={"merged", "gguf"}, exclude_defaults=True
            ),
        }
    )
    return Fingerprints(prepare=prepare, train=train, export=export)
