"""A command with its children: time, CPU, the peak of its anonymous memory, bytes written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

INTERVAL_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu_seconds: float
    """User and system, of the command and all that it started."""

    anonymous_bytes: int
    """Peak of RssAnon, summed over all that ran at a time; sampled every 20 ms."""

    written_bytes: int
    """Handed to the kernel to write (wchar), pipes included."""

    def __add__(self, other: Self) -> Cost:
        """One after the other."""
        return Cost(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.anonymous_bytes, other.anonymous_bytes),
            self.written_bytes + other.written_bytes,
        )


def measure(command: list[str]) -> Cost:
    """Run a command to its end; the program ends where the command fails."""
    os.sync()  # what others left to be written is not its cost
    cpu, written, began = _cpu(), _written(), time.perf_counter()
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
        Peak(lambda: sum(map(_anonymous, _tree(process.pid))), INTERVAL_SECONDS) as anonymous,
    ):
        said, _ = process.communicate()
        seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said[-3000:]}")
    return Cost(seconds, _cpu() - cpu, anonymous.value, _written() - written)


class Peak(threading.Thread):
    """The most that `look` finds while the block runs, asked every so many seconds."""

    def __init__(self, look: Callable[[], int], interval: float) -> None:
        super().__init__(daemon=True)
        self.value = 0
        self._look, self._interval = look, interval
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def run(self) -> None:
        while not self._over.wait(self._interval):
            self.value = max(self.value, self._look())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:  # it grows
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue  # it ended
    return found


def _anonymous(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it ended
    return 0


def _cpu() -> float:
    """Of all children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _written() -> int:
    """Of this process and all children that ended: the kernel adds a child's to its parent's."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise AssertionError("this kernel does not count")
