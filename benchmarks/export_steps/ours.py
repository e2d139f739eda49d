"""Ours: base and adapter to GGUF files."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune_trainer.contract import Quantization
from finetune_trainer.export.gguf.files import GgufSource, write_files
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.model_folder import assemble, write_merged
from finetune_trainer.model import ModelFolder


def ours(folder: str, *kinds: str) -> None:
    """As the export stage does it."""
    place = Path(folder)
    base, adapter, assembled = place / "base", place / "adapter", place / "assembled" / "model"
    weights = MergedWeights.open(base, adapter)
    weights.check_changes()
    assemble(ModelFolder(base), adapter, assembled, dtype=weights.dtype)
    write_merged(weights, assembled)
    model = GgufSource(
        ModelFolder(base), adapter, ModelFolder(assembled), "model", Quantization.BF16
    )
    for _ in write_files(model, place / "ours", [Quantization(kind) for kind in kinds]):
        pass


if __name__ == "__main__":
    ours(*sys.argv[1:])
