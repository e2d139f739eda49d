"""Merge the adapter into the base model: 16-bit weights out, float32 sums on the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune_trainer.base_model.loading import load_model, use_available_cpus
from finetune_trainer.base_model.tokenizer import end_of_turn_ids, load_tokenizer
from finetune_trainer.outcome import Reason, StageError

FLOAT16_SAFE = 60_000.0  # float16 ends at 65,504; quantizers need some room
SHARD_SIZE = "5GB"

log = logging.getLogger(__name__)


def merge(base: Path, adapter: Path, target: Path, *, trust_remote_code: bool = False) -> None:
    """Write the merged model with the adapter's tokenizer to the folder `target`.

    The base is read again in its own precision: merging into the 4-bit weights that QLoRA trains
    on would lose accuracy. Raises StageError when the adapter changed nothing.
    """
    use_available_cpus()
    model = load_model(base, "auto", "cpu", trust_remote_code=trust_remote_code)
    tuned = PeftModel.from_pretrained(model, adapter)
    changed, targets = add_deltas(tuned)
    log.info("Merged the adapter into %d layers, %d of them changed", targets, changed)
    if not changed:
        raise StageError(
            Reason.QUALITY_GATE_FAILED,
            "The merged model equals the base model, so the training changed nothing: raise "
            "spec.training.learningRate or epochs.",
        )
    merged: PreTrainedModel = cast("Any", tuned).unload()
    store_type = storage_dtype(merged)
    cast("torch.nn.Module", merged).to(store_type)
    tokenizer = load_tokenizer(adapter, trust_remote_code=trust_remote_code)
    merged.generation_config = stopping_config(merged, tokenizer)
    merged.save_pretrained(target, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors are saved for their owner only


def add_deltas(tuned: PeftModel) -> tuple[int, int]:
    """Add B·A·(alpha/r) to each target's weight; how many changed, and how many there are.

    Layer by layer, so that only one of them is ever held in float32 beside the model.
    """
    changed = targets = 0
    for module in tuned.modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = cast("torch.nn.Linear", module.get_base_layer()).weight
        for name in module.active_adapters:
            delta = cast("Any", module).get_delta_weight(name).float()
            total = (weight.data.float() + delta).to(weight.dtype)
            if not torch.isfinite(total).all():
                raise StageError(
                    Reason.QUALITY_GATE_FAILED,
                    "The adapter holds values that are not finite: lower "
                    "spec.training.learningRate and train again.",
                )
            changed += not torch.equal(total, weight.data)
            weight.data = total
        targets += 1
    return changed, targets


def storage_dtype(model: PreTrainedModel) -> torch.dtype:
    """A 16-bit model keeps its type; of a float32 one, float16 keeps more digits if all fit."""
    if model.dtype in (torch.bfloat16, torch.float16):
        return model.dtype
    largest = max(float(p.data.abs().max()) for p in model.parameters() if p.numel())
    return torch.float16 if largest < FLOAT16_SAFE else torch.bfloat16


def stopping_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base model's generation settings, with every token that the template ends turns with."""
    config = model.generation_config or GenerationConfig()  # type: ignore[no-untyped-call]
    known = config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    for token in (tokenizer.eos_token_id, *sorted(end_of_turn_ids(tokenizer))):
        if token not in ends:
            ends.append(token)
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    return config


def parameters_dtype(folder: Path) -> str:
    """The type that a saved model's weights have, as config.json names it."""
    return str(json.loads((folder / "config.json").read_text())["dtype"])
