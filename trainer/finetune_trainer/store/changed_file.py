"""A file that is not what it was when it was finished."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.contract import Reason, StageError


class ChangedFileError(StageError):
    """A file was altered on disk; the next attempt writes it anew."""

    def __init__(self, source: Path) -> None:
        super().__init__(
            Reason.INTERNAL_ERROR,
            f"{source.name} is not what was written: its bytes on the disk have changed since its "
            "SHA-256 was taken, so it is not uploaded. The stage can be tried again; should it "
            "happen once more, look at the disk and the memory of the node.",
        )


def check_sha256(source: Path, found: str, expected: str | None) -> None:
    """ChangedFileError when a file is not what it was when it was finished."""
    if expected is not None and found != expected:
        raise ChangedFileError(source)
