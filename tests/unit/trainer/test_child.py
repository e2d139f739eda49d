"""A process that calls die_with_parent dies with its parent, whatever kills the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

START = "import sys; from finetune_trainer.runtime.child import die_with_parent; "
PARENT = f"""
import os, subprocess, sys
code = {START!r} + "die_with_parent(int(sys.argv[1])); print('up', flush=True); sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", code, str(os.getpid())], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can")


def test_it_dies_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
    code = f"{START} die_with_parent({os.getppid()}); print('up')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=30
    )
    assert done.returncode == 128 + signal.SIGKILL
    assert not done.stdout
