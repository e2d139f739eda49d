"""Whatever goes wrong becomes a reason, a message with a remedy, and an exit code."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys

import pytest
import torch

from finetune_trainer.contract import Reason, Stage, StageError, StageResult
from finetune_trainer.memory.remedies import with_remedy
from finetune_trainer.runtime import duration, size
from finetune_trainer.runtime.lifecycle import explain
from finetune_trainer.stage_runner import guarded


def caused_by(cause: Exception) -> RuntimeError:
    error = RuntimeError("writing failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason", "code", "part"),
    [
        (StageError(Reason.DATASET_EMPTY, "text"), Reason.DATASET_EMPTY, 10, "text"),
        (OSError(errno.ENOSPC, "full"), Reason.OUT_OF_DISK, 13, "ephemeral storage"),
        (caused_by(OSError(errno.ENOSPC, "full")), Reason.OUT_OF_DISK, 13, "ephemeral storage"),
        (RuntimeError("I/O: No space left on device"), Reason.OUT_OF_DISK, 13, "ephemeral"),
        (torch.OutOfMemoryError("CUDA out of memory."), Reason.OUT_OF_GPU_MEMORY, 12, "qlora"),
        (RuntimeError("CUDA error: out of memory"), Reason.OUT_OF_GPU_MEMORY, 12, "batchSize to 1"),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error\nLast error:\n"
                "Cuda failure 2 'out of memory'"
            ),
            Reason.OUT_OF_GPU_MEMORY,
            12,
            "The GPU's memory is full",
        ),
        (MemoryError(), Reason.OUT_OF_MEMORY, 16, "memory limit"),
        (ValueError("odd\nsecond line"), Reason.INTERNAL_ERROR, 1, "ValueError: odd"),
        (FileNotFoundError("s3://a/b is missing"), Reason.INTERNAL_ERROR, 1, "s3://a/b is missing"),
    ],
)
def test_errors_have_reasons(error: Exception, reason: Reason, code: int, part: str) -> None:
    failure = with_remedy(explain(error))
    assert (failure.reason, failure.reason.exit_code) == (reason, code)
    assert part in failure.message
    assert "\n" not in failure.message


def test_a_trace_is_logged_for_what_nobody_foresaw_only(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: Exception) -> StageResult:
        raise error

    with caplog.at_level(logging.ERROR):
        result = guarded(Stage.TRAIN, lambda: fail(StageError(Reason.DATASET_EMPTY, "no rows")))
    assert (result.stage, result.reason, result.message) == ("train", "DatasetEmpty", "no rows")
    assert [record.getMessage() for record in caplog.records] == ["DatasetEmpty: no rows"]
    assert "Traceback" not in caplog.text

    with caplog.at_level(logging.ERROR):
        result = guarded(Stage.TRAIN, lambda: fail(KeyError("x")))
    assert result.reason is Reason.INTERNAL_ERROR
    assert "Traceback" in caplog.text
    assert "Traceback" not in result.message


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (250, "4m10s"), (7505, "2h05m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (105_453_984, "105 MB"), (2_100_000_000, "2.1 GB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize("module", ["__main__", "prepare.prepare_stage", "train.train_stage"])
def test_command_and_stages_start_without_the_seconds_of_torch(module: str) -> None:
    code = (
        f"import sys, finetune_trainer.{module}; "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
