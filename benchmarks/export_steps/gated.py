"""Ours, whole: base and adapter to checked files, as the export stage does it but for the store."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from finetune_trainer.contract import RunConfig
from finetune_trainer.export.gate.rows import ExampleFiles
from finetune_trainer.export.inputs import ExportContext, open_tuned_model
from finetune_trainer.export.pipeline import make_models
from finetune_trainer.model import ModelFolder
from finetune_trainer.runtime.reporter import Reporter


def gated(folder: str, *kinds: str) -> None:
    """Everything from the merge to the samples; what files show lies in ours/gate.json."""
    place, result = Path(folder), Path(folder, "ours")
    result.mkdir()
    base, rows = ModelFolder(place / "base"), place / "rows.jsonl"
    export = {"gguf": kinds, "verify": "warn"}  # random weights may round badly
    config = RunConfig.model_validate(
        {
            "model": {"source": str(base.path)},
            "dataset": {"source": str(rows)},
            "output": {"uri": str(result)},
            "export": export,
        }
    )
    model = open_tuned_model(config, base, place / "adapter", result / "merged")
    context = ExportContext(
        config=config,
        model=model,
        examples=ExampleFiles(rows, rows),
        result=result,
        workspace=place / "ours",
        add_file=lambda *_, **__: None,
        reporter=Reporter(),
    )
    gate = make_models(context)
    files = {each.file: each.quality for each in gate.files}
    said = {name: quality and quality.kl_divergence for name, quality in files.items()}
    (result / "gate.json").write_text(json.dumps({"tokens": gate.tokens, "files": said}))


if __name__ == "__main__":
    gated(*sys.argv[1:])
