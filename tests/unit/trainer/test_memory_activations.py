"""What a layer keeps for the backward pass, against what autograd really saves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.contract import Lora, TargetModule
from finetune_trainer.memory.predict import (
    Kept,
    Recipe,
    adapted_experts,
    kept_by_layer,
    predict,
    recomputed_layers,
    scores,
    weights,
)
from finetune_trainer.model.adapter import lora_config
from finetune_trainer.model.shape import Shape
from finetune_trainer.train.recipe.lora import fuse_adapters, make_layers_faster

TOKENS = 512
FUSED = "bfloat16, adapters as one operation"
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


EXPERTS, ACTIVE = 8, 3
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 40, "num_experts": EXPERTS},
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "attention_bias": True},
}
for _mixture in MIXTURES.values():
    _mixture["num_experts_per_tok"] = ACTIVE
ADAPTED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def saved(
    kind: str,
    layers: int,
    lora: Lora | None,
    *,
    bfloat16: bool,
    trimmed: bool,
    fused: bool = False,
    attention: str = "sdpa",
    counted: Callable[[Sequence[int]], bool] = lambda shape: TOKENS in shape,
) -> int:
    """Bytes that autograd saves in a forward pass, parameters apart; without `lora` of a model that
    is trained itself, in float32."""
    widths = {**WIDTHS, **MIXTURES.get(kind, {})}
    settings = AutoConfig.for_model(kind, **widths, num_hidden_layers=layers)
    settings._attn_implementation = attention
    tuned = model = AutoModelForCausalLM.from_config(settings)  # type: ignore[no-untyped-call] # transformers
    if lora is not None:
        model = model.to(torch.bfloat16) if bfloat16 else model
        tuned = get_peft_model(model, lora_config(lora, model))
    if trimmed:
        make_layers_faster(tuned)
    if fused:
        assert fuse_adapters(tuned, "cpu")
    parameters = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Casts of weights are counted with the adapter: they do not grow with the tokens.
        if storage.data_ptr() not in parameters and counted(tensor.shape):
            kept[storage.data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    ids = torch.zeros((1, TOKENS), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        tuned(input_ids=ids, logits_to_keep=1, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["float32", "bfloat16", "bfloat16, PEFT as it is", FUSED])
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


def test_layers_that_are_not_computed_again_keep_theirs_and_change_no_bit() -> None:
    """transformers' own `every_n_layers`, with dropout, whose numbers have to come again."""
    lora, layers = Lora(r=8), 4
    found = {every: gradients_and_bytes(lora, layers, every) for every in (None, 1, 2, 4)}
    plain, _ = found[None]
    assert any(gradient.any() for gradient in plain.values())
    for gradients, _ in found.values():
        assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    kept = {every: size for every, (_, size) in found.items()}
    assert kept[1] < kept[2] < kept[4] < kept[None]
    shape = Shape.from_config({"model_type": "llama", **WIDTHS, "num_hidden_layers": layers})
    assert shape is not None
    recipe = Recipe(lora, compute=4, mask=4, kept=Kept.INPUTS)
    counts = {
        every: recomputed_layers(shape, replace(recipe, recompute_every=every))
        for every in (1, 2, 4)
    }
    assert counts == {1: 4, 2: 2, 4: 1}
    a_layer = (kept[4] - kept[2]) / (counts[2] - counts[4]) / TOKENS
    # A layer's input is kept in either case, and not counted twice here.
    assert kept_by_layer(shape, recipe) == pytest.approx(a_layer, rel=0.05)


