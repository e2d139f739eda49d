"""Tiny models of the families that people fine-tune, as their publishers' folders look.

Weights are random, also norms and biases, so that each of them counts. Chat templates and kinds of
tokenizers are the families' own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig

from tests.integration.trainer.architectures import in_dtype, random_model
from tests.integration.trainer.vocabularies import (
    DATA,
    FLAGS,
    GEMMA,
    LLAMA3,
    MISTRAL,
    PHI3,
    PHI4,
    QWEN,
    SMOLLM2,
    Vocabulary,
    add_special,
    fast,
    sentencepiece_of,
)

SMALL: dict[str, Any] = {
    # Large vocabularies, narrow layers.
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
WIDE: dict[str, Any] = {
    # Wide enough for K-quants, whose blocks have 256 values.
    **SMALL,
    "hidden_size": 256,
    "intermediate_size": 256,
    "initializer_range": 0.1,
}
MIXED = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}


@dataclass(frozen=True)
class Family:
    """A family's architecture and the files that surround it."""

    kind: str
    """model_type."""

    vocabulary: Vocabulary
    template: str
    """The chat template: a file in tests/data/chat_templates, or its text."""

    shape: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None
    """Of the tower that reads images, which this project leaves as it is."""


PHI4_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>'"
    " + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

EACH_CHANGE = ("llama-3.2", "gemma-3", "phi-4")
"""Families that every run of the tests takes through the whole pipeline: with a plain vocabulary,
with SentencePiece's, and with fused layers. A release takes all."""

FAMILIES: dict[str, Family] = {
    "llama-3": Family("llama", LLAMA3, "llama3", {**SMALL, "tie_word_embeddings": False}),
    "llama-3.2": Family(
        "llama",
        LLAMA3,
        "llama3",
        {
            **SMALL,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen2.5": Family("qwen2", QWEN, "chatml", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": Family(
        "qwen3", QWEN, "chatml", {**SMALL, "head_dim": 32, "tie_word_embeddings": False}
    ),
    "gemma-2": Family(
        "gemma2",
        GEMMA,
        "gemma",
        {
            **WIDE,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma-3": Family(
        "gemma3_text",
        GEMMA,
        "gemma",
        {**WIDE, **MIXED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8},
    ),
    "gemma-3-vision": Family(
        "gemma3",
        GEMMA,
        "gemma",
        {**WIDE, **MIXED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8},
        vision={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
    "mistral": Family("mistral", MISTRAL, "mistral", {**WIDE, "sliding_window": None}),
    "qwen3-moe": Family(
        "qwen3_moe",
        QWEN,
        "chatml",
        {
            **SMALL,
            "head_dim": 32,
            "tie_word_embeddings": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": Family(
        "mixtral", MISTRAL, "mistral", {**WIDE, "sliding_window": None, "num_local_experts": 4}
    ),
    "gpt-oss": Family(
        "gpt_oss",
        SMOLLM2,
        "chatml",
        {
            **SMALL,
            "intermediate_size": 96,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 128,
            "tie_word_embeddings": False,
        },
    ),
    "phi-3": Family("phi3", PHI3, "phi3", {**WIDE, "sliding_window": 511}),
    "phi-4": Family("phi3", PHI4, PHI4_TEMPLATE, {**SMALL, "sliding_window": None}),
    "smollm2": Family("llama", SMOLLM2, "chatml", {**SMALL, "tie_word_embeddings": True}),
    "smollm3": Family(
        "smollm3",
        SMOLLM2,
        "chatml",
        {**SMALL, "num_hidden_layers": 4, "tie_word_embeddings": True},
    ),
}


def write_family(family: Family, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A base model's folder: configuration, weights, tokenizer and template; always the same."""
    torch.manual_seed(0)
    model = random_model(configuration(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    in_dtype(model, dtype).save_pretrained(folder)
    write_tokenizer(family, folder)
    return folder


def configuration(family: Family) -> Any:
    """config.json."""
    vocabulary, ids = family.vocabulary, family.vocabulary.special
    named = {
        f"{name}_token_id": ids[vocabulary.settings[f"{name}_token"]]
        for name in ("bos", "eos", "pad")
        if f"{name}_token" in vocabulary.settings
    }
    defaults = {"bos_token_id": None, "pad_token_id": None}
    text = {"vocab_size": vocabulary.rows, **defaults, **named, **family.shape}
    if family.vision is None:
        return AutoConfig.for_model(family.kind, **text)
    return AutoConfig.for_model(
        family.kind, text_config=text, vision_config=family.vision, mm_tokens_per_image=4, **named
    )


def write_tokenizer(family: Family, folder: Path) -> None:
    """tokenizer.json, its configuration, and the SentencePiece model where there is one."""
    vocabulary = family.vocabulary
    folder.mkdir(parents=True, exist_ok=True)
    if vocabulary.part:
        tokenizer = Tokenizer.from_file(str(DATA / "tokenizers" / f"{vocabulary.part}.json"))
    else:
        pieces = sentencepiece_of(vocabulary)
        (folder / "tokenizer.model").write_bytes(pieces)
        tokenizer = fast(pieces, vocabulary)
    add_special(tokenizer, vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    file = DATA / "chat_templates" / f"{family.template}.jinja"
    template = family.template if "{" in family.template else file.read_text(encoding="utf-8")
    added = {
        str(number): {
            **FLAGS,
            "content": token,
            "special": True,
            "rstrip": token in vocabulary.strips,
        }
        for token, number in vocabulary.special.items()
    }
    settings = {
        **vocabulary.settings,
        "added_tokens_decoder": added,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
