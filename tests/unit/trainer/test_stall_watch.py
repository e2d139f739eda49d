"""A worker that says nothing for too long is ended, and one that lives is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_trainer.contract import Progress, Reason, RunConfig, Training
from finetune_trainer.model import ModelFolder
from finetune_trainer.train.link import WORKERS, Failed, TrainingWork, default_plan
from finetune_trainer.train.link.channel import Channel, WorkerMessage, listening
from finetune_trainer.train.supervisor.stall_watch import StallWatch
from finetune_trainer.train.supervisor.training_session import WorkerProcess

ALIVE = WorkerMessage(alive=True)
HANGS = """
import sys, threading, time
from pathlib import Path
from finetune_trainer.train.link import show_stacks

def waits_for_ever():
    time.sleep(600)

def another_thread():
    waits_for_ever()

show_stacks(Path(sys.argv[1]))
threading.Thread(target=another_thread, daemon=True).start()
waits_for_ever()
"""


def watch(folder: Path, timeout: str = "1s") -> StallWatch:
    return StallWatch(Training(stall_timeout=timeout), folder)


def at_step(step: int) -> WorkerMessage:
    return WorkerMessage(progress=Progress(step=step))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_silent_worker_shows_the_stack_of_each_thread_and_is_killed(
    tmp_path: Path, frozen: bool
) -> None:
    watched = watch(tmp_path, "2s")
    watched.heard(at_step(0))
    watched.heard(at_step(1))
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not (tmp_path / WORKERS).exists():
            time.sleep(0.01)
        time.sleep(0.3)  # until both threads wait
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


def test_until_the_first_step_it_has_twice_the_time(tmp_path: Path) -> None:
    watched = watch(tmp_path)
    watched.heard(at_step(7))  # where it goes on
    began = time.monotonic()
    with subprocess.Popen(["sleep", "60"]) as process, watched.over(process):
        assert process.wait(20) == -signal.SIGKILL
    assert time.monotonic() - began >= 2


def test_signs_of_life_are_enough(tmp_path: Path) -> None:
    watched = watch(tmp_path)
    for step in (0, 1):
        watched.heard(at_step(step))
    with subprocess.Popen(["sleep", "3"]) as process, watched.over(process):
        while process.poll() is None:
            watched.heard(ALIVE)
            time.sleep(0.05)
    assert not watched.stalled
    assert process.returncode == 0


def test_signs_of_life_come_through_the_channel_now_and_then(tmp_path: Path) -> None:
    heard: list[WorkerMessage] = []
    with listening(tmp_path, heard.append):
        channel = Channel(tmp_path)
        for _ in range(1000):
            channel.alive()
        channel.close()
    assert heard == [ALIVE]


def test_the_stage_learns_why_its_worker_ended(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"source": "org/base"},
            "dataset": {"source": "s3://data/faq.csv"},
            "output": {"uri": "s3://models/support"},
            "training": {"stallTimeout": "1s"},
        }
    )
    work = TrainingWork(
        config=config,
        plan=default_plan(config),
        max_sequence_length=64,
        engine="transformers",
        examples=tmp_path / "examples",
        held_out=None,
        model=ModelFolder(path=tmp_path),
        workdir=tmp_path,
    )
    ending = WorkerProcess("tests.unit.trainer.silent_worker").run(work)
    assert isinstance(ending, Failed)
    assert ending.reason is Reason.STALLED
    assert ending.reason.retryable
    assert "spec.training.stallTimeout" in ending.message


@pytest.mark.parametrize("text", ["0s", "30", "", "1d", "-5m", "1m30", "500ms"])
def test_a_timeout_is_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a duration|at least 2"):
        Training(stall_timeout=text)
