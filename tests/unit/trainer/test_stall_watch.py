"""A worker that says nothing for too long is ended, and one that lives is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_trainer.contract import Progress, Reason, Training
from finetune_trainer.train.link import (
    Channel,
    Failed,
    TrainingWork,
    WorkerMessage,
    listening,
)
from finetune_trainer.train.supervisor.training_session import StallWatch, WorkerProcess
from tests.unit.trainer.training_work import work_in

ALIVE = WorkerMessage(alive=True)
HANGS = """
import faulthandler, signal, threading, time

def waits_for_ever():
    time.sleep(600)

def another_thread():
    waits_for_ever()

faulthandler.register(signal.SIGUSR1, all_threads=True)
threading.Thread(target=another_thread, daemon=True).start()
print(flush=True)
waits_for_ever()
"""


def watch(timeout: str = "1s") -> StallWatch:
    return StallWatch(Training(stall_timeout=timeout))


def at_step(step: int) -> WorkerMessage:
    return WorkerMessage(progress=Progress(step=step))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_silent_worker_shows_the_stack_of_each_thread_and_is_killed(frozen: bool) -> None:
    watched = watch("2s")
    watched.heard(at_step(0))
    watched.heard(at_step(1))
    command, pipe = [sys.executable, "-c", HANGS], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        time.sleep(0.3)  # until both threads wait
        watched.heard(WorkerMessage(process=process.pid))
        if frozen:
            process.send_signal(signal.SIGSTOP)
        with watched.over(process):
            assert process.wait(20) == -signal.SIGKILL
        assert process.stderr is not None
        stacks = process.stderr.read().decode()
    assert watched.stalled
    assert stacks.count("in waits_for_ever") == 2
    assert "in another_thread" in stacks
    assert "for 2s" in watched.words


def test_until_the_first_step_it_has_twice_the_time() -> None:
    watched = watch()
    watched.heard(at_step(7))  # where it goes on
    began = time.monotonic()
    with subprocess.Popen(["sleep", "60"]) as process, watched.over(process):
        assert process.wait(20) == -signal.SIGKILL
    assert time.monotonic() - began >= 2


def test_signs_of_life_are_enough() -> None:
    watched = watch()
    for step in (0, 1):
        watched.heard(at_step(step))
    with subprocess.Popen(["sleep", "3"]) as process, watched.over(process):
        while process.poll() is None:
            watched.heard(ALIVE)
            time.sleep(0.05)
    assert not watched.stalled
    assert process.returncode == 0


@pytest.fixture
def work(tmp_path: Path) -> TrainingWork:
    return work_in(tmp_path, stallTimeout="1s")


def test_signs_of_life_come_through_the_channel_now_and_then(work: TrainingWork) -> None:
    heard: list[WorkerMessage] = []
    with listening(work, heard.append) as link:
        channel = Channel(link.address)
        for _ in range(1000):
            channel.alive()
        channel.close()
    assert heard == [WorkerMessage(process=os.getpid()), ALIVE]


def test_the_stage_learns_why_its_worker_ended(work: TrainingWork) -> None:
    ending = WorkerProcess("tests.unit.trainer.silent_worker").run(work)
    assert isinstance(ending, Failed)
    assert ending.reason is Reason.STALLED
    assert ending.reason.retryable
    assert "spec.training.stallTimeout" in ending.message


@pytest.mark.parametrize("text", ["0s", "30", "", "1d", "-5m", "1m30", "500ms"])
def test_a_timeout_is_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a duration|at least 2"):
        Training(stall_timeout=text)
