"""An adapter of experts becomes models that pass the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import GateReport, Quantization, RunConfig
from finetune_trainer.export import gate as gate_module
from finetune_trainer.export.gate.rows import ExampleFiles
from finetune_trainer.export.inputs import ExportContext, open_tuned_model
from finetune_trainer.export.pipeline import make_models
from finetune_trainer.model import ModelFolder
from finetune_trainer.runtime.reporter import Reporter
from tests.integration.trainer.test_experts import adapted, make
from tests.integration.trainer.tuned import EXAMPLES


def context_of(base: Path, adapter: Path, place: Path, **export: Any) -> ExportContext:
    """An export of base and adapter, which measures on EXAMPLES."""
    rows, result = place / "rows.jsonl", place / "result"
    rows.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    config = RunConfig.model_validate(
        {
            "model": {"source": str(base)},
            "dataset": {"source": str(rows)},
            "output": {"uri": str(place / "out")},
            "export": export,
        }
    )
    result.mkdir()
    return ExportContext(
        config=config,
        model=open_tuned_model(config, ModelFolder(base), adapter, result / "merged"),
        examples=ExampleFiles(rows, rows),
        result=result,
        workspace=place,
        add_file=lambda *_, **__: None,
        reporter=Reporter(),
    )


def test_experts_with_an_adapter_become_gguf(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the merge, llama.cpp's converter and the gate, which sees what the adapter does."""
    monkeypatch.setattr(gate_module, "SAMPLE_TOKENS", 4)
    base = make("qwen3_moe", tmp_path / "base", 49152)
    adapter = adapted(base, tmp_path / "adapter")
    for folder in (base, adapter):
        for file in (*tiny_model.glob("*token*"), tiny_model / "chat_template.jinja"):
            (folder / file.name).symlink_to(file)
    gate: GateReport = make_models(context_of(base, adapter, tmp_path, merged=True, gguf=["BF16"]))
    (checked,) = gate.files  # llama.cpp has no file of such an adapter alone
    assert checked.quantization is Quantization.BF16
    for verdict in (checked, gate.merged):
        assert verdict is not None
        assert verdict.problems == ()
        assert verdict.quality is not None
        assert verdict.quality.kl_divergence < 0.002
    assert gate.samples
    assert all(sample.base is None and sample.tuned is not None for sample in gate.samples)
