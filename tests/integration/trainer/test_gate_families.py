"""Nothing clean is refused: files of the families' architectures and kinds of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune_trainer.contract import Quantization
from finetune_trainer.export.reference import compute
from tests.integration.trainer.tuned import make_tuned

FAMILIES = ("gemma-2", "gemma-3", "mistral", "phi-3", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_a_clean_model_pass(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, whose libraries are loaded; test_gate starts the one of its own.
    monkeypatch.setattr(compute, "_ask", compute._answer)
    tuned = make_tuned(family, tmp_path / "tuned", torch.bfloat16)
    gate = tuned.gate(tmp_path / "gate")
    for kind in (tuned.own, Quantization.Q8_0, Quantization.Q4_K_M):
        check = gate.check(tuned.file(kind), kind)
        assert check.problems == ()
        assert check.quality is not None
