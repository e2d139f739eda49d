"""Run a stage so that, whatever happens, it ends with a reason, an exit code and one clear line."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from finetune_trainer.base_model import child
from finetune_trainer.config import RunConfig, Stage, describe
from finetune_trainer.outcome import Reason, StageError, StageResult
from finetune_trainer.progress import Reporter

log = logging.getLogger(__name__)

_DISK_FULL = ("No space left on device", "os error 28", "Disk quota exceeded")
_GPU_FULL = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

# Read by the libraries when they are loaded.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Threads that wait actively take the time of those that work, wherever the CPUs are shared or
    # limited: measured on two busy CPUs, training ran five times as fast without.
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def set_up_libraries() -> None:
    """Log our own lines and of the libraries only warnings; call it before importing them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
    )
    logging.getLogger("finetune_trainer").setLevel(logging.INFO)


def perform(stage: Stage, config: RunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Run one stage in a folder of its own below `workspace`, which is removed afterwards."""
    room = workspace / stage
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    result = _stage_function(stage)(config, room, reporter)
    reporter.done(result.message)
    shutil.rmtree(room, ignore_errors=True)
    return result


def guarded(stage: Stage, work: Callable[[], StageResult]) -> StageResult:
    """Do the work; an error becomes a result that names its reason."""
    try:
        result = work()
    except Exception as error:  # the edge: nothing may end a stage without a reason
        failure = explain(error)
        if failure.reason is Reason.INTERNAL_ERROR:
            log.exception("%s failed", stage)
        log.error("%s: %s", failure.reason, failure.message)  # noqa: TRY400 - one line, no trace
        return as_result(stage, failure)
    log.info("%s: %s", stage, result.message)
    return result


def as_result(stage: Stage, failure: StageError) -> StageResult:
    """The result of a stage that failed."""
    return StageResult(
        stage=stage,
        reason=failure.reason,
        message=failure.message,
        dataset=failure.dataset,
        notices=failure.notices,
    )


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


def write_termination_message(result: StageResult, path: Path | None) -> None:
    """Leave the result where the kubelet reads it."""
    if path is None:
        return
    try:
        path.write_bytes(result.to_message())
    except OSError as error:
        log.warning("The termination message can't be written to %s: %s", path, error)


def stop_on_signal(stage: Callable[[], Stage], path: Path | None, reporter: Reporter) -> None:
    """On SIGTERM or SIGINT, say so and end at once, even in the middle of native code.

    Python runs signal handlers between its own instructions only, and a quantization stays in
    native code for minutes. So the signal wakes a thread, through a pipe, that ends the process.
    """
    wake, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        os.read(wake, 1)
        result = StageResult(
            stage=stage(),
            reason=Reason.STOPPED,
            message="Stopped by a signal; the stage starts anew with the next attempt.",
        )
        write_termination_message(result, path)
        log.warning("%s: %s", result.reason, result.message)
        child.kill_running()
        reporter.close()
        sys.stdout.flush()
        os._exit(Reason.STOPPED.exit_code)

    threading.Thread(target=wait, name="stop", daemon=True).start()


def _stage_function(stage: Stage) -> Callable[[RunConfig, Path, Reporter], StageResult]:
    # Imported when needed: each brings seconds of libraries that the others do without.
    if stage is Stage.PREPARE:
        from finetune_trainer.prepare.stage import run  # noqa: PLC0415
    elif stage is Stage.TRAIN:
        from finetune_trainer.train.stage import run  # noqa: PLC0415
    else:
        from finetune_trainer.export.stage import run  # noqa: PLC0415
    return run


def _is_disk_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(seen) for sign in _DISK_FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
