"""SHA256SUMS, as `sha256sum -c SHA256SUMS` reads it."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_trainer.outcome import Artifact

SHA256SUMS = "SHA256SUMS"


def sha256sums(artifacts: Iterable[Artifact]) -> bytes:
    """One line for each file, sorted by path."""
    return "".join(sorted((_line(item) for item in artifacts), key=_path)).encode()


def _line(item: Artifact) -> str:
    """Two spaces mean text mode, which is the same as binary mode on Linux and macOS."""
    escaped = item.path.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{'' if escaped == item.path else chr(92)}{item.sha256}  {escaped}\n"


def _path(line: str) -> str:
    return line.partition("  ")[2]
