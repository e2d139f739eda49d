"""The name in a GGUF file, which llama.cpp takes for a property of Phi-3's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_trainer.model.converter import gguf_name


@pytest.mark.parametrize(
    ("kind", "rstrip", "name", "expected"),
    [
        pytest.param("phi3", True, "ours", "ours (Phi-3)", id="a Phi-3 under another name"),
        pytest.param("phi3", True, "Phi-3-mini", "Phi-3-mini", id="that says it already"),
        pytest.param("phi3", False, "phi-4", "phi-4", id="Phi-4, whose tokens swallow nothing"),
        pytest.param("llama", True, "ours", "ours", id="another architecture"),
    ],
)
def test_the_name_that_llama_cpp_needs(
    kind: str, rstrip: bool, name: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    token = {"content": "<|user|>", "special": True, "rstrip": rstrip}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
    assert gguf_name(name, tmp_path) == expected


def test_a_model_without_tokenizer_json_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    assert gguf_name("ours", tmp_path) == "ours"
