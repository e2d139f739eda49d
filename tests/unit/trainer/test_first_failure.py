"""Of several processes that end, the first to fail gives the reason."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from finetune_trainer.contract import Reason
from finetune_trainer.train.link import Failed, WorkerMessage
from finetune_trainer.train.recipe import processes
from finetune_trainer.train.supervisor.training_session import ending_of

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


def status_of(*failures: ProcessFailure) -> int:
    """Torchrun's exit status, in whatever order it sees them end."""
    found = {
        processes._report(ChildFailedError("worker", {each.local_rank: each for each in order}))
        for order in itertools.permutations(failures)
    }
    assert len(found) == 1
    return found.pop()


def said(message: str, *, at: float, lost_peer: bool = False) -> Failed:
    return Failed(reason=Reason.INTERNAL_ERROR, message=message, at=at, lost_peer=lost_peer)


def ending(status: int, *failures: Failed) -> Failed:
    said = [WorkerMessage(lengths={3: 1, 5: 2})]
    said += [WorkerMessage(failed=failure) for failure in failures]
    found = ending_of(said, status, may_be_memory=True)
    assert isinstance(found, Failed)
    assert found.lengths == {3: 1, 5: 2}
    return found


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
def test_a_peer_that_ends_by_a_signal_afterwards_hides_no_reason(
    tmp_path: Path, sent: signal.Signals
) -> None:
    later = 140 if sent == signal.SIGKILL else 101  # torchrun's own comes after half a minute
    peer = ended(tmp_path, 0, -sent, at=later)
    assert status_of(peer, ended(tmp_path, 1, 1, NCCL, at=100)) == 1


def test_one_that_the_kernel_killed_is_the_first_whatever_its_peers_say(tmp_path: Path) -> None:
    peer = ended(tmp_path, 0, 1, LOST, at=100)
    assert status_of(peer, ended(tmp_path, 1, -signal.SIGKILL, at=103)) == 137
    assert ending(137, said(LOST, at=1.0, lost_peer=True)).reason is Reason.OOM_KILLED


def test_where_a_signal_ended_all_of_them_it_is_named(tmp_path: Path) -> None:
    assert status_of(ended(tmp_path, 0, -signal.SIGSEGV, at=100)) == 139
    assert "status 139" in ending(139).message


def test_the_earlier_error_counts_and_before_it_one_that_is_no_loss_of_a_peer() -> None:
    first, second = said(NCCL, at=1.0, lost_peer=True), said(LOST, at=1.1, lost_peer=True)
    own = said("RuntimeError: shapes", at=1.2)
    for order in itertools.permutations([first, second]):
        assert ending(1, *order).message == NCCL
    for order in itertools.permutations([first, second, own]):
        assert ending(1, *order).message == own.message
        assert ending(143, *order).message == own.message
