"""status of a FineTuneJob. Docstrings are what `kubectl explain` prints."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field

from finetune_operator.api import Condition
from finetune_trainer import contract
from finetune_trainer.contract import Base, DatasetSummary, Notice, Progress, Quality, Stage

NO_GENERATION = -1
"""The observedGeneration of a status that nobody has written yet: the definition's default."""


class Phase(StrEnum):
    """One word for people; machines read the conditions."""

    PENDING = "Pending"
    QUEUED = "Queued"
    WAITING = "Waiting"
    PREPARING = "Preparing"
    TRAINING = "Training"
    EXPORTING = "Exporting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class StageState(StrEnum):
    """Where a stage is."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class StageStatus(Base):
    """One stage of the run."""

    name: Stage
    """prepare, train or export."""

    state: StageState = StageState.PENDING
    """Pending, Running, Succeeded or Failed."""

    fingerprint: str | None = None
    """SHA-256 over what can change the stage's result."""

    cached: bool = False
    """True when the object store already held the result, so that no pod was started."""

    why: str | None = None
    """Why it runs or ran, or why it didn't have to."""

    stale_because: tuple[str, ...] = ()
    """What made its former result stale: fields of the spec with both values, the dataset's ETag,
    the model's revision."""

    attempt: int = 0
    """Attempts so far."""

    failures: int = 0
    """Failed attempts that count against backoffLimit."""

    disruptions: int = 0
    """Pods that it lost without its doing: evicted, preempted, deleted, or with a lost node."""

    lost_pod: str | None = None
    """The pod that it lost last."""

    reason: str | None = None
    """Why it is in this state, why the last attempt failed, or why the current one lost a pod."""

    message: str | None = None
    """The same for people."""

    start_time: str | None = None
    """When the current attempt started (RFC 3339)."""

    completion_time: str | None = None
    """When it ended (RFC 3339)."""


class ArtifactStatus(Base):
    """A file of the version."""

    uri: str
    """Where it is."""

    bytes: int
    """Its size."""

    sha256: str
    """SHA-256 of its content, in hexadecimal."""

    quality: Quality | None = None
    """What was measured on a GGUF file."""


class Lineage(Base):
    """What the artifacts were made from."""

    dataset_etag: Annotated[str | None, Field(alias="datasetETag")] = None
    """ETag of the dataset at the time."""

    dataset_rows: int | None = None
    """Examples trained on."""

    eval_rows: int | None = None
    """Examples held out."""

    model_revision: str | None = None
    """A digest over the base model's files that are used."""

    model_commit: str | None = None
    """Commit of a Hub model."""

    image: str | None = None
    """Trainer image that exported."""


class VersionState(StrEnum):
    """What has become of a version."""

    CURRENT = "Current"
    AVAILABLE = "Available"
    REJECTED = "Rejected"
    DELETED = "Deleted"


class VersionStatus(Base):
    """A version in the history."""

    version: str
    """Its name. spec.rollbackTo takes it."""

    state: VersionState
    """Current (the output folder's manifest.json names it), Available (it can be rolled back to),
    Rejected (the quality gate refused one of its files) or Deleted (the store doesn't hold it any
    more)."""

    completion_time: str | None = None
    """When it was made (RFC 3339)."""

    dataset_etag: Annotated[str | None, Field(alias="datasetETag")] = None
    """ETag of the dataset that it was made from."""

    dataset_rows: int | None = None
    """Examples that it was trained on."""

    model_revision: str | None = None
    """A digest over the files of the base model that it was made from."""

    eval_loss: float | None = None
    """Its loss on the held-out rows."""


class LookCause(StrEnum):
    """Why `prepare` looks again although the spec is as it was."""

    REFRESH = "Refresh"
    RETRY_REQUESTED = "RetryRequested"


class PlannedStatus(Base):
    """The spec that `prepare` planned the stages for."""

    generation: int
    """The metadata.generation at which `prepare` was last asked. Edits after it touched nothing
    that a stage depends on."""

    look: int = 0
    """How many times `prepare` was asked again since, with the same spec."""

    cause: LookCause | None = None
    """Why it was asked again: Refresh or RetryRequested."""

    inputs: str
    """Digest of model, dataset, training, export, output and storage."""

    hardware: str
    """Digest of the resources of the training's pod."""

    @property
    def prepare_key(self) -> str:
        """The key by which the Jobs of this look are known."""
        return f"{self.generation}.{self.look}" if self.look else str(self.generation)

    def again(self, cause: LookCause) -> Self:
        """The same, with another look."""
        return self.model_copy(update={"look": self.look + 1, "cause": cause})


class Usage(Base):
    """What was used. A pod counts when it has ended."""

    gpu_seconds: int = 0
    """Seconds that pods ran, times their GPUs (any resource named */gpu, and slices of one)."""

    cpu_seconds: int = 0
    """Seconds that pods ran, times the CPUs that they request."""

    waiting_seconds: int = 0
    """Seconds from the creation of Jobs until their pods ran, e.g. in a queue or for an image. A
    Job whose pod never ran doesn't count."""

    attempts: int = 0
    """Jobs whose pod began to run."""


