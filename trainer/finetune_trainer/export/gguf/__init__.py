"""GGUF files: the merged model in 16 bits, quantizations of it, and the adapter alone.

files            all of them, each when it is complete; their names, and which to serve
quantize_worker  llama.cpp's quantizer; a program of its own
importance       which weights a quantization should spare, measured on training rows
header           the header of a GGUF file

Below are the requests to the programs, and names in a file that passes between two of them. They
import neither torch nor llama.cpp, which only some of the programs need.
"""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.contract import Base, Quantization
from finetune_trainer.model import ModelFolder

MODELFILE = "Modelfile"  # names the preferred file

INPUT_SUMS, INPUT_COUNTS = ".in_sum2", ".counts"
"""What the names of an importance matrix's tensors end with, as llama.cpp's imatrix tool has it."""


class QuantizeRequest(Base):
    source: Path
    target: Path
    kind: Quantization
    threads: int
    buffer_bytes: int
    """For the rows that llama.cpp has in work at a time."""

    importance: Path | None
    """An importance matrix."""


class ImportanceRequest(Base):
    base: ModelFolder
    adapter: Path | None
    file: Path
    """A GGUF file of the model without quantization, whose names are used."""

    chunks: tuple[tuple[int, ...], ...]
    """Tokens to run the model over."""

    chunk_tokens: int
    """The most that a chunk has."""

    target: Path
