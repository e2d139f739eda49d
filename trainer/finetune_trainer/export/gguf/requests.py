"""What the programs that write GGUF files read from standard input, and the names in a file that
passes between two of them. It imports neither torch nor llama.cpp, which only some of them need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from finetune_trainer.contract import Base, Quantization
from finetune_trainer.model import ModelFolder

INPUT_SUMS, INPUT_COUNTS = ".in_sum2", ".counts"
"""What the names of an importance matrix's tensors end with, as llama.cpp's imatrix tool has it."""


class ConvertRequest(Base):
    """For convert_worker."""

    llama: Path
    """Folder of llama.cpp's converter."""

    base: Path
    adapter: Path | None
    folder: Path
    """Folder with configuration and tokenizer."""

    target: Path
    kind: Annotated[Quantization, Field(alias="type")]
    name: str
    begins_with_bos: bool
    threads: int


class QuantizeRequest(Base):
    """For quantize_worker."""

    source: Path
    target: Path
    kind: Quantization
    threads: int
    buffer_bytes: int
    """For the rows that llama.cpp has in work at a time."""

    importance: Path | None
    """An importance matrix."""


class ImportanceRequest(Base):
    """For importance."""

    base: ModelFolder
    adapter: Path | None
    file: Path
    """A GGUF file of the model without quantization, whose names are used."""

    chunks: tuple[tuple[int, ...], ...]
    """Tokens to run the model over."""

    chunk_tokens: int
    """The most that a chunk has."""

    target: Path
