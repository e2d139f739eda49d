"""How a command ends when it can't do what was asked: one line, a remedy, and an exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `finetune`; docs/cli.md explains each."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    UNREACHABLE = 5
    TIMED_OUT = 6
    SUSPENDED = 7
    INTERRUPTED = 130


class CliError(Exception):
    """What stands in the way, and what to do about it."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
