"""Programs that the trainer runs beside itself.

llama.cpp aborts its process where it meets what it can't handle, and a process that aborts can't
say why it failed. So its native code runs in a child, which also gives all memory back.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from finetune_trainer.contract import Reason
from finetune_trainer.contract.base import names_secret, names_user
from finetune_trainer.runtime import Transfer
from finetune_trainer.runtime.lifecycle import MemoryFullError
from finetune_trainer.runtime.reporter import Reporter

OnProgress = Callable[[int, int], None]
"""Called with what is done and the total, in a unit of the child's."""

ReadProgress = Callable[[str], tuple[int, int] | None]
"""What is done and the total, if a line of a program says so."""

_PROGRESS = "progress:"
_SAID = re.compile(rf"{_PROGRESS} (\d+) (\d+)\n")

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38  # <linux/prctl.h>
# <linux/landlock.h>; the numbers of the calls are the same on all architectures.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _PATH_BENEATH = 1 << 2, 1

_INHERITED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|LANG|LANGUAGE|TZ|LC_\w+|VIRTUAL_ENV|(https?|no)_proxy"
    r"|FINETUNE_(LOG_FORMAT|STAGE|WORKER_\w+)|HF_(HOME|ENDPOINT|HUB_\w+)"
    r"|(ACCELERATE|BITSANDBYTES|BNB|COVERAGE|DNNL|EFA|FI|FLASH_ATTENTION|GLOO|HSA|IBV|MALLOC|NCCL"
    r"|ONEDNN|RDMAV|ROCR|SSL_CERT|UCX|UNSLOTH|XDG)_\w+"
    r"|(CUDA|GGML|GOMP|HIP|KMP|LD|LLAMA|MKL|NVIDIA|OMP|OPENBLAS|PYTHON|PYTORCH|REQUESTS|TOKENIZERS"
    r"|TORCH|TRANSFORMERS|TRITON)_?\w+",
    re.IGNORECASE,
)
"""Variables that a child needs: how to find programs, libraries, certificates and the Hub, how many
threads to use, and what tunes the libraries that train, of one GPU or between several."""

SETTINGS = {
    "GGML_NO_BACKTRACE": "1",  # its own handler would call a debugger for a stack trace
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
}
"""Variables that a child gets beside those.

glibc gives a freed block back to the kernel only if the block was mapped, and maps fewer blocks the
larger the freed ones are (mallopt(3)). A fixed limit keeps large matrices from staying in the heap:
the reference takes 50 MiB less for a vocabulary of 49,152, and the same in each run.
"""

log = logging.getLogger(__name__)

SECRETS = Path("/var/run/secrets")
"""Where Kubernetes and the clouds mount the tokens of a pod's identity."""

