"""The command line without waiting for its imports: a process that has them forks one per run.

What runs is `finetune_trainer.__main__.main`, and its worker is
`finetune_trainer.train.recipe.worker`, each in a process of its own, with its own
environment and log; only `exec` is left out.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[3]
NO_MOUNT = 77  # this machine lets nobody mount a disk
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000  # <linux/sched.h>


class ForkServer:
    """The end that tests talk to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(
        self,
        arguments: list[str],
        environment: dict[str, str],
        log: Path,
        small_disk: tuple[Path, int] | None = None,
    ) -> int:
        """Run `finetune-trainer` with these arguments; returns the process id.

        `small_disk` is a folder that becomes, for this process, a disk of so many bytes.
        """
        disk = [str(small_disk[0]), small_disk[1]] if small_disk else None
        answer = self._ask(
            arguments=arguments,
            # OpenMP hangs in a fork that wants other threads than its parent has.
            environment={**environment, "OMP_NUM_THREADS": "1"},
            log=str(log),
            small_disk=disk,
        )
        return int(answer["pid"])

    def poll(self, pid: int) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        status: int | None = self._ask(poll=pid)["status"]
        return status

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def fork_server(*modules: str) -> Iterator[ForkServer]:
    """Start one, which has these modules of the trainer too; it ends with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.trainer.fork_server", *modules],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield ForkServer(process)
        assert process.stdin is not None
        process.stdin.close()


class ForkedWorker(subprocess.Popen[bytes]):
    """What the stage starts as its worker: a fork in place of the command."""

    def _execute_child(self, args: list[str], *_: Any) -> None:
        # python -m finetune_trainer.runtime.die_with_parent <parent> python -m <module> <request>
        parent, module, request = int(args[3]), args[-2], Path(args[-1])

        def work() -> int:
            from finetune_trainer.runtime.die_with_parent import die_with_parent

            die_with_parent(parent)
            status: int = importlib.import_module(module).main(request)
            return status

        self.pid = _fork(work)
        self._child_created = True


def _fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        status = work()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _stage(request: dict[str, Any]) -> int:
    from finetune_trainer import __main__ as command
    from finetune_trainer.train.supervisor import launch

    os.environ.clear()
    os.environ.update(request["environment"])
    descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    stand_in = SimpleNamespace(Popen=ForkedWorker, TimeoutExpired=subprocess.TimeoutExpired)
    launch.subprocess = stand_in  # type: ignore[assignment, attr-defined]
    if disk := request["small_disk"]:
        _mount(*disk)
    sys.argv = ["finetune-trainer", *request["arguments"]]
    command.main()
    return 0


def _mount(folder: str, size: int) -> None:
    """Mount a disk in memory, for this process and its children; exits with NO_MOUNT if refused."""
    user, group = os.getuid(), os.getgid()
    c = ctypes.CDLL(None, use_errno=True)
    if c.unshare(CLONE_NEWNS | CLONE_NEWUSER):
        sys.exit(NO_MOUNT)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if c.mount(b"none", folder.encode(), b"tmpfs", 0, f"size={size}".encode()):
        sys.exit(NO_MOUNT)


def _serve() -> None:
    from finetune_trainer.runtime.logs import set_up_libraries

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    set_up_libraries()  # as the command does, before the libraries are loaded
    own = ("storage.s3", "base_model.loading", "train.stage", "train.worker", "train.sft")
    for name in (*own, *sys.argv[1:]):
        importlib.import_module(f"finetune_trainer.{name}")
    statuses: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            answer: dict[str, Any] = {"status": statuses.get(pid)}
        else:
            answer = {"pid": _fork(lambda request=request: _stage(request))}  # type: ignore[misc]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
