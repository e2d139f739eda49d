"""The base model: finding it, fetching it, loading it, and what llama.cpp makes of it.

base_model    a Hub repository, a folder in a bucket or on disk; revision, files, the Hub's errors
prequantized  what is published in fewer than 16 bits, planned in 16 bits
widening      its values in 16 bits, by a process of its own
shape         widths and parameter counts, from config.json
adapter       which layers get an adapter, and what its file holds
tokenizer     loading it, and how a conversation becomes tokens and labels
rendering     the chat template: messages to text
loading       the model in memory, and the machine that it is in
converter     llama.cpp's converter to GGUF, and its rehearsal before any weights are fetched
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from finetune_trainer.contract import MODEL_CACHE


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk as transformers reads it; maybe its configuration and tokenizer alone."""

    path: Path
    trust_remote_code: bool = False
    """Whether Python code that came with the model may run (spec.model.trustRemoteCode)."""


@dataclass(frozen=True)
class ModelCache:
    """A folder on a volume where base models stay, for all stages of all jobs that mount it.

    Models of the Hub lie there as its client keeps them, which locks what it writes. Those of
    buckets lie below `folders`, by revision. A file gets its name when it is whole, so that jobs
    may write at the same time.
    """

    root: Path

    @classmethod
    def found(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """The one that the operator mounted, if there is one."""
        root = environment.get(MODEL_CACHE)
        return cls(Path(root)) if root and Path(root).is_dir() else None

    @property
    def writable(self) -> bool:
        """Whether models may be brought here."""
        return os.access(self.root, os.W_OK | os.X_OK, effective_ids=True)

    def folder(self, revision: str) -> Path:
        """Where the files of one revision of a bucket's model lie."""
        return self.root / "folders" / revision.replace(":", "-")


def holds(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Whether the files are there, each with its size."""
    return all(size_of(folder / name) == size for name, size in sizes.items())


def size_of(file: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return file.stat().st_size
    except OSError:
        return None
