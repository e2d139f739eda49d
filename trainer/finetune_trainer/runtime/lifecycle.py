"""How a process of the trainer begins and ends.

It begins with its log and whom it trusts. The log is for people, or JSON lines. Such a line has
time (UTC), level, logger, message and stage, the figures of the line (step, loss …) if it has any,
and a traceback as `exception`. Values of credentials are blacked out. Certificate authorities of
one's own are trusted beside the public ones, for every connection.

It ends before its work is done with what an error means, and with what is saved on a stop.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pythonjsonlogger.json import JsonFormatter

from finetune_trainer.contract import Reason, StageError, describe
from finetune_trainer.contract.base import redact
from finetune_trainer.contract.output import CA_BUNDLES

FORMAT_VARIABLE = "FINETUNE_LOG_FORMAT"
STAGE_VARIABLE = "FINETUNE_STAGE"  # inherited by the processes that a stage starts

# Read by the libraries when they are loaded.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Threads that wait actively take time from those that work where CPUs are shared or limited.
    # Measured on two busy CPUs: training ran five times as fast without.
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Rows of any length come and go. Without this, the GPU's memory fragments until nothing fits.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",  # else it takes over standard output
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class LogFormat(StrEnum):
    HUMAN = "human"
    JSON = "json"


def set_up_libraries() -> None:
    """Log our own lines, and only warnings of the libraries; call it before importing them.

    FINETUNE_LOG_FORMAT chooses the format, also in the processes that this one starts.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler(sys.stdout)
    if os.environ.get(FORMAT_VARIABLE) == LogFormat.JSON:
        handler.setFormatter(JsonLine())
        logging.captureWarnings(True)
    else:
        handler.setFormatter(HumanLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("finetune_trainer").setLevel(logging.INFO)
    # On CPUs with AVX512-BF16, bitsandbytes looks for a kernel that training could not use anyway.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def begin_stage(stage: str) -> None:
    """Name the stage in each JSON line, also in processes that start from now on."""
    os.environ[STAGE_VARIABLE] = stage


class HumanLine(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class JsonLine(JsonFormatter):
    """One JSON object a line; what is passed as `extra` becomes fields of it."""

    def __init__(self) -> None:
        super().__init__(
            "{levelname}{name}{message}",
            style="{",
            timestamp="time",
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            json_ensure_ascii=False,
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        # Renaming comes before, so the names here are the final ones.
        log_data["level"] = str(log_data["level"]).lower()
        if stage := os.environ.get(STAGE_VARIABLE):
            log_data["stage"] = stage
        return log_data

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


# --- Certificate authorities -------------------------------------------------------------------

BUNDLE = "ca-bundle.pem"
# Of boto3, of httpx (the Hub's client) and OpenSSL, and of requests (experiment trackers).
VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def trust_given_authorities(workspace: Path) -> None:
    """Write one bundle of the public and the given certificates, and let all libraries read it.

    Also the libraries of processes that start later. Call it before the first connection. Raises
    StageError when a file is missing or holds no certificate.
    """
    given = os.environ.get(CA_BUNDLES)
    if not given:
        return
    import certifi  # noqa: PLC0415 - most stages do without

    named = {os.environ[name] for name in VARIABLES if os.environ.get(name)}
    parts = [Path(path).read_text() for path in sorted({certifi.where(), *named})]
    for entry in given.split(":"):
        field, _, path = entry.partition("=")
        parts.append(_certificates(field, Path(path)))
    workspace.mkdir(parents=True, exist_ok=True)
    bundle = workspace / BUNDLE
    bundle.write_text("\n".join(parts))
    for name in VARIABLES:
        os.environ[name] = str(bundle)


def _certificates(field: str, file: Path) -> str:
    try:
        text = file.read_text()
    except OSError as error:
        raise StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"The certificates of {field} are not there ({file}: {error.strerror}): check that the "
            "ConfigMap or Secret exists and has the key.",
        ) from error
    except UnicodeDecodeError as error:
        raise _no_certificate(field, "it is not text") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise _no_certificate(field, str(error)) from error
    return text


def _no_certificate(field: str, cause: str) -> StageError:
    return StageError(
        Reason.INVALID_CONFIG,
        f"The key that {field} names holds no certificates ({cause}): put PEM there, which begins "
        "with -----BEGIN CERTIFICATE-----.",
    )


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
