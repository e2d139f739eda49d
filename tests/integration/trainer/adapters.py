"""Tiny base models and adapters on disk, and PEFT's own merge of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from tests.integration.trainer.architectures import MIXED, SHAPE, in_dtype, tiny

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = "adapter_model.safetensors"


def save_base(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Path:
    """A tiny random model on disk."""
    tiny(kind, dtype).save_pretrained(folder, **options)
    return folder


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter that changes every target."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(**{"r": 5, "target_modules": "all-linear", **options}))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
        elif "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def merge_in_memory(base: Path, adapter: Path, folder: Path) -> Path:
    """PEFT's own merge."""
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    cast("PreTrainedModel", cast("Any", tuned).merge_and_unload()).save_pretrained(folder)
    return folder


def save_renamed(folder: Path, vision: bool) -> Path:
    """A model that transformers renames as it loads it."""
    if not vision:
        save_base(folder)
        tensors = load_file(folder / SINGLE)
        renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
        save_file(renamed, folder / SINGLE, {"format": "pt"})
        return folder
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**SHAPE, "vocab_size": 400, "sliding_window": 8, **MIXED},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=390,
        boi_token_index=391,
        eoi_token_index=392,
    )
    in_dtype(Gemma3ForConditionalGeneration(config), torch.bfloat16).save_pretrained(folder)
    return folder


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edit the tensors of a safetensors file."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **fields}))
