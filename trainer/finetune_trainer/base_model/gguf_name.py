"""What a GGUF file calls its model, which for one family decides on its tokens."""

from __future__ import annotations

import json
from pathlib import Path

MARKS = ("phi-3", "phi3")  # what llama.cpp looks for in general.name (llama-vocab.cpp)


def gguf_name(name: str, folder: Path) -> str:
    """The model's name, as it has to be for llama.cpp to read text as the training did.

    Phi-3's special tokens swallow the white space behind them (rstrip). GGUF has no field for that;
    llama.cpp goes by the name. `folder` has the model's config.json and tokenizer.
    """
    known = any(mark in name.lower() for mark in MARKS)
    return name if known or not _swallows_space(folder) else f"{name} (Phi-3)"


def _swallows_space(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_bytes())
    file = folder / "tokenizer.json"
    if config.get("model_type") != "phi3" or not file.is_file():
        return False
    added = json.loads(file.read_bytes()).get("added_tokens", [])
    return any(token.get("special") and token.get("rstrip") for token in added)
