"""A program that runs under die_with_parent dies with its parent, whatever kills the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

DIE_WITH_PARENT = [sys.executable, "-m", "finetune_trainer.runtime.die_with_parent"]
SLEEP = "import time; print('up', flush=True); time.sleep(60)"
PARENT = f"""
import os, subprocess
command = {DIE_WITH_PARENT!r} + [str(os.getpid()), {sys.executable!r}, "-c", {SLEEP!r}]
child = subprocess.Popen(command, start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can")


def test_it_dies_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "up\n"
        assert child.is_running()
        parent.kill()
        gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone == [child]


def test_it_does_not_begin_when_the_parent_is_gone_already() -> None:
    # Some other process is its parent by now.
    done = subprocess.run(
        [*DIE_WITH_PARENT, str(os.getppid()), "true"], capture_output=True, check=False, timeout=30
    )
    assert done.returncode == 128 + signal.SIGKILL


def test_it_is_the_program_that_it_starts() -> None:
    command = [*DIE_WITH_PARENT, str(os.getpid()), "sh", "-c", "exit 7"]
    assert subprocess.run(command, check=False, timeout=30).returncode == 7
