"""Programs that the trainer runs beside itself.

llama.cpp aborts its process where it meets what it can't handle, and a process that aborts can't
say why it failed. So its native code runs in a child, which also gives all memory back.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

_running: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Finished:
    """How a child ended."""

    status: int
    """Exit status; negative when a signal ended it."""

    output: str
    errors: str

    def last_line(self) -> str:
        """The last line that it wrote, which tends to say what went wrong."""
        lines = [line.strip() for line in (self.output + self.errors).splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with status {self.status}"


def run(
    command: list[str], request: str = "", environment: dict[str, str] | None = None
) -> Finished:
    """Run a program to its end, with `request` on its standard input."""
    # GGML's own handler would call a debugger for a stack trace, if there is one.
    variables = {
        **os.environ,
        "GGML_NO_BACKTRACE": "1",
        "PYTHONWARNINGS": "ignore",
        "TQDM_DISABLE": "1",
        **(environment or {}),
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=variables,
    )
    _running.add(process)
    try:
        output, errors = process.communicate(request)
    finally:
        _running.discard(process)
    return Finished(process.returncode, output, errors)


def kill_running() -> None:
    """End the children that are at work; for a process that is about to end itself."""
    for process in list(_running):
        process.kill()
