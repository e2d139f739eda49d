"""What can go wrong while a cluster is brought up, in words that a user can act on."""

from __future__ import annotations

from pathlib import Path


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
