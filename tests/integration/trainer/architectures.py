"""Tiny random models of the architectures that people fine-tune."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

PACKABLE: dict[str, dict[str, Any]] = {
    "llama": SHAPE,  # SmolLM2 as well
    "qwen2": SHAPE,
    "qwen3": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 8},
    "gemma": SHAPE,
    "gemma2": {**SHAPE, "sliding_window": 8, **MIXED},
    "gemma3_text": {**SHAPE, "sliding_window": 8, **MIXED},
    "phi3": {**SHAPE, "sliding_window": 8},
    "smollm3": SHAPE,
    "granite": SHAPE,
    "olmo2": SHAPE,
}
"""model_type -> configuration, of those whose rows can be packed."""

LEAKING: dict[str, dict[str, Any]] = {
    # Knows no positions but those of the attention mask.
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    # A state goes on from row to row.
    "mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "state_size": 8,
        "chunk_size": 8,
    },
}


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose weights are drawn in float32, always the same one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(PACKABLE | LEAKING)[kind])
    model = in_dtype(random_model(config), dtype)
    model.eval()  # type: ignore[no-untyped-call] # transformers
    return model


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    # transformers gives it no types.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    return model


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in another type; transformers' own `to` has lost its type."""
    return torch.nn.Module.to(model, dtype)
