"""Nothing clean is refused: files of the families' architectures and kinds of tokenizer."""

from __future__ import annotations

import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune_trainer.contract import Quantization
from finetune_trainer.export.gguf.header import Header
from finetune_trainer.export.reference import float32
from finetune_trainer.model.tokenizer import message_pair
from tests.integration.trainer.faulty_gguf import overwrite
from tests.integration.trainer.tuned import make_tuned, open_gate

NOT_NORMALISED = [
    message_pair("How large is the resistor?", "It has 10 \N{OHM SIGN}."),
    message_pair("How do you say that?", unicodedata.normalize("NFD", "Tiếng Việt")),
]
"""Characters that some tokenizers compose, and llama.cpp doesn't."""

NORMALISED = dict.fromkeys(("qwen3", "qwen3-moe"), ("row 7", "row 8"))
FAMILIES = ("gemma-2", "gemma-3", "gpt-oss", "mistral", "phi-3", "qwen3", "qwen3-moe")

WITH_EXPERTS = ("gpt-oss", "qwen3-moe")


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.every_family] * (f == "gpt-oss")) for f in FAMILIES],
)
def test_files_of_a_clean_model_pass(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, whose libraries are loaded; test_gate starts the one of its own.
    monkeypatch.setattr(float32, "measure_in_child", float32.measure_here)
    tuned = make_tuned(family, tmp_path / "tuned", torch.bfloat16)
    inputs = tuned.inputs(merged=True)
    rows = [*inputs.examples, *NOT_NORMALISED]
    gate = open_gate(replace(inputs, examples=rows), tmp_path / "gate")
    if family in WITH_EXPERTS:
        swapped = Path(shutil.copy(tuned.file(tuned.own), tmp_path / "swapped.gguf"))
        swap_experts(swapped, "blk.0.ffn_down_exps.weight")
        found = gate.check(swapped, tuned.own).source_verdict
        assert not found.passed
        assert "divergence" in found.problems[0]
    derived = gate.check(tuned.file(tuned.own), tuned.own)
    kinds = (Quantization.Q8_0, Quantization.Q4_K_M)
    checked = [derived.check(tuned.file(kind), kind) for kind in kinds]
    for verdict in (gate.check_merged(tuned.own), derived.source_verdict, *checked):
        assert verdict is not None
        assert verdict.problems == ()
        assert verdict.quality is not None
    left_out = NORMALISED.get(family, ())
    assert derived.report().rows == len(rows) - len(left_out)
    assert [all(row in said for row in left_out) for said in derived.notices] == [True] * bool(
        left_out
    )


def swap_experts(file: Path, name: str) -> None:
    """Let the first two experts of a layer change places."""
    with Header(file) as header:
        tensor = header.tensors[name]
        experts = np.frombuffer(header.contents(name), np.uint8).reshape(tensor.shape[-1], -1)
    swapped = experts[[1, 0, *range(2, len(experts))]].tobytes()
    assert swapped != experts.tobytes()
    overwrite(file, tensor.offset, swapped)
