"""run.json as a whole, and what `prepare` adds to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from finetune_trainer.contract.base import Base, Tolerated, read_known
from finetune_trainer.contract.dataset import Dataset
from finetune_trainer.contract.output import Export, Output, Storage, VersionName
from finetune_trainer.contract.training import Model, Training


class Fingerprints(Base):
    """SHA-256 over what can change each stage's result (finetune_trainer.contract.fingerprint)."""

    prepare: str
    """Of the examples."""

    train: str
    """Of the adapter."""

    export: str
    """Of the artifacts."""


class TrainingPlan(Base):
    """How `prepare` fits the training into the memory that is there. It never changes the effective
    batch, so it is no part of a fingerprint."""

    batch_size: int
    """Examples of any length that one forward pass on one device may hold."""

    gradient_accumulation_steps: int
    """Forward passes per optimizer step on each device; fewer where `passTokens` allows."""

    pass_tokens: int | None = None
    """Tokens that one forward pass may hold in more examples than `batchSize`; absent where one
    pass makes a step, and in plans of earlier versions."""

    gradient_checkpointing: bool
    """Whether activations are computed again in the backward pass."""

    recompute_every: int = 1
    """With gradient checkpointing: one of so many layers is computed again, and the others keep
    their activations. 1 computes all of them again."""

    parallelism: Literal["none", "ddp", "fsdp"] = "none"
    """How several devices share the work."""

    device_bytes: int | None = None
    """Predicted peak of a GPU's memory, or of the process on a CPU."""

    memory_bytes: int | None = None
    """Memory that a device was known to have; absent where the split is just that of the spec."""


class Hardware(Base):
    """What the training's pod will have, as far as the operator knows; `prepare` plans with it."""

    gpus: int = 0
    """GPUs of the pod."""

    gpu_memory_bytes: int | None = None
    """Memory of one GPU."""

    memory_bytes: int | None = None
    """Memory limit of the pod."""

    ephemeral_storage_bytes: int | None = None
    """Limit of the pod's ephemeral storage."""

    export_storage_bytes: int | None = None
    """Limit of the ephemeral storage of the export's pod."""


class Needs(Base):
    """Bytes that the pods of the later stages should take at their peak; absent where nobody can
    tell. They are no part of a fingerprint."""

    train_memory_bytes: int | None = None
    """Memory of the training's pod, that of GPUs apart."""

    train_storage_bytes: int | None = None
    """Disk of the training's pod."""

    export_memory_bytes: int | None = None
    """Memory of the export's pod, mapped files apart."""

    export_storage_bytes: int | None = None
    """Disk of the export's pod."""


class Resolved(Base):
    """What `prepare` found out and the later stages rely on."""

    fingerprints: Fingerprints
    dataset_etag: Annotated[str, Field(alias="datasetETag")]
    """ETag of the dataset's object, or sha256:… of a local file."""

    dataset_rows: int
    """Examples that will be trained on."""

    eval_rows: int = 0
    """Examples that are held out."""

    plan: TrainingPlan | None = None
    """How the training is split into passes; None when nothing is known of the hardware."""

    needs: Needs | None = None
    """What the pods of the later stages should take, which they request where nobody says more."""

    model_revision: str
    """A digest over the base model's files that are used. (0.1.0 wrote a Hub model's commit.)"""

    model_commit: str | None = None
    """Commit of a Hub model, which `train` and `export` download."""

    init_revision: str | None = None
    """A digest over the adapter that the training goes on from (training.initFrom)."""

    examples: str | None = None
    """A digest over the examples and the held-out rows, to tell whether they are others."""


class JobReference(Base):
    """The FineTuneJob whose status.progress the trainer reports to."""

    name: str
    namespace: str


class RunConfig(Base):
    """The whole of ``run.json``."""

    job: JobReference | None = None
    """Absent on one machine without Kubernetes."""

    model: Model
    dataset: Dataset
    training: Training = Training()
    export: Export = Export()
    output: Output
    storage: Storage = Storage()
    rollback_to: VersionName | None = None
    """Let this version be the current one: its name, as status.versions has it. As long as it is
    set, nothing is trained or exported, and neither dataset nor model is looked at. Without it the
    version of this spec is current again, and is not made anew where it is still there."""

    hardware: Hardware | None = None
    """Absent on one machine without Kubernetes, where the machine itself tells."""

    resolved: Resolved | None = None
    """Absent for `prepare`, which finds it out; `train` and `export` need it."""

    @property
    def dataset_storage(self) -> Storage:
        """How to reach dataset.source and dataset.evalSource."""
        return self.dataset.storage or self.storage

    @property
    def model_storage(self) -> Storage:
        """How to reach model.source."""
        return self.model.storage or self.storage


class PreparedRunConfig(RunConfig):
    """What `train` and `export` get: run.json with what `prepare` found out."""

    resolved: Resolved


def read_run_config(path: Path) -> Tolerated[RunConfig]:
    """Read ``run.json``, which a newer operator may have written.

    Raises OSError and pydantic's ValidationError.
    """
    text = path.read_bytes()
    try:
        data = json.loads(text)
    except ValueError:
        return Tolerated(RunConfig.model_validate_json(text))  # raises, and says where
    return read_known(RunConfig, data)
