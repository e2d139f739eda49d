"""Start the worker, pass on what it says, and find out how it ended."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.runtime import stopping
from finetune_trainer.train.link.work import FAILED, TRAINED, Failed, Trained, Work

WORKER = "finetune_trainer.train.recipe.worker"
TIED = "finetune_trainer.runtime.die_with_parent"
VMSTAT = Path("/proc/vmstat")
REQUEST = "work.json"

log = logging.getLogger(__name__)


class Workers:
    """The process (or torchrun with its processes) that trains."""

    def __init__(self, module: str = WORKER) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, work: Work) -> Trained | Failed:
        """Run the worker to its end; raises StageError when it ended without a word."""
        for name in (TRAINED, FAILED):
            (work.room / name).unlink(missing_ok=True)
        request = work.room / REQUEST
        request.write_text(work.model_dump_json(indent=2), encoding="utf-8")
        if stopping.is_stopping():
            stopping.wait_if_stopping()
        kills = oom_kills()
        # A session of its own: Ctrl-C is for the stage, which then tells the worker to save.
        with subprocess.Popen(
            [sys.executable, "-m", TIED, str(os.getpid()), *self._command(work, request)],
            start_new_session=True,
        ) as process:
            self._process = process
            status = process.wait()
        # A worker that was told to stop ends as well; then the stop has the last word.
        stopping.wait_if_stopping()
        return _ending(work, status, for_memory=kills is None or kills != oom_kills())

    def stop(self, deadline: float) -> bool:
        """Tell the worker to save and end; whether it did so before the deadline."""
        process = self._process
        if process is None or process.poll() is not None:
            return True
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            return False
        return True

    def _command(self, work: Work, request: Path) -> list[str]:
        return command(self._module, request, work.processes, stopping.save_seconds())


def oom_kills() -> int | None:
    """How many processes this machine has killed for want of memory; None if it doesn't tell."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text().splitlines())
        return int(counters["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def _ending(work: Work, status: int, *, for_memory: bool) -> Trained | Failed:
    trained, failed = work.room / TRAINED, work.room / FAILED
    if status == 0 and trained.exists():
        return Trained.model_validate_json(trained.read_bytes())
    if failed.exists():
        return Failed.model_validate_json(failed.read_bytes())
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL) and for_memory:
        raise StageError(
            Reason.OOM_KILLED,
            "The training process was killed, most likely for want of memory: raise the memory "
            "limit of the training's pod.",
        )
    raise StageError(
        Reason.INTERNAL_ERROR,
        f"The training process ended with status {status} (the log has the details).",
    )


def as_error(failed: Failed, **details: Any) -> StageError:
    """The worker's failure as the stage's."""
    return StageError(failed.reason, failed.message, **details)


def command(module: str, request: Path, processes: int, shutdown_seconds: float) -> list[str]:
    """Start one worker, or torchrun with one for each process.

    On a stop the workers have `shutdown_seconds` to save before torchrun kills them.
    """
    if processes == 1:
        return [sys.executable, "-m", module, str(request)]
    return [
        sys.executable,
        "-m",
        "finetune_trainer.train.recipe.torchrun",
        "--standalone",
        "--local-addr=127.0.0.1",  # a pod's own name need not resolve
        f"--nproc-per-node={processes}",
        f"--shutdown-timeout={max(int(shutdown_seconds), 1)}",
        "--module",
        module,
        str(request),
    ]
