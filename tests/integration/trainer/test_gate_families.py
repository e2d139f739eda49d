"""Nothing clean is refused: files of the families' architectures and kinds of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune_trainer.contract import Quantization
from finetune_trainer.export.reference import float32
from tests.integration.trainer.tuned import make_tuned

FAMILIES = ("gemma-2", "gemma-3", "mistral", "phi-3", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_a_clean_model_pass(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, whose libraries are loaded; test_gate starts the one of its own.
    monkeypatch.setattr(float32, "measure_in_child", float32.measure_here)
    tuned = make_tuned(family, tmp_path / "tuned", torch.bfloat16)
    gate = tuned.gate(tmp_path / "gate")
    derived = gate.check(tuned.file(tuned.own), tuned.own)
    kinds = (Quantization.Q8_0, Quantization.Q4_K_M)
    checked = [derived.check(tuned.file(kind), kind) for kind in kinds]
    for verdict in (derived.source_verdict, *checked):
        assert verdict.problems == ()
        assert verdict.quality is not None
