"""`python -m MODULE` without waiting for its imports: a process that has them forks one per run.

What runs is the module as `__main__`, in a process of its own, with its own environment and
streams; only `exec` is left out. The trainer's commands run so in these tests, with the children
that they start. Tests with the marker `real_processes` start them as users do.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

ROOT = Path(__file__).parents[3]
NO_MOUNT = 77  # this machine lets nobody mount a disk
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000  # <linux/sched.h>
REQUEST_BYTES = 1 << 20
COMMAND = "finetune_trainer"
# What takes seconds to import.
MODULES = (
    "finetune_trainer.__main__",
    "finetune_trainer.prepare.prepare_stage",
    "finetune_trainer.train.train_stage",
    "finetune_trainer.train.recipe.train_worker",
    "finetune_trainer.train.recipe.sft",
    "finetune_trainer.train.recipe.preference",
    "finetune_trainer.train.recipe.processes",
    "torch.distributed.run",
    "finetune_trainer.export.export_stage",
    "finetune_trainer.export.reference.float32",
    "finetune_trainer.store.s3_folder",
    "transformers.models.llama.modeling_llama",
    "tensorboardX",
    "llama_cpp",
    "boto3",
)


class Forked(subprocess.Popen[Any]):
    """A process of the server, where the command is a Python module; any other as usual."""

    address: ClassVar[str] = ""
    """The server's socket."""

    small_disk: ClassVar[tuple[Path, int] | None] = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        # (executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        # six ends of pipes, restore_signals, gid, gids, uid, umask, start_new_session, …)
        command = [os.fspath(each) for each in args]
        cwd, environment, pipes, new_session = rest[4], rest[5], rest[8 + 1 : 15], rest[20]
        self._socket: socket.socket | None = None
        interpreter, _, module = " ".join(command).partition(" -m ")
        forks = interpreter in (sys.executable, f"{sys.executable} -u") and bool(module)
        if not forks:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        stdin, _, _, stdout, _, stderr = pipes
        given = [number if number >= 0 else n for n, number in enumerate((stdin, stdout, stderr))]
        request = {
            "command": command[command.index("-m") + 1 :],
            "environment": dict(os.environ if environment is None else environment),
            "cwd": os.fspath(cwd or Path.cwd()),
            "newSession": bool(new_session),
            "smallDisk": self.small_disk and [str(self.small_disk[0]), self.small_disk[1]],
        }
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
        self._socket.connect(self.address)
        socket.send_fds(self._socket, [json.dumps(request).encode()], given)
        self.pid = int(self._socket.recv(64))
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._socket is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]
        try:
            told = self._socket.recv(64, socket.MSG_DONTWAIT if wait_flags else 0)
        except BlockingIOError:
            return 0, 0
        self._socket.close()
        return self.pid, int(told or signal.SIGKILL)  # without a word: the server was killed

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self._socket is None:
            return super()._internal_poll(*arguments, **options)  # type: ignore[misc, no-any-return]
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


class ForkedWorker(subprocess.Popen[bytes]):
    """What the stage starts as its worker: a fork of the stage itself, which dies with it."""

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        # python -m <module> <request> <parent>; of the rest see above
        module, request, parent = args[2], Path(args[-2]), int(args[-1])
        environment: dict[str, str] = rest[5]

        def work() -> int:
            os.environ.clear()
            os.environ.update(environment)
            status: int = importlib.import_module(module).main(request, parent)
            return status

        self.pid = _fork(work, new_session=True)
        self._child_created = True


def with_popen(popen: Callable[..., subprocess.Popen[Any]]) -> Any:
    """The module subprocess, which starts programs in another way."""
    own = {name: value for name, value in vars(subprocess).items() if not name.startswith("__")}
    return SimpleNamespace(**{**own, "Popen": popen})