class StageUsage(Usage):
    """What one stage used, in all of its attempts and for all specs so far."""

    name: Stage
    """prepare, train or export."""


class PodUsage(Base):
    """A pod that runs, or one that was counted lately."""

    name: str
    """The pod."""

    job: str
    """Its Job (batch/v1)."""

    stage: Stage
    """Its stage."""

    start_time: str
    """When its trainer began to run (RFC 3339)."""

    gpus: int = 0
    """Its GPUs."""

    cpus: float = 0
    """The CPUs that it requests."""

    counted: bool = False
    """Whether it has ended and is in the sums."""


class UsageStatus(Usage):
    """What the FineTuneJob used in all, for all specs so far."""

    stages: Annotated[
        tuple[StageUsage, ...],
        Field(
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            }
        ),
    ] = ()
    """The same for each stage that used something."""

    pods: Annotated[
        tuple[PodUsage, ...],
        Field(
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            }
        ),
    ] = ()
    """Pods that run, and those that were counted lately, so that none counts twice."""


class FineTuneJobStatus(Base):
    """The observed state. `progress` is the trainer's, everything else is the operator's."""

    observed_generation: int | None = None
    """The metadata.generation that this status is about; -1 until the operator first looks."""

    phase: Phase | None = None
    """Pending, Queued (for a node, or in a queue of Jobs), Waiting (for something that stands in
    the way, see reason), Preparing, Training, Exporting, Suspended, Succeeded or Failed."""

    reason: str | None = None
    """What stands in the way, or why it failed, in one word; absent while all is well. The
    conditions say the same in sentences."""

    stage: Stage | None = None
    """The stage that runs, or ran last."""

    conditions: Annotated[
        tuple[Condition, ...],
        Field(
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            }
        ),
    ] = ()
    """Ready (artifacts are there; observedGeneration says of which spec), Progressing (a stage is
    at work) and Degraded (it failed, or something needs attention). While they hold, Reconciling
    and Stalled say the same in the words of kstatus, Suspended that spec.suspend is true and
    nothing runs any more, and VersionSkew that the operator doesn't understand all of spec and
    status."""

    stages: Annotated[
        tuple[StageStatus, ...],
        Field(
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            }
        ),
    ] = ()
    """prepare, train and export, in this order."""

    progress: Progress | None = None
    """Live progress of the running stage."""

    version: str | None = None
    """The version that the artifacts are of: they lie in versions/<version>/ of the output folder.
    Absent for what version 0.1.0 of the trainer left in the folder itself."""

    artifacts: tuple[ArtifactStatus, ...] = ()
    """Files of the version, those that the quality gate rejected included. All GGUF files
    are here; where there are too many files in all, the others are in the manifest only."""

    images: Annotated[
        tuple[contract.ImageReference, ...],
        Field(
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            }
        ),
    ] = ()
    """What of the version was pushed to a container registry (spec.output.oci), with digests."""

    versions: Annotated[
        tuple[VersionStatus, ...],
        Field(
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["version"],
            }
        ),
    ] = ()
    """The history of versions, the newest first, and at most twenty of them beside the current one,
    as the last `prepare` or `export` found them."""

    manifest_uri: str | None = None
    """The version's manifest, which names every file with size and SHA-256."""

    metrics: dict[str, float] = {}
    """Figures of the training, e.g. baseEvalLoss and basePerplexity (the base model on the held-out
    rows), evalLoss and perplexity (the tuned one), trainLoss."""

    dataset: DatasetSummary | None = None
    """What the last `prepare` found in the dataset, also where it ended because of bad rows."""

    notices: tuple[Notice, ...] = ()
    """What the present training noticed about itself (a rising loss, overfitting) or did (a
    smaller batch when memory ran out, a resume), each of which was an Event as well. The training
    of another fingerprint begins with none."""

    lineage: Lineage | None = None
    """What the artifacts were made from."""

    resolved: contract.Resolved | None = None
    """What `prepare` found out about the present spec; the stages after it rely on it."""

    last_refresh_time: str | None = None
    """With spec.dataset.refresh: when `prepare` last began to look at dataset and model (RFC
    3339)."""

    next_refresh_time: str | None = None
    """When it looks again, or as soon after that as no stage is at work."""

    last_handled_retry_at: str | None = None
    """The last value of the annotation finetune.dev/retry-requested-at that was acted upon."""

    usage: UsageStatus | None = None
    """GPU and CPU time, time spent waiting, and attempts, since the FineTuneJob was created."""

    resolved_inputs: dict[str, str] = {}
    """The fields of the spec that `prepare` resolved, without those that have their default; long
    values are cut. What an edit changes is told by them."""

    planned: PlannedStatus | None = None
    """What the present stages were planned for. An edit that leaves it as it is reruns nothing."""
