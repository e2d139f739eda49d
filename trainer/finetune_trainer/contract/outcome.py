"""How a stage ends: the one enum of reasons, their exit codes, and the termination message.

The trainer raises `StageError` with a reason; the operator reads the exit code and the message
from the pod's status. The operator's own reasons (without an exit code) stand here too, so that
one table explains every reason that a user can meet.
"""

from __future__ import annotations

import json
from enum import IntEnum, StrEnum
from typing import Any, Self

from finetune_trainer.contract.artifacts import Artifact, ImageReference, VersionSummary
from finetune_trainer.contract.base import Base, Stage, read_readable, redact
from finetune_trainer.contract.dataset_report import DatasetSummary
from finetune_trainer.contract.progress import Notice
from finetune_trainer.contract.run import Resolved

TERMINATION_MESSAGE_LIMIT = 4096  # bytes that the kubelet keeps of a termination message
LONG, SHORT = 1000, 300  # characters of a message: may be cut early, and is cut late


class ExitCode(IntEnum):
    """Exit codes of ``finetune-trainer``; the operator decides on retries by them."""

    SUCCEEDED = 0
    OTHER = 1
    BAD_INPUT = 10
    BAD_CONFIG = 11
    OUT_OF_GPU_MEMORY = 12
    OUT_OF_DISK = 13
    STOPPED = 14
    QUALITY_GATE = 15
    OUT_OF_MEMORY = 16
    GPU_UNAVAILABLE = 17


class Reason(StrEnum):
    """Why a stage or a FineTuneJob is as it is, in CamelCase for conditions and events."""

    SUCCEEDED = "Succeeded"

    DATASET_NOT_FOUND = "DatasetNotFound"
    DATASET_EMPTY = "DatasetEmpty"
    DATASET_UNREADABLE = "DatasetUnreadable"
    COLUMN_NOT_FOUND = "ColumnNotFound"
    INVALID_ROWS = "InvalidRows"
    EXAMPLES_TOO_LONG = "ExamplesTooLong"

    INVALID_CONFIG = "InvalidConfig"
    STORAGE_ACCESS_DENIED = "StorageAccessDenied"
    BUCKET_NOT_FOUND = "BucketNotFound"
    OUTPUT_IN_USE = "OutputInUse"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_ACCESS_DENIED = "ModelAccessDenied"
    MODEL_UNSUPPORTED = "ModelUnsupported"

    GPU_UNAVAILABLE = "GpuUnavailable"
    OUT_OF_GPU_MEMORY = "OutOfGPUMemory"
    OUT_OF_MEMORY = "OutOfMemory"
    OOM_KILLED = "OOMKilled"  # by the kernel: a container, or the training's worker in it
    OUT_OF_DISK = "OutOfDisk"
    STOPPED = "Stopped"
    QUALITY_GATE_FAILED = "QualityGateFailed"
    TRAINING_DIVERGED = "TrainingDiverged"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    STORED_FILE_CHANGED = "StoredFileChanged"
    VERSION_NOT_FOUND = "VersionNotFound"
    MODEL_HUB_UNAVAILABLE = "ModelHubUnavailable"
    STALLED = "Stalled"  # seen by the trainer of its training, by the operator of the trainer
    INTERNAL_ERROR = "InternalError"

    # Seen by the operator alone.
    INVALID_SPEC = "InvalidSpec"
    REQUEST_DENIED = "RequestDenied"
    SECRET_NOT_FOUND = "SecretNotFound"  # noqa: S105 - a reason, not a secret
    IMAGE_NOT_PULLED = "ImageNotPulled"
    POD_DISRUPTED = "PodDisrupted"
    NODE_LOST = "NodeLost"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    UNSCHEDULABLE = "Unschedulable"

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of a trainer that ends for this reason."""
        return _EXIT_CODES.get(self, ExitCode.OTHER)

    @property
    def retryable(self) -> bool:
        """Whether a further attempt with the same spec can end differently."""
        return self in _RETRYABLE


_EXIT_CODES = {
    Reason.SUCCEEDED: ExitCode.SUCCEEDED,
    Reason.DATASET_NOT_FOUND: ExitCode.BAD_INPUT,
    Reason.DATASET_EMPTY: ExitCode.BAD_INPUT,
    Reason.DATASET_UNREADABLE: ExitCode.BAD_INPUT,
    Reason.COLUMN_NOT_FOUND: ExitCode.BAD_INPUT,
    Reason.INVALID_ROWS: ExitCode.BAD_INPUT,
    Reason.EXAMPLES_TOO_LONG: ExitCode.BAD_INPUT,
    Reason.INVALID_CONFIG: ExitCode.BAD_CONFIG,
    Reason.TRAINING_DIVERGED: ExitCode.BAD_CONFIG,
    Reason.STORAGE_ACCESS_DENIED: ExitCode.BAD_CONFIG,
    Reason.BUCKET_NOT_FOUND: ExitCode.BAD_CONFIG,
    Reason.OUTPUT_IN_USE: ExitCode.BAD_CONFIG,
    Reason.STORED_FILE_CHANGED: ExitCode.BAD_CONFIG,
    Reason.VERSION_NOT_FOUND: ExitCode.BAD_CONFIG,
    Reason.MODEL_NOT_FOUND: ExitCode.BAD_CONFIG,
    Reason.MODEL_ACCESS_DENIED: ExitCode.BAD_CONFIG,
    Reason.MODEL_UNSUPPORTED: ExitCode.BAD_CONFIG,
    Reason.GPU_UNAVAILABLE: ExitCode.GPU_UNAVAILABLE,
    Reason.OUT_OF_GPU_MEMORY: ExitCode.OUT_OF_GPU_MEMORY,
    Reason.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    Reason.OUT_OF_DISK: ExitCode.OUT_OF_DISK,
    Reason.STOPPED: ExitCode.STOPPED,
    Reason.QUALITY_GATE_FAILED: ExitCode.QUALITY_GATE,
}


_RETRYABLE = {
    Reason.STOPPED,
    Reason.STALLED,
    Reason.STORAGE_UNAVAILABLE,
    Reason.MODEL_HUB_UNAVAILABLE,
    Reason.INTERNAL_ERROR,
    Reason.POD_DISRUPTED,
    Reason.OOM_KILLED,
}


class StageError(Exception):
    """A stage cannot go on. The message names what, where, and what to do about it."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        dataset: DatasetSummary | None = None,
        notices: tuple[Notice, ...] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.dataset = dataset
        self.notices = notices


