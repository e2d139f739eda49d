"""Base models and adapters that can't be merged: each is named, with what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export import merge
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.model_folder import write_merged
from tests.integration.trainer.adapters import (
    INDEX,
    SINGLE,
    WEIGHTS,
    change,
    change_config,
    save_adapter,
    save_base,
)

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama in bfloat16."""
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of its attention layers."""
    return save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])


def refused(base: Path, adapter: Path, words: str, reason: Reason) -> None:
    """Opening or checking fails for a reason that people understand."""
    with pytest.raises(StageError, match=words) as caught:
        MergedWeights.open(base, adapter).check_changes()
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 6}, "instead of rank 6"),
        ({"lora_alpha": None}, "no lora_alpha"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_kinds_of_adapters(
    base: Path, adapter: Path, fields: dict[str, Any], words: str
) -> None:
    change_config(adapter, **fields)
    refused(base, adapter, words, Reason.MODEL_UNSUPPORTED)


def test_an_adapter_without_a_part(base: Path, adapter: Path) -> None:
    change(adapter / WEIGHTS, lambda tensors: tensors.pop(f"{Q}.lora_B.weight"))
    refused(base, adapter, "lora_B.weight is missing", Reason.MODEL_UNSUPPORTED)


def test_an_adapter_of_embeddings(base: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens"]
    adapter = save_adapter(base, tmp_path / "embedding", target_modules=targets)
    refused(base, adapter, "embed_tokens.lora_embedding_A", Reason.MODEL_UNSUPPORTED)


def test_an_adapter_of_a_tied_output_layer(adapter: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("A", "B"):
            tensors[f"base_model.model.lm_head.lora_{part}.weight"] = tensors.pop(
                f"{Q}.lora_{part}.weight"
            )

    change(adapter / WEIGHTS, rename)
    tied = save_base(tmp_path / "tied", "gemma")
    refused(tied, adapter, "lm_head.*tie_word_embeddings", Reason.MODEL_UNSUPPORTED)


def test_an_adapter_of_another_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Phi 3 has one layer for query, key and value; a module of the Llama is swapped."""
    other = save_base(tmp_path / "other", "phi3")
    words = r"it has no model\.layers\.0\.self_attn\.q_proj\.weight, model\.layers\.1"
    refused(other, adapter, words, Reason.MODEL_UNSUPPORTED)

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("A", "B"):
            name = f"{Q}.lora_{part}.weight"
            tensors[name.replace("self_attn.q_proj", "mlp.up_proj")] = tensors.pop(name)

    change(adapter / WEIGHTS, swap)
    words = r"mlp\.up_proj\.weight has shape \(96, 64\) instead of \(64, 64\)"
    refused(base, adapter, words, Reason.MODEL_UNSUPPORTED)


def test_an_adapter_that_changes_nothing_in_a_module(base: Path, adapter: Path) -> None:
    change(adapter / WEIGHTS, lambda tensors: tensors[f"{Q}.lora_B.weight"].zero_())
    words = r"nothing in 1 of 6 targets \(model\.layers\.0\.self_attn\.q_proj\)"
    refused(base, adapter, words, Reason.QUALITY_GATE_FAILED)


def test_an_adapter_that_is_lost_in_rounding(base: Path, adapter: Path) -> None:
    change(adapter / WEIGHTS, lambda tensors: tensors[f"{Q}.lora_B.weight"].mul_(1e-9))
    refused(base, adapter, "nothing in 1 of 6", Reason.QUALITY_GATE_FAILED)


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_is_not_finite(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: float
) -> None:
    """Also in rows that nobody has to look at to see that the module changes."""
    monkeypatch.setattr(merge, "SPAN_BYTES", 1)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["gate_proj"])
    name = f"base_model.model.model.layers.0.mlp.gate_proj.lora_{part}.weight"
    change(adapter / WEIGHTS, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    refused(base, adapter, "not finite", Reason.QUALITY_GATE_FAILED)


def test_sums_beyond_float16(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float16)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    change(adapter / WEIGHTS, lambda tensors: tensors[f"{Q}.lora_B.weight"][-1].fill_(1e6))
    weights = MergedWeights.open(base, adapter)
    with pytest.raises(StageError, match=r"q_proj\.weight has values beyond 65,504"):
        write_merged(weights, tmp_path / "merged")


@pytest.mark.parametrize("cut", [4, 2000, -1])
def test_a_truncated_adapter(base: Path, adapter: Path, cut: int) -> None:
    file = adapter / WEIGHTS
    file.write_bytes(file.read_bytes()[:cut])
    refused(base, adapter, f"{WEIGHTS} can't be read", Reason.MODEL_UNSUPPORTED)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_an_adapter_without_a_file(base: Path, adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    refused(base, adapter, f"{name} is missing", Reason.MODEL_UNSUPPORTED)


def test_a_damaged_adapter_config(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "LO')
    refused(base, adapter, "no JSON object", Reason.MODEL_UNSUPPORTED)


@pytest.mark.parametrize("cut", [4, 1000, -1])
def test_a_truncated_shard_of_the_base(adapter: Path, tmp_path: Path, cut: int) -> None:
    base = save_base(tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:cut])
    refused(base, adapter, f"{shard.name} can't be read", Reason.MODEL_UNSUPPORTED)


def test_a_base_without_a_shard_or_a_part_of_one(adapter: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted(base.glob("*.safetensors"))[1]
    gone = next(iter(load_file(shard)))
    change(shard, lambda tensors: tensors.pop(gone))
    refused(base, adapter, f"{INDEX} can't be read: it names {gone}", Reason.MODEL_UNSUPPORTED)
    shard.unlink()
    refused(base, adapter, f"{shard.name} can't be read: it is missing", Reason.MODEL_UNSUPPORTED)
    (base / INDEX).write_text("[]")
    refused(base, adapter, "no index of shards", Reason.MODEL_UNSUPPORTED)


def test_a_base_in_pickles_only(base: Path, adapter: Path) -> None:
    (base / SINGLE).unlink()
    torch.save({}, base / "pytorch_model.bin")
    refused(base, adapter, r"pytorch_model\.bin, which could run code", Reason.MODEL_UNSUPPORTED)


def test_a_quantized_base(base: Path, adapter: Path) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    change(base / SINGLE, quantize)
    refused(base, adapter, r"quantized \(float8_e4m3fn\)", Reason.MODEL_UNSUPPORTED)


def test_a_base_without_a_configuration(base: Path, adapter: Path) -> None:
    (base / "config.json").unlink()
    refused(base, adapter, "config.json can't be read: it is missing", Reason.MODEL_UNSUPPORTED)
