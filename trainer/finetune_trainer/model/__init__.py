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

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk as transformers reads it; maybe its configuration and tokenizer alone."""

    path: Path
    trust_remote_code: bool = False
    """Whether Python code that came with the model may run (spec.model.trustRemoteCode)."""