class StageResult(Base):
    """The termination message: what a finished stage tells the operator."""

    stage: Stage
    reason: Reason
    message: str
    resolved: Resolved | None = None
    """Set by `prepare`."""

    complete: tuple[Stage, ...] = ()
    """Set by `prepare`: stages whose result for this fingerprint the store already holds."""

    artifacts: tuple[Artifact, ...] = ()
    """Set by `export`, and by `prepare` when the store already holds the export. Files that do
    not fit into the message are listed in the manifest only."""

    version: str | None = None
    """Name of the version that the artifacts are of, i.e. of the folder below versions/ that holds
    them. None in the results of 0.1.0, and for what that left in the output folder itself."""

    manifest_uri: str | None = None
    """The version's own manifest."""

    images: tuple[ImageReference, ...] = ()
    """Set by `export`, and by `prepare` when the store already holds the export: what was pushed to
    a container registry."""

    versions: tuple[VersionSummary, ...] | None = None
    """Set by `prepare` and `export`: the newest versions that the output folder holds, the newest
    first, and the current one. None in the results of older trainers."""

    metrics: dict[str, float] = {}
    """Set by `train`, and by `prepare` when the store already holds the adapter; e.g. trainLoss,
    trainRuntimeSeconds, trainableParameters."""

    dataset: DatasetSummary | None = None
    """Set by `prepare`, also where rows of the dataset made it fail."""

    notices: tuple[Notice, ...] = ()
    """Set by `train`: what it noticed about itself, and what it did when memory ran out."""

    def to_message(self) -> bytes:
        """JSON of at most TERMINATION_MESSAGE_LIMIT bytes.

        What doesn't fit goes in this order: what is known of the versions (the oldest first), files
        other than GGUF (those of the merged model first), long text, examples of bad rows, notices,
        more text, GGUF files, those that failed the quality gate after the others, and images last.
        Credentials are blacked out.
        """
        brief = tuple(each.brief() for each in self.artifacts)
        data = self.model_copy(update={**self._redacted(), "artifacts": brief})
        while True:
            encoded = data.model_dump_json(exclude_none=True, exclude_defaults=True).encode()
            if len(encoded) <= TERMINATION_MESSAGE_LIMIT:
                return encoded
            data = data._shorter()

    def _redacted(self) -> dict[str, Any]:
        """What people wrote, or programs about them, without credentials."""
        found: dict[str, Any] = {"message": redact(self.message)}
        if self.dataset:
            rows = tuple(
                row.model_copy(update={"cause": redact(row.cause)})
                for row in self.dataset.first_invalid
            )
            found["dataset"] = self.dataset.model_copy(update={"first_invalid": rows})
        found["notices"] = tuple(each.redacted() for each in self.notices)
        return found

    def _shorter(self) -> Self:
        """The same with a little less of what can best be done without."""
        update: dict[str, Any]
        least = min((each.priority_in_message for each in self.artifacts), default=None)
        if described := [each for each in self.versions or () if each != each.name_alone]:
            update = self._without_details(described[-1])
        elif least is not None and least < 2:
            update = self._without_artifact(least)
        elif len(self.message) > LONG:
            update = self._cut_message()
        elif self.dataset and self.dataset.first_invalid:
            fewer = self.dataset.first_invalid[:-1]
            update = {"dataset": self.dataset.model_copy(update={"first_invalid": fewer})}
        elif self.notices:
            update = {"notices": self.notices[:-1]}
        elif least is not None and len(self.message) <= SHORT:
            update = self._without_artifact(least)
        elif self.images and len(self.message) <= SHORT:
            update = {"images": self.images[:-1]}
        else:
            update = self._cut_message()
        return self.model_copy(update=update)

    def _without_details(self, version: VersionSummary) -> dict[str, Any]:
        brief = {version: version.name_alone}
        return {"versions": tuple(brief.get(each, each) for each in self.versions or ())}

    def _without_artifact(self, priority: int) -> dict[str, Any]:
        """Drop the last file of that priority."""
        last = max(
            n for n, each in enumerate(self.artifacts) if each.priority_in_message == priority
        )
        return {"artifacts": (*self.artifacts[:last], *self.artifacts[last + 1 :])}

    def _cut_message(self) -> dict[str, Any]:
        return {"message": self.message[: len(self.message) * 3 // 4]}

    @classmethod
    def from_message(cls, text: str) -> Self | None:
        """Parse a termination message; None when it is not one (the container was killed).

        A newer trainer may have written it. A reason that only that one knows becomes
        INTERNAL_ERROR, with the reason's name in the message.
        """
        try:
            data = json.loads(text)
        except ValueError:
            return None
        if not isinstance(data, dict):
            return None
        reason = data.get("reason")
        if isinstance(reason, str) and reason not in set(Reason):
            message = f"{reason}: {data.get('message', '')}"
            data = {**data, "reason": Reason.INTERNAL_ERROR, "message": message}
        read = read_readable(cls, data)
        return read.value if read is not None else None