_running: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Finished:
    status: int
    """Exit status; negative when a signal ended it."""

    output: str
    errors: str

    def last_line(self) -> str:
        """The last line that it wrote, which tends to say what went wrong."""
        lines = [line.strip() for line in (self.output + self.errors).splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with status {self.status}"


def run(
    command: list[str],
    request: str = "",
    environment: dict[str, str] | None = None,
    on_progress: OnProgress | None = None,
    shows: ReadProgress | None = None,
) -> Finished:
    """Run a program to its end, with `request` on its standard input.

    `on_progress` hears what the program says with `say_progress`, or shows by itself, if `shows`
    can read that. Raises MemoryFullError(OOMKilled)
    where it was killed: only the kernel does that, and `kill_running`, after which nobody asks.
    """
    variables = {**inherited(os.environ), **SETTINGS, **(environment or {})}
    errors: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=variables,
    ) as process:
        stream, process.stderr = process.stderr, None  # communicate() leaves it to the thread
        listener = threading.Thread(
            target=_listen, args=(stream, errors, on_progress, shows), name="child", daemon=True
        )
        listener.start()
        _running.add(process)
        try:
            output, _ = process.communicate(request)
            listener.join()
        except BaseException:
            process.kill()
            raise
        finally:
            _running.discard(process)
    if process.returncode == -signal.SIGKILL:
        raise MemoryFullError(
            Reason.OOM_KILLED, "A process of the stage was killed, most likely for want of memory."
        )
    return Finished(process.returncode, output, "".join(errors))


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that children get; no credential is among them.

    A model that was trusted with its own code runs that in a child.
    """
    return {
        name: value
        for name, value in environment.items()
        if _INHERITED.fullmatch(name) and not names_secret(name) and not names_user(value)
    }


def hide_from_children() -> None:
    """Let no other process of this user read this one's environment or memory in /proc.

    Only Linux can do that, and root reads it all the same.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def deny_reading(folder: Path) -> bool:
    """Let neither this thread nor what it starts from now on read a file below `folder`.

    Nothing takes that back. False where the kernel has no Landlock (Linux 5.13 has it). It only
    knows what is allowed: all that lies beside the folder and its parents now.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    handled = ctypes.c_uint64(_READ_FILE)
    rules = library.syscall(_LANDLOCK_CREATE, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    if rules < 0:
        return False
    folder = folder.resolve()
    inside = {folder, *folder.parents}
    for parent in folder.parents:
        for path in (each for each in parent.iterdir() if each not in inside):
            with suppress(FileNotFoundError), _opened(path) as beneath:
                # struct landlock_path_beneath_attr, which is packed; symbolic links have no rule.
                rule = struct.pack("=Qi", _READ_FILE, beneath)
                library.syscall(_LANDLOCK_ADD, rules, _PATH_BENEATH, rule, 0)
    library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    done = bool(library.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0)
    os.close(rules)
    return done


def deny_secrets() -> None:
    """In a child, before a model's own code runs in it: the tokens of the pod's identity as well
    are none of its business."""
    if SECRETS.is_dir() and not deny_reading(SECRETS):
        log.warning("This system has no Landlock: a model's own code could read %s", SECRETS)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The path itself, without its contents."""
    opened = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends; end now if it is gone already. Only Linux can do that.

    A training whose stage was killed would otherwise go on, unheard, and hold its GPU.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def say_progress(done: int, total: int) -> None:
    """In the child: how much of the work is done."""
    sys.stderr.write(f"{_PROGRESS} {done} {total}\n")
    sys.stderr.flush()


def _listen(
    stream: IO[str] | None,
    errors: list[str],
    on_progress: OnProgress | None,
    shows: ReadProgress | None,
) -> None:
    read = shows or _said
    with stream or nullcontext(()) as lines:
        for line in lines:
            found = read(line)
            if found is None:
                errors.append(line)
            elif on_progress:
                on_progress(*found)


def _said(line: str) -> tuple[int, int] | None:
    said = _SAID.fullmatch(line)
    return (int(said[1]), int(said[2])) if said else None


def kill_running() -> None:
    """End the children that are at work; for a process that is about to end itself."""
    for process in list(_running):
        process.kill()


def as_transfer(reporter: Reporter | None, what: str) -> OnProgress | None:
    """What shows a child's progress in bytes as a transfer; None where nobody looks."""
    return None if reporter is None else _ShownTransfer(reporter, what)


def as_steps(reporter: Reporter | None) -> OnProgress | None:
    """What shows a child's progress in percent, and how long the rest takes at that pace; or as
    that of the part of the work that this thread does."""
    if reporter is None:
        return None
    if share := reporter.share_of_part():
        of_part = share
        return lambda done, total: of_part(done / max(total, 1))
    shown, began = reporter, time.monotonic()

    def show(done: int, total: int) -> None:
        pace = (time.monotonic() - began) / done if done else None
        shown.steps(done, total, eta_seconds=None if pace is None else pace * (total - done))

    return show


class _ShownTransfer:
    def __init__(self, reporter: Reporter, what: str) -> None:
        self._reporter = reporter
        self._what = what
        self._share = reporter.share_of_part()
        self._transfer: Transfer | None = None
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        if self._transfer is None:
            self._transfer = Transfer(self._reporter, self._what, total, self._share)
        self._transfer(done - self._done)
        self._done = done