class ForkServer:
    """The end that tests talk to."""

    def __init__(self, address: str) -> None:
        self.popen = type("Popen", (Forked,), {"address": address})
        self._processes: dict[int, Forked] = {}

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
        popen = type("Popen", (self.popen,), {"small_disk": small_disk})
        with log.open("ab") as output:
            process = popen(
                [sys.executable, "-m", COMMAND, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._processes[process.pid] = process
        return int(process.pid)

    def poll(self, pid: int) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._processes[pid].poll()


@contextmanager
def fork_server() -> Iterator[ForkServer]:
    """Start one; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        home = Path(folder, "home")
        home.mkdir()
        address = str(Path(folder, "socket"))
        with subprocess.Popen(
            [sys.executable, "-m", "tests.integration.trainer.fork_server", address],
            cwd=ROOT,
            # Libraries choose their folders when they are imported.
            # Triton's kernels are compiled or interpreted as it is told when they are imported.
            env={
                **os.environ,
                "HOME": str(home),
                "OMP_NUM_THREADS": "1",
                "TRITON_INTERPRET": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield ForkServer(address)
            process.stdin.close()


# The server


def serve(address: str) -> None:
    """Fork what clients ask for, and tell each how its process ended, until stdin is closed."""
    from finetune_trainer.runtime.lifecycle import set_up_libraries

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    set_up_libraries()  # as the command does, before the libraries are loaded
    for name in MODULES:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork has one thread only"
    gc.collect()
    gc.freeze()
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(16)
        print("ready", file=answer, flush=True)
        with selectors.DefaultSelector() as selector:
            for each in (listener, woken, sys.stdin):
                selector.register(each, selectors.EVENT_READ)
            while sys.stdin not in (ready := [key.fileobj for key, _ in selector.select()]):
                if woken in ready:
                    woken.recv(4096)
                    _report(clients)
                if listener in ready:
                    client, _ = listener.accept()
                    _answer(client, clients, [listener, woken, wake, selector])


def _report(clients: dict[int, socket.socket]) -> None:
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with clients.pop(pid) as client, suppress(OSError):  # maybe nobody waits any more
            client.send(str(status).encode())


def _answer(client: socket.socket, clients: dict[int, socket.socket], others: list[Any]) -> None:
    data, given, _, _ = socket.recv_fds(client, REQUEST_BYTES, 3)
    if not data:  # it was killed before it could ask
        client.close()
        return
    request = json.loads(data)

    def work() -> int:
        for each in (client, *clients.values(), *others):
            each.close()
        for number, descriptor in enumerate(given):
            os.dup2(descriptor, number)
            os.close(descriptor)
        return _run(request)

    pid = _fork(work, new_session=request["newSession"])
    for descriptor in given:
        os.close(descriptor)
    clients[pid] = client
    with suppress(OSError):
        client.send(str(pid).encode())


def _fork(work: Any, *, new_session: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if new_session:
            os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = work()
    except SystemExit as end:
        status = _exit_status(end)
    except BaseException:
        traceback.print_exc()
    finally:
        _end(status)


def _exit_status(end: SystemExit) -> int:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return 1
    return int(end.code or 0)


def _end(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # maybe nobody reads any more
            stream.flush()
    os._exit(status)


def _run(request: dict[str, Any]) -> int:
    """Be the process that was asked for."""
    import huggingface_hub.constants

    os.environ.clear()
    os.environ.update(request["environment"])
    # OpenMP hangs in a fork that wants other threads than its parent has.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    importlib.reload(huggingface_hub.constants)  # which come from the environment
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    logging.root.handlers.clear()
    logging.getLogger(COMMAND).setLevel(logging.NOTSET)
    if disk := request["smallDisk"]:
        _mount(*disk)
    module, *arguments = request["command"]
    if module != COMMAND:
        for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
            del sys.modules[name]  # llama.cpp's converter brings its own
    _let_children_fork()
    sys.argv = [module, *arguments]
    warnings.simplefilter("ignore" if os.environ.get("PYTHONWARNINGS") == "ignore" else "default")
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # it is loaded already
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _let_children_fork() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from finetune_trainer.runtime import child
    from finetune_trainer.train.supervisor import training_session

    die_with_parent = child.die_with_parent

    def die_with_server(parent: int) -> None:
        del parent  # who asked for this process; its parent is the server
        die_with_parent(os.getppid())

    child.die_with_parent = die_with_server
    popen = type("Popen", (Forked,), {"address": sys.argv[1]})
    child.subprocess = with_popen(popen)  # type: ignore[attr-defined]
    training_session.subprocess = with_popen(ForkedWorker)  # type: ignore[attr-defined]
    subprocess_handler.Popen = popen  # type: ignore[attr-defined, assignment] # torch imports it


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


if __name__ == "__main__":
    serve(sys.argv[1])
