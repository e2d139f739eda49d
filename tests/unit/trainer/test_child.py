"""Children die with their parent, and get none of its credentials."""

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


NOBODY = 65534
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "the-store-s-secret",
    "AWS_SESSION_TOKEN": "the-session",
    "HF_TOKEN": "hf_read",
    "HF_HUB_TOKEN": "hf_other",
    "FINETUNE_HUB_TOKEN": "hf_write",
    "WANDB_API_KEY": "tracked",
    "HTTPS_PROXY": "http://user:password@proxy:3128",
    "MY_SETTING": "of somebody",
}
LOOK = f"""
import ctypes, os
from finetune_trainer.runtime import child
if os.geteuid() == 0:  # who may read everything
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
    ctypes.CDLL(None).prctl(child.PR_SET_DUMPABLE, 1, 0, 0, 0)
print(child.run(["env"]).output)
look = ["cat", f"/proc/{{os.getpid()}}/environ"]
print("before:", child.run(look).status)
child.hide_from_children()
print("after:", child.run(look).status)
"""


def test_a_child_finds_no_credential_in_its_environment_or_its_parent_s() -> None:
    kept = {"OMP_NUM_THREADS": "2", "HF_ENDPOINT": "https://hub.example"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env={**os.environ, **CREDENTIALS, **kept},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["before: 0", "after: 1"]
    assert [value for value in CREDENTIALS.values() if value in done.stdout] == []
    assert {f"{name}={value}" for name, value in kept.items()} <= set(lines)
