"""Which of several workers this is, asked without torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# What gloo and NCCL say in the processes that are left.
_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistBackendError",
    "DistNetworkError",
)


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that reports and saves."""
    return os.environ.get("RANK", "0") == "0"


def is_echo(error: BaseException) -> bool:
    """Whether the error only says that another process of the training is gone."""
    text = f"{type(error).__name__}: {error}"
    return world_size() > 1 and any(sign in text for sign in _ECHOES)


def write_first(file: Path, text: str) -> None:
    """Write the file unless another process already did: the first to fail gives the reason."""
    own = file.with_name(f"{file.name}.{os.getpid()}")
    own.write_text(text, encoding="utf-8")
    with suppress(FileExistsError):
        os.link(own, file)
    own.unlink()
