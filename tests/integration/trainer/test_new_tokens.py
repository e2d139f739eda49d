"""Tokens that a base model has not learnt: with an embedding that has grown, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.contract import Reason
from finetune_trainer.export.gguf.header import Header
from tests.integration.trainer.conftest import Trainer

TOKEN = "<|step|>"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def spec(run_config: dict[str, Any], tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A job whose answers and tokenizer have a new token, and the model not yet."""
    base, data = tmp_path / "base", tmp_path / "steps.csv"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.add_tokens([TOKEN]) == 1
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [f"How is step {number} made?,{TOKEN} by hand {TOKEN}" for number in range(24)]
    data.write_text("\n".join(["instruction,response", *rows]) + "\n")
    return run_config | {
        "model": {"source": str(base)},
        "dataset": {"source": str(data), "evalFraction": 0.25},
        "training": {
            "epochs": 2,
            "learningRate": 0.01,
            "batchSize": 4,
            "lora": {"modulesToSave": ["embed_tokens"]},
        },
        "export": {"gguf": ["F16"]},
        "output": {"uri": str(tmp_path / "out")},
    }


def test_new_tokens_are_learnt_by_an_embedding_that_has_grown(
    trainer: Trainer, spec: dict[str, Any]
) -> None:
    base = Path(spec["model"]["source"])
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    refused = trainer("prepare", spec)
    assert refused.result is not None
    assert refused.result.reason is Reason.MODEL_UNSUPPORTED
    assert f"no embedding for, such as {TOKEN!r} ({size};" in refused.result.message
    assert f"resize_token_embeddings({size + 1})" in refused.result.message

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(size + 1)
    model.save_pretrained(base)
    for stage in ("prepare", "train", "export"):
        done = trainer(stage, spec)
        assert done.code == 0, done.output
        assert done.result is not None
        if done.result.resolved:
            spec["resolved"] = done.result.resolved.model_dump(mode="json")

    assert done.result is not None
    version = Path(spec["output"]["uri"]) / "versions" / str(done.result.version)
    before = load_file(base / "model.safetensors")[EMBEDDING]
    after = load_file(version / "merged" / "model.safetensors")[EMBEDDING]
    assert before.shape[0] == after.shape[0] == size + 1
    assert not after[size].equal(before[size].to(after.dtype)), "the new row is learnt"
    gate = json.loads((version / "manifest.json").read_text())["gate"]
    assert [file["problems"] for file in gate["files"]] == [[]]
    with Header(version / "gguf" / gate["files"][0]["file"]) as header:
        tokens = header.strings("tokenizer.ggml.tokens")
    assert tokens is not None
    assert len(tokens) == size + 1
    assert tokens[size] == TOKEN
