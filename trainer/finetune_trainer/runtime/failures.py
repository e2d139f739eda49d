"""What an error means: its reason, and a message for the user."""

from __future__ import annotations

import errno
import re

from pydantic import ValidationError

from finetune_trainer.contract import Reason, StageError, describe

_DISK_FULL = ("No space left on device", "os error 28", "Disk quota exceeded")

# torch.OutOfMemoryError (torch.cuda.OutOfMemoryError is the same class), and what the driver,
# cuBLAS, cuDNN, NCCL and bitsandbytes say when it is they who ask for memory.
_GPU_FULL = (
    "CUDA out of memory",
    "HIP out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA driver error: out of memory",
    "Failed to CUDA calloc",
    "Error out of memory at line",
)
_NCCL_FULL = re.compile(r"Cuda failure (\d+ )?'out of memory'")  # newer ones give the number
_MEMORY_FULL = ("can't allocate memory", "Cannot allocate memory")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")
_CAPACITY = re.compile(r"total capacity of ([\d.]+ \w+)")
_FREE = re.compile(r"of which ([\d.]+ \w+) is free")


class MemoryFullError(StageError):
    """Memory ran out. The message says what is full, and memory.remedies what to do about it."""


def explain(error: Exception) -> StageError:
    """The reason of an error, and a message with what to do about it.

    A MemoryFullError comes without a remedy: see memory.remedies.
    """
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
    if _is_gpu_full(error, text):
        return MemoryFullError(
            Reason.OUT_OF_GPU_MEMORY, f"The GPU's memory is full{_allocation(text)}."
        )
    if isinstance(error, MemoryError) or any(sign in text for sign in _MEMORY_FULL):
        return MemoryFullError(Reason.OUT_OF_MEMORY, "The memory is full.")
    first = text.strip().splitlines()[0]
    return StageError(Reason.INTERNAL_ERROR, f"{first:.500} (the log has the details)")


def _is_gpu_full(error: Exception, text: str) -> bool:
    known = any(sign in text for sign in _GPU_FULL) or _NCCL_FULL.search(text) is not None
    return known or type(error).__name__ == "OutOfMemoryError"


def _allocation(text: str) -> str:
    """What torch's allocator says, in short: what it wanted, and how much there is."""
    asked, capacity, free = (found.search(text) for found in (_ASKED, _CAPACITY, _FREE))
    if not asked:
        return ""
    there = f" where {free[1]} of {capacity[1]} are free" if capacity and free else ""
    return f" (tried to allocate {asked[1]}{there})"


def _is_disk_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(seen) for sign in _DISK_FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
