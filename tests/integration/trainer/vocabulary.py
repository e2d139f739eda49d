"""A GGUF file that holds configuration and vocabulary, for which no weights are needed."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune_trainer.model import ModelFolder, converter


def write_vocabulary(model: Path, target: Path) -> None:
    """Convert what a folder has but weights."""
    with converter.view_of(ModelFolder(model), "model") as folder:
        command = [sys.executable, str(converter.llama_folder() / converter.SCRIPT), str(folder)]
        converter.run(
            [*command, "--outfile", str(target), "--vocab-only"], model=ModelFolder(model)
        )
