"""Runs commands to their end, and daemons that are found again by later runs.

A daemon is known by a small file with its process id, start time and program. It is ended only
when all three still match: a process id alone may belong to somebody else by now.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

TAIL_LINES = 20

_STARTED: list[subprocess.Popen[bytes]] = []
"""Keeps the handles, which would warn about a daemon still running when they are collected."""


class ClusterError(Exception):
    """Any failure to bring up, use or remove a cluster."""


class Unavailable(ClusterError):  # noqa: N818 - a state of the machine, not a mistake
    """This machine can't run that cluster; the message says what would change it."""


class CommandFailed(ClusterError):  # noqa: N818 - says what happened
    """A command exited with an error; carries the end of its output."""

    def __init__(self, argv: list[str], code: int, tail: str, log: Path | None = None) -> None:
        where = f"\n(the whole output is in {log})" if log else ""
        super().__init__(f"`{' '.join(argv)[:400]}` failed with exit code {code}:\n{tail}{where}")
        self.code = code
        self.tail = tail


def output(
    argv: list[str],
    *,
    input: str | None = None,  # noqa: A002 - as subprocess
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a short command and return what it printed."""
    done = subprocess.run(argv, input=input, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise CommandFailed(argv, done.returncode, (done.stderr or done.stdout).strip())
    return done.stdout


def run(
    argv: list[str],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run a long command: its output goes to `log`, and each line to `on_line`."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as sink:
        sink.write(f"$ {' '.join(argv)[:2000]}\n")
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        with process:  # closes the pipe; an exception on the way, such as Ctrl-C, ends the command
            try:
                for line in process.stdout or ():
                    sink.write(line)
                    tail.append(line.rstrip())
                    if on_line:
                        on_line(line.rstrip())
            except BaseException:
                process.kill()
                raise
        code = process.returncode
    if code:
        raise CommandFailed(argv, code, "\n".join(tail), log)


def wait_until(
    ready: Callable[[], bool], *, what: str, seconds: float, interval: float = 0.1
) -> None:
    """Wait for a condition, and fail with a clear message when it takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {seconds:.0f} s")
        time.sleep(interval)


def free_ports(address: str, count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((address, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def is_free(address: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


class Daemon:
    """A background process that other runs of this program can find, check and stop."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.log = folder / "logs" / f"{name}.log"
        self._record = folder / "pids" / f"{name}.json"

    def start(
        self, argv: list[str], *, detached: bool, env: Mapping[str, str] | None = None
    ) -> None:
        """Start it; unless detached, it ends with the process that started it."""
        for path in (self.log, self._record):
            path.parent.mkdir(parents=True, exist_ok=True)
        setpriv = shutil.which("setpriv")
        tie = [] if detached or not setpriv else [setpriv, "--pdeathsig", "TERM", "--"]
        with self.log.open("ab") as sink:
            process = subprocess.Popen(
                [*tie, *argv],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        _STARTED.append(process)
        try:
            created = psutil.Process(process.pid).create_time()
        except psutil.NoSuchProcess:
            created = 0.0
        record = {"pid": process.pid, "created": created, "program": Path(argv[0]).name}
        self._record.write_text(json.dumps(record))

    def process(self) -> psutil.Process | None:
        """The live process, or None when it is gone or its id belongs to another by now."""
        try:
            record = json.loads(self._record.read_text())
            found = psutil.Process(record["pid"])
            same = abs(found.create_time() - record["created"]) < 1
            if not same or found.status() == psutil.STATUS_ZOMBIE:
                return None
            words = found.cmdline()
        except (OSError, ValueError, KeyError, psutil.Error):
            return None
        if not words:  # for a moment, while it becomes the program, it has no command line
            return found
        return found if Path(words[0]).name in (record["program"], "setpriv") else None

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process() is not None

    def stop(self, *, seconds: float = 15, first: signal.Signals = signal.SIGTERM) -> None:
        """End it: politely first, then by force."""
        process = self.process()
        if process is not None:
            _end(process, first, seconds)
        self._record.unlink(missing_ok=True)
        _STARTED[:] = [each for each in _STARTED if each.poll() is None]

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The end of its log, for error messages."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"


def _end(process: psutil.Process, first: signal.Signals, seconds: float) -> None:
    try:
        process.send_signal(first)
        process.wait(timeout=seconds)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(timeout=seconds)
    except psutil.NoSuchProcess:
        return
