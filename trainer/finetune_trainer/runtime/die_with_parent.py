"""Start a program that dies with the process that started it.

    python -m finetune_trainer.runtime.die_with_parent <pid of the parent> <program> [arguments]

A training whose stage was killed would otherwise go on, unheard, and hold its GPU.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; it outlives exec, and a child doesn't inherit it


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends; end now if it is gone already. Only Linux can do that."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - the arguments are a list
