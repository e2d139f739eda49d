"""What an error means: its reason, and what to do about it."""

from __future__ import annotations

import errno

from pydantic import ValidationError

from finetune_trainer.config import describe
from finetune_trainer.outcome import Reason, StageError

_DISK_FULL = ("No space left on device", "os error 28", "Disk quota exceeded")
_GPU_FULL = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def explain(error: Exception) -> StageError:
    """The reason of an error, and a message with what to do about it."""
    if isinstance(error, StageError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ValidationError):
        return StageError(Reason.INVALID_CONFIG, describe(error, prefix="spec."))
    if _is_disk_full(error):
        return StageError(
            Reason.OUT_OF_DISK,
            "The disk is full: give the stage's pod more ephemeral storage (an export needs about "
            "four times the size of the model), or write fewer artifacts.",
        )
    if any(sign in text for sign in _GPU_FULL) or type(error).__name__ == "OutOfMemoryError":
        return StageError(
            Reason.OUT_OF_GPU_MEMORY,
            "The GPU's memory is full. In this order: set training.batchSize to 1 (and raise "
            "gradientAccumulationSteps to match), lower training.maxSequenceLength, set "
            "training.method to qlora, or choose a smaller base model.",
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return StageError(
            Reason.OUT_OF_MEMORY, "The memory is full: raise the stage's memory limit."
        )
    first = text.strip().splitlines()[0]
    return StageError(Reason.INTERNAL_ERROR, f"{first:.500} (the log has the details)")


def _is_disk_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(seen) for sign in _DISK_FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