def gradients_and_bytes(
    lora: Lora, layers: int, every: int | None
) -> tuple[dict[str, torch.Tensor], int]:
    """Of a forward and a backward pass, in float32; None: without gradient checkpointing."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model("llama", **WIDTHS, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(settings)  # type: ignore[no-untyped-call] # transformers
    tuned = get_peft_model(model, lora_config(lora, model)).train()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    if every:
        model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if TOKENS in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(TOKENS)[None] % WIDTHS["vocab_size"]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return {n: w.grad for n, w in tuned.named_parameters() if w.grad is not None}, size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["float32", "bfloat16"])
def test_a_layer_that_is_trained_itself_keeps_the_inputs_of_its_weights(
    kind: str, how: str
) -> None:
    bfloat16 = how == "bfloat16"
    two, three = (saved(kind, n, None, bfloat16=bfloat16, trimmed=False) for n in (2, 3))
    shape = Shape.from_config({"model_type": kind, **WIDTHS, "num_hidden_layers": 2})
    assert shape is not None
    recipe = Recipe(Lora(), full=True, compute=2 if bfloat16 else 4, kept=Kept.ALL)
    assert kept_by_layer(shape, recipe) == pytest.approx((three - two) / TOKENS, rel=0.03)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("how", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["attention", "experts", "one of their matrices", "all weights"])
def test_a_mixture_keeps_what_each_of_a_tokens_experts_does(kind: str, how: str, what: str) -> None:
    bfloat16, full = how == "bfloat16", what == "all weights"
    named = {"experts": ADAPTED, "one of their matrices": ADAPTED[1:]}.get(what, ())
    lora = Lora(r=8, dropout=0, target_parameters=named)

    def counted(shape: Sequence[int]) -> bool:
        pairs = TOKENS * ACTIVE
        return TOKENS in shape or pairs in shape or (len(shape) == 3 and shape[0] == EXPERTS)

    two, three = (
        saved(
            kind,
            layers,
            None if full else lora,
            bfloat16=bfloat16,
            trimmed=bfloat16 and not full,
            attention="eager" if kind == "gpt_oss" else "sdpa",
            counted=counted,
        )
        for layers in (2, 3)
    )
    shape = mixture(kind, layers=3)
    recipe = Recipe(
        lora, full=full, compute=2 if bfloat16 else 4, mask=2, kept=Kept.ALL, casts=False
    )
    kept = kept_by_layer(shape, recipe) * TOKENS + scores(shape, recipe, TOKENS) / 4
    two_layers = replace(shape, layers=2)
    kept += adapted_experts(shape, recipe) - adapted_experts(two_layers, recipe)
    assert kept == pytest.approx(three - two, rel=0.03)


def test_memory_of_a_mixture_by_hand() -> None:
    """QLoRA holds attention in 4 bits and experts in 16; adapters of experts need room for them."""
    shape = mixture("mixtral", layers=2)
    attention, experts = 2 * 96 * (2 * 192 + 2 * 64), 2 * EXPERTS * 3 * 96 * 224
    rest = 2 * 256 * 96 + 2 * (2 * 96 + EXPERTS * 96) + 96
    plain = Lora(dropout=0)
    four = Recipe(plain, quantized=True)
    assert weights(shape, Recipe(plain)) == 2 * (attention + experts + rest)
    unpacked = 2 * 96 * 192
    held = 0.516 * attention + 2 * experts + 2 * rest + unpacked
    assert weights(shape, four) == pytest.approx(held)
    adapted = Lora(dropout=0, target_parameters=ADAPTED)
    room = {
        kept: predict(shape, Recipe(adapted, kept=kept), 1).activations
        - predict(shape, Recipe(plain, kept=kept), 1).activations
        for kept in (Kept.ALL, Kept.INPUTS)
    }
    # A layer that is computed again keeps its sums for itself alone.
    assert room[Kept.ALL] - room[Kept.INPUTS] == pytest.approx(2 * experts / 2, rel=0.03)
    assert room[Kept.INPUTS] > 2 * experts / 2


def mixture(kind: str, layers: int) -> Shape:
    widths = {**WIDTHS, **MIXTURES[kind], "num_hidden_layers": layers}
    found = Shape.from_config({"model_type": kind, **widths, "tie_word_embeddings": False})
    assert found is not None
    assert (found.experts, found.active) == (EXPERTS, ACTIVE)
    return found


def compare(kind: str, how: str, lora: Lora) -> None:
    bfloat16, fused = how != "float32", how == FUSED
    trimmed = fused or how == "bfloat16"
    two, three = (
        saved(kind, n, lora, bfloat16=bfloat16, trimmed=trimmed, fused=fused) for n in (2, 3)
    )
    shape = Shape.from_config({"model_type": kind, **WIDTHS, "num_hidden_layers": 2})
    assert shape is not None
    recipe = Recipe(
        lora,
        compute=2 if bfloat16 else 4,
        mask=2 if trimmed else 4,
        kept=Kept.ALL,
        casts=not trimmed,
        redraws=fused,
    )
    # The rest is attention's log-sum-exp and the norms' means: a number a token and head.
    assert kept_by_layer(shape, recipe) == pytest.approx((three - two) / TOKENS, rel=0.03)
