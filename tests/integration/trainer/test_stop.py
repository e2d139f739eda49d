"""SIGTERM: a stage ends at once, with its reason, wherever it is."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

import psutil
import pytest

from finetune_trainer.contract import Reason, StageResult
from tests.integration.trainer.conftest import Trainer


@pytest.mark.parametrize(
    ("command", "sign"),
    [("run", "Training\n"), ("prepare", "Checking that llama.cpp can convert the model\n")],
)
def test_sigterm_stops_a_stage(
    trainer: Trainer, run_config: dict[str, Any], command: str, sign: str
) -> None:
    run_config["training"]["epochs"] = 1000
    with subprocess.Popen(
        trainer.command(command, run_config),
        env=trainer.full_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith(sign):
                break
        children = _children(process.pid) if command == "prepare" else []
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 14, rest
        assert time.monotonic() - began < 5
    result = StageResult.from_message(trainer.log.read_text())
    assert result is not None
    assert result.reason is Reason.STOPPED
    assert result.stage == ("train" if command == "run" else "prepare")
    assert "Traceback" not in rest
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert children == gone
    assert not alive


def _children(pid: int) -> list[psutil.Process]:
    """The converter, which starts a moment after the line in the log."""
    deadline = time.monotonic() + 20
    while not (children := psutil.Process(pid).children(recursive=True)):
        assert time.monotonic() < deadline, "the converter never started"
        time.sleep(0.05)
    return children
