"""Held-out rows for the gate, and the same rows as plain text for llama-perplexity."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.texts import variable
from finetune_trainer.model.rendering import render_example
from finetune_trainer.model.tokenizer import encode

NUMBER, LONGEST = 64, 512


def write(folder: str) -> None:
    """rows.jsonl and rows.txt: both sides measure on the same rows."""
    place = Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    rows = variable(NUMBER, lambda row: len(encode(tokenizer, row)[0]), LONGEST)
    lines = (json.dumps(row) + "\n" for row in rows)
    (place / "rows.jsonl").write_text("".join(lines))
    (place / "rows.txt").write_text("\n".join(render_example(tokenizer, row) for row in rows))


if __name__ == "__main__":
    write(*sys.argv[1:])
