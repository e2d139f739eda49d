"""Adapters as one operation: the same numbers, with less kept; and PEFT's own where they aren't."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.contract import Lora, TargetModule
from finetune_trainer.model.adapter import lora_config
from finetune_trainer.train.recipe.lora import (
    LowRankProduct,
    fuse_adapters,
    make_layers_faster,
)

IDS = torch.arange(96)[None] % 64
LORA: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.3}


def model(recompute_every: int = 0, **lora: Any) -> Any:
    """A small Llama in bfloat16 with an adapter that isn't zero."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        pad_token_id=0,
    )
    base = AutoModelForCausalLM.from_config(settings).to(torch.bfloat16)  # type: ignore[no-untyped-call] # transformers
    chosen = Lora(**{"target_modules": tuple(TargetModule)[:7], **LORA, **lora})
    tuned = get_peft_model(base, lora_config(chosen, base)).train()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    make_layers_faster(tuned)
    if recompute_every:
        base.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=recompute_every)
    return tuned


def loss_and_gradients(tuned: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tuned.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tuned(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {n: w.grad.clone() for n, w in tuned.named_parameters() if w.grad is not None}
    return {"loss": loss.detach(), "next number": torch.rand(()), **gradients}


def share_off(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute_every", [0, 2])
def test_not_a_bit_is_another_where_the_scale_is_a_power_of_two(
    dropout: float, recompute_every: int
) -> None:
    """Neither in loss and gradients nor in the random numbers that come next."""
    plain = model(recompute_every, dropout=dropout)
    fused = copy.deepcopy(plain)
    before = torch.get_rng_state()
    assert fuse_adapters(fused, "cpu")
    assert torch.equal(torch.get_rng_state(), before), "the proof took numbers of the training"
    one, other = loss_and_gradients(fused), loss_and_gradients(plain)
    assert len(other) == 2 + 2 * 7 * 3
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_not_a_bit_is_another_over_weights_in_4_bits() -> None:
    """QLoRA's layer is a class of its own, which PEFT makes where the model says so."""
    torch.manual_seed(0)
    four_bits = Linear4bit(64, 48, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")  # type: ignore[no-untyped-call] # bitsandbytes
    base = torch.nn.Sequential(four_bits)
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["0"])
    tuned: Any = get_peft_model(cast("Any", base.to("cpu")), config).train()
    layer: Any = next(each for each in tuned.modules() if isinstance(each, LoraLayer))
    assert type(layer).__name__ == "Linear4bit"
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    make_layers_faster(tuned)
    x = torch.randn(1, 96, 64, dtype=torch.bfloat16, requires_grad=True)

    def found() -> list[torch.Tensor]:
        torch.manual_seed(1)
        tuned.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            output = tuned(x)
        output.float().pow(2).sum().backward()
        weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return [
            output.detach(),
            cast("Any", x.grad),
            *(cast("Any", w.grad).clone() for w in weights),
        ]

    plain = found()
    assert fuse_adapters(tuned, "cpu")
    assert all(torch.equal(one, other) for one, other in zip(found(), plain, strict=True))
    assert all(each.any() for each in plain)


def test_another_scale_differs_by_its_rounding() -> None:
    plain = model(alpha=7)
    fused = copy.deepcopy(plain)
    assert fuse_adapters(fused, "cpu")
    one, other = loss_and_gradients(fused), loss_and_gradients(plain)
    without_dropout = loss_and_gradients(model(alpha=7, dropout=0))
    assert 0 < share_off(one, other) < 0.1
    assert share_off(without_dropout, other) > 0.5


def test_it_is_left_out_where_it_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the backward pass draws other numbers than the forward pass did."""
    caplog.set_level(logging.INFO)
    state = torch.get_rng_state()
    monkeypatch.setattr(
        "finetune_trainer.train.recipe.lora._generator_state", lambda _: state.clone()
    )
    tuned = model()
    assert not fuse_adapters(tuned, "cpu")
    assert "they are off by" in caplog.text
    assert "Adapters: PEFT's own" in caplog.text
    monkeypatch.setattr(LowRankProduct, "apply", None)
    assert loss_and_gradients(tuned)["loss"] > 0


def test_what_is_no_plain_adapter_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fuse_adapters(model(use_dora=True), "cpu")
    tuned = model()
    assert fuse_adapters(tuned, "cpu")
    calls: list[str] = []
    forward = LowRankProduct.forward

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append("")
        return forward(*arguments)

    monkeypatch.setattr(LowRankProduct, "forward", staticmethod(counted))
    with torch.autocast("cpu", torch.bfloat16):
        with tuned.disable_adapter():
            tuned(input_ids=IDS, use_cache=False)
        with torch.no_grad():
            tuned(input_ids=IDS, use_cache=False)
        assert not calls
        tuned(input_ids=IDS, use_cache=False)
    assert len(calls) == 7 * 3
