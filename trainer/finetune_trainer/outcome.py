"""How a stage ends: the one enum of reasons, their exit codes, and the termination message.

The trainer raises `StageError` with a reason; the operator reads the exit code and the message
from the pod's status. The operator's own reasons (without an exit code) stand here too, so that
one table explains every reason that a user can meet.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Self

from pydantic import ValidationError

from finetune_trainer.config import Base, Resolved, Stage

TERMINATION_MESSAGE_LIMIT = 4096  # bytes that the kubelet keeps of a termination message


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


class Reason(StrEnum):
    """Why a stage or a FineTuneJob is as it is, in CamelCase for conditions and events."""

    SUCCEEDED = "Succeeded"

    DATASET_NOT_FOUND = "DatasetNotFound"
    DATASET_EMPTY = "DatasetEmpty"
    DATASET_UNREADABLE = "DatasetUnreadable"
    COLUMN_NOT_FOUND = "ColumnNotFound"
    INVALID_ROWS = "InvalidRows"

    INVALID_CONFIG = "InvalidConfig"
    STORAGE_ACCESS_DENIED = "StorageAccessDenied"
    BUCKET_NOT_FOUND = "BucketNotFound"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_ACCESS_DENIED = "ModelAccessDenied"
    MODEL_UNSUPPORTED = "ModelUnsupported"

    OUT_OF_GPU_MEMORY = "OutOfGPUMemory"
    OUT_OF_DISK = "OutOfDisk"
    STOPPED = "Stopped"
    QUALITY_GATE_FAILED = "QualityGateFailed"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    MODEL_HUB_UNAVAILABLE = "ModelHubUnavailable"
    INTERNAL_ERROR = "InternalError"

    # Seen by the operator alone.
    INVALID_SPEC = "InvalidSpec"
    SECRET_NOT_FOUND = "SecretNotFound"  # noqa: S105 - a reason, not a secret
    IMAGE_NOT_PULLED = "ImageNotPulled"
    OUT_OF_MEMORY = "OutOfMemory"
    POD_DISRUPTED = "PodDisrupted"
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
    Reason.INVALID_CONFIG: ExitCode.BAD_CONFIG,
    Reason.STORAGE_ACCESS_DENIED: ExitCode.BAD_CONFIG,
    Reason.BUCKET_NOT_FOUND: ExitCode.BAD_CONFIG,
    Reason.MODEL_NOT_FOUND: ExitCode.BAD_CONFIG,
    Reason.MODEL_ACCESS_DENIED: ExitCode.BAD_CONFIG,
    Reason.MODEL_UNSUPPORTED: ExitCode.BAD_CONFIG,
    Reason.OUT_OF_GPU_MEMORY: ExitCode.OUT_OF_GPU_MEMORY,
    Reason.OUT_OF_DISK: ExitCode.OUT_OF_DISK,
    Reason.STOPPED: ExitCode.STOPPED,
    Reason.QUALITY_GATE_FAILED: ExitCode.QUALITY_GATE,
}

_RETRYABLE = {
    Reason.STOPPED,
    Reason.STORAGE_UNAVAILABLE,
    Reason.MODEL_HUB_UNAVAILABLE,
    Reason.INTERNAL_ERROR,
    Reason.POD_DISRUPTED,
    Reason.OUT_OF_MEMORY,
}


class StageError(Exception):
    """A stage cannot go on. The message names what, where, and what to do about it."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Artifact(Base):
    """One file that a job leaves in its output folder."""

    path: str
    """Path below spec.output.uri, e.g. gguf/model-Q4_K_M.gguf."""

    bytes: int
    sha256: str


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

    manifest_uri: str | None = None
    metrics: dict[str, float] = {}
    """Set by `train`, e.g. trainLoss, trainRuntimeSeconds, trainableParameters."""

    def to_message(self) -> bytes:
        """JSON of at most TERMINATION_MESSAGE_LIMIT bytes: artifacts go first, then text."""
        kept = list(self.artifacts)
        message = self.message
        while True:
            data = self.model_copy(update={"artifacts": tuple(kept), "message": message})
            encoded = data.model_dump_json(exclude_none=True, exclude_defaults=True).encode()
            if len(encoded) <= TERMINATION_MESSAGE_LIMIT:
                return encoded
            if kept:
                kept.pop()
            else:
                message = message[: len(message) * 3 // 4]

    @classmethod
    def from_message(cls, text: str) -> Self | None:
        """Parse a termination message; None when it is not one (the container was killed)."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None
