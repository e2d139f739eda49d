"""How a stage ends before its work is done: what an error means, and what is saved on a stop."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


# --- A stop: the process has some seconds to save its work --------------------------------------

GRACE_VARIABLE = "FINETUNE_GRACE_SECONDS"
# Kubernetes' own default; the operator sets the variable to what it gives the pod.
DEFAULT_GRACE_SECONDS = 30.0
SHARE = 0.8  # of the grace period; what is left is for the last words

Save = Callable[[float], str]
"""Saves until a deadline on the monotonic clock; says what the next attempt begins with."""

log = logging.getLogger(__name__)

_save: list[Save] = []
_stopping = threading.Event()


@contextmanager
def saving(save: Save) -> Iterator[None]:
    """While the block runs, `save` is called when the process is told to stop."""
    _save.append(save)
    try:
        yield
    finally:
        wait_if_stopping()
        _save.remove(save)


def stop() -> str:
    """Let the stage save; returns what the next attempt begins with, or an empty string."""
    _stopping.set()
    deadline = time.monotonic() + save_seconds()
    for save in reversed(_save):
        try:
            return save(deadline)
        except Exception:  # the process ends in any case, and its reason is not this
            log.exception("The work could not be saved")
    return ""


def save_seconds() -> float:
    """How long saving may take after the signal."""
    try:
        return SHARE * float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS))
    except ValueError:
        return SHARE * DEFAULT_GRACE_SECONDS


def is_stopping() -> bool:
    """Whether the process has been told to stop."""
    return _stopping.is_set()


def wait_if_stopping() -> None:
    """Never return once the process is being stopped: whoever stops it also ends it.

    The main thread calls it where its work may have ended because of the stop and not by itself.
    """
    while _stopping.is_set():
        time.sleep(1)
