"""Of several processes that end, the first to fail gives the reason."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from finetune_trainer.contract import Reason
from finetune_trainer.train.link import FAILED, Failed
from finetune_trainer.train.recipe import processes

NCCL = "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"
LOST = "RuntimeError: Connection closed by peer"


def ended(folder: Path, rank: int, status: int, words: str = "", at: int = 0) -> ProcessFailure:
    """As torchrun sees the end of a process, which left its error or none."""
    file = folder / f"error-{rank}.json"
    if words:
        about = {"message": words, "extraInfo": {"py_callstack": "", "timestamp": str(at)}}
        file.write_text(json.dumps({"message": about}))
        os.utime(file, (at, at))
    failure = ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file=str(file))
    failure.timestamp = at
    return failure


def report(folder: Path, *failures: ProcessFailure) -> tuple[int, Failed | None]:
    status = processes._report(
        ChildFailedError("worker", {failure.local_rank: failure for failure in failures}), folder
    )
    left = folder / FAILED
    return status, Failed.model_validate_json(left.read_bytes()) if left.exists() else None


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
def test_a_peer_that_ends_by_a_signal_afterwards_hides_no_reason(
    tmp_path: Path, sent: signal.Signals
) -> None:
    later = 140 if sent == signal.SIGKILL else 101  # torchrun's own comes after half a minute
    failures = [ended(tmp_path, 0, -sent, at=later), ended(tmp_path, 1, 1, NCCL, at=100)]
    for order in (failures, failures[::-1]):
        status, left = report(tmp_path, *order)
        assert status == 1
        assert left is not None
        assert left.reason is Reason.INTERNAL_ERROR
        assert left.message.startswith(NCCL)
        (tmp_path / FAILED).unlink()


def test_one_that_the_kernel_killed_is_the_first_whatever_its_peers_say(tmp_path: Path) -> None:
    peer = ended(tmp_path, 0, 1, LOST, at=100)
    killed = ended(tmp_path, 1, -signal.SIGKILL, at=103)
    assert report(tmp_path, peer, killed) == (137, None)


def test_of_two_errors_the_earlier_one_counts(tmp_path: Path) -> None:
    peer = ended(tmp_path, 0, 1, LOST, at=101)
    status, left = report(tmp_path, peer, ended(tmp_path, 1, 1, NCCL, at=100))
    assert status == 1
    assert left is not None
    assert left.message.startswith(NCCL)


def test_where_a_signal_ended_all_of_them_it_is_named(tmp_path: Path) -> None:
    assert report(tmp_path, ended(tmp_path, 0, -signal.SIGSEGV, at=100)) == (139, None)
