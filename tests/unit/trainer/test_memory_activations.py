"""What a layer keeps for the backward pass, against what autograd really saves."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.contract import Lora, TargetModule
from finetune_trainer.memory.predict import Kept, Recipe, kept_by_layer, scores
from finetune_trainer.model.adapter import lora_config
from finetune_trainer.model.shape import Shape
from finetune_trainer.train.recipe.lora import make_layers_faster

TOKENS = 512
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
WIDTHS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}


def saved(
    kind: str, layers: int, lora: Lora, *, bfloat16: bool, trimmed: bool, attention: str = "sdpa"
) -> int:
    """Bytes that autograd saves in a forward pass, parameters apart."""
    settings = AutoConfig.for_model(kind, **WIDTHS, num_hidden_layers=layers)
    settings._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(settings)  # type: ignore[no-untyped-call] # transformers
    model = model.to(torch.bfloat16) if bfloat16 else model
    tuned = get_peft_model(model, lora_config(lora, model))
    if trimmed:
        make_layers_faster(tuned)
    parameters = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Casts of weights are counted with the adapter: they do not grow with the tokens.
        if storage.data_ptr() not in parameters and TOKENS in tensor.shape:
            kept[storage.data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    ids = torch.zeros((1, TOKENS), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        tuned(input_ids=ids, logits_to_keep=1, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["float32", "bfloat16", "bfloat16, PEFT as it is"])
@pytest.mark.parametrize("dropout", [0.05, 0.0])
@pytest.mark.parametrize("targets", [4, 7], ids=["attention", "all linear layers"])
def test_a_layer_keeps_what_autograd_saves(
    kind: str, how: str, dropout: float, targets: int
) -> None:
    compare(kind, how, Lora(r=8, dropout=dropout, target_modules=tuple(TargetModule)[:targets]))


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("how", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.05, 0.0])
def test_dora_keeps_outputs_as_well(kind: str, how: str, dropout: float) -> None:
    compare(kind, how, Lora(r=8, dropout=dropout, use_dora=True))


@pytest.mark.parametrize("how", ["float32", "bfloat16"])
def test_attention_that_caps_its_scores_keeps_them(how: str) -> None:
    """Gemma 2's, as it is loaded: eager."""
    lora, bfloat16 = Lora(r=8, dropout=0), how == "bfloat16"
    two, three = (
        saved("gemma2", n, lora, bfloat16=bfloat16, trimmed=True, attention="eager") for n in (2, 3)
    )
    shape = Shape.from_config({"model_type": "gemma2", **WIDTHS, "num_hidden_layers": 3})
    assert shape is not None
    assert shape.capped
    recipe = Recipe(lora, compute=2 if bfloat16 else 4, kept=Kept.ALL, casts=False)
    # Three layers keep theirs, and a fourth share is for the gradient of one.
    in_layer = scores(shape, recipe, TOKENS) / 4
    kept = kept_by_layer(shape, recipe) * TOKENS + in_layer
    assert in_layer > 0.3 * kept
    assert kept == pytest.approx(three - two, rel=0.05)


def compare(kind: str, how: str, lora: Lora) -> None:
    bfloat16, trimmed = how != "float32", how == "bfloat16"
    two, three = (saved(kind, n, lora, bfloat16=bfloat16, trimmed=trimmed) for n in (2, 3))
    shape = Shape.from_config({"model_type": kind, **WIDTHS, "num_hidden_layers": 2})
    assert shape is not None
    recipe = Recipe(
        lora,
        compute=2 if bfloat16 else 4,
        mask=2 if trimmed else 4,
        kept=Kept.ALL,
        casts=not trimmed,
    )
    # The rest is attention's log-sum-exp and the norms' means: a number a token and head.
    assert kept_by_layer(shape, recipe) == pytest.approx((three - two) / TOKENS, rel=0.03)
