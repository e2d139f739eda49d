"""Plain: merge with PEFT, and save."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def merge(folder: str) -> None:
    """The few lines of the guides."""
    base, adapter, merged = (str(Path(folder) / name) for name in ("base", "adapter", "merged"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    tuned: Any = PeftModel.from_pretrained(model, adapter)
    tuned.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(merged)


if __name__ == "__main__":
    merge(*sys.argv[1:])
