"""Several devices: how many processes train, what each gets of a step, and how they are started.

    stage -> torchrun (train.torchrun) -> one worker for each GPU

Every process computes its share of each optimizer step, so the effective batch stays that of the
spec and the result is that of one process. `ddp` keeps the whole model in every process; `fsdp`
(PyTorch's fully_shard, "FSDP2") spreads its layers over all. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from finetune_trainer.config import Training, TrainingPlan
from finetune_trainer.memory.plan import effective_batch
from finetune_trainer.outcome import Reason, StageError

PROCESSES_VARIABLE = "FINETUNE_PROCESSES"
"""Processes on a machine without a GPU; for tests."""

# What gloo and NCCL say in the processes that are left.
_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistBackendError",
    "DistNetworkError",
)


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that reports and saves."""
    return os.environ.get("RANK", "0") == "0"


def is_echo(error: BaseException) -> bool:
    """Whether the error only says that another process of the training is gone."""
    text = f"{type(error).__name__}: {error}"
    return world_size() > 1 and any(sign in text for sign in _ECHOES)


def write_first(file: Path, text: str) -> None:
    """Write the file unless another process already did: the first to fail gives the reason."""
    own = file.with_name(f"{file.name}.{os.getpid()}")
    own.write_text(text, encoding="utf-8")
    with suppress(FileExistsError):
        os.link(own, file)
    own.unlink()


def processes_wanted(gpus: int, environment: Mapping[str, str]) -> int:
    """One process for each GPU; one on a CPU, unless the variable says otherwise."""
    if gpus:
        return gpus
    value = environment.get(PROCESSES_VARIABLE, "1")
    return max(int(value), 1) if value.isdecimal() else 1


def processes_for(training: Training, devices: int) -> int:
    """The most of so many devices that can share an optimizer step evenly."""
    batch = effective_batch(training)
    return next(n for n in range(min(devices, batch), 0, -1) if batch % n == 0)


def divide(training: Training, plan: TrainingPlan, devices: int) -> tuple[TrainingPlan, int]:
    """What each process does of a step, and how many processes there are (at most `devices`).

    Their number divides the effective batch (batchSize x gradientAccumulationSteps), and a pass
    holds at most as many rows as `plan` found to fit. Raises StageError(InvalidConfig) when fewer
    processes than devices would have to hold a model that was to be spread over all of them.
    """
    batch, processes = effective_batch(training), processes_for(training, devices)
    parallelism = plan.parallelism
    if parallelism == "none" and processes > 1:
        parallelism = "fsdp" if training.parallelism == "fsdp" else "ddp"
    if parallelism == "fsdp":
        _check_fsdp(training, batch, processes, devices)
    share = batch // processes
    rows = next(n for n in range(min(plan.batch_size, share), 0, -1) if share % n == 0)
    split = {
        "batch_size": rows,
        "gradient_accumulation_steps": share // rows,
        "parallelism": parallelism if processes > 1 else "none",
    }
    return plan.model_copy(update=split), processes


def _check_fsdp(training: Training, batch: int, processes: int, devices: int) -> None:
    if training.method == "qlora" and devices > 1:
        raise StageError(
            Reason.INVALID_CONFIG,
            "training.method qlora can't be spread over several GPUs: set training.parallelism to "
            "ddp (4-bit weights take a quarter of the memory), or training.method to lora.",
        )
    if processes < devices:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"A model spread over {devices} GPUs (training.parallelism fsdp) needs an effective "
            f"batch (batchSize x gradientAccumulationSteps, here {batch}) that {devices} divides: "
            f"set training.gradientAccumulationSteps to a multiple of {devices}.",
        )


def command(module: str, request: Path, processes: int, shutdown_seconds: float) -> list[str]:
    """Start one worker, or torchrun with one for each process.

    On a stop the workers have `shutdown_seconds` to save before torchrun kills them.
    """
    if processes == 1:
        return [sys.executable, "-m", module, str(request)]
    return [
        sys.executable,
        "-m",
        "finetune_trainer.train.torchrun",
        "--standalone",
        "--local-addr=127.0.0.1",  # a pod's own name need not resolve
        f"--nproc-per-node={processes}",
        f"--shutdown-timeout={max(int(shutdown_seconds), 1)}",
        "--module",
        module,
        str(request),
    ]
