"""Rows that lie end to end see only themselves, and cost no padding."""

from __future__ import annotations

import inspect
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from finetune_trainer.contract import TrainingPlan
from finetune_trainer.model.tokenizer import IGNORED, message_pair
from finetune_trainer.train.recipe import packing
from finetune_trainer.train.recipe.data import PackingCollator, PaddingCollator
from finetune_trainer.train.recipe.lora import FastDropout
from finetune_trainer.train.recipe.packing import prepare_packing
from finetune_trainer.train.recipe.trainer import answer_loss
from tests.integration.trainer.architectures import LEAKING, PACKABLE, VOCABULARY, tiny
from tests.integration.trainer.conftest import ROWS
from tests.integration.trainer.recipe import base_of, build
from tests.integration.trainer.varlen_standin import plain_varlen_attn

FLASH = "flash_attention_2"
LENGTHS = (3, 40, 1, 12, 25)  # longer and shorter than the tiny models' window of 8


def rows(seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in LENGTHS:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    return made


def gradients(model: PreTrainedModel, *batches: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        torch.autograd.backward(answer_loss(model, batch))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", PACKABLE)
def test_a_packed_row_is_what_it_is_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    own = model.config._attn_implementation
    packed, padded = PackingCollator(0)(rows()), PaddingCollator(0)
    alone = [padded([row]) for row in rows()]
    with torch.no_grad():
        apart = torch.cat([model(input_ids=each["input_ids"]).logits[0] for each in alone])
    expected = gradients(model, *alone)

    assert prepare_packing(model)
    # PyTorch's kernel runs on a GPU; all that is handed to it shows here.
    monkeypatch.setattr(packing, "varlen_attn", plain_varlen_attn)
    kernel = {packing.KERNEL_NAME} if packing.supports_attention_of(model.config) else set()
    for implementation in {model.config._attn_implementation, own} | kernel:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            inputs = {name: value for name, value in packed.items() if name != "labels"}
            # With a cache, transformers would take the positions for those of one sequence.
            together = model(**inputs, use_cache=False).logits[0]
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
        for name, value in gradients(model, packed).items():
            scale = max(float(expected[name].abs().max()), 1e-6)
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", LEAKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_whose_rows_would_see_each_other_gets_padding(
    kind: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(kind, dtype)
    before = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, "finetune_trainer"):
        assert not prepare_packing(model)
    assert "Rows are padded, not packed" in caplog.text
    assert model.config._attn_implementation == before


def test_scores_that_are_capped_are_computed_by_a_function_that_can() -> None:
    """Gemma 2: PyTorch's own attention has no cap, and ours says that it has none."""
    assert not packing.supports_attention_of(tiny("gemma2").config)
    assert packing.supports_attention_of(tiny("gemma3_text").config)
    zeros = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="softcap"):
        packing.packed_attention(torch.nn.Identity(), zeros, zeros, zeros, None, softcap=50.0)


@pytest.mark.parametrize("window", [None, 1, 100], ids=["all", "itself", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attention_by_blocks_is_pytorchs_with_a_mask(
    window: int | None, dtype: torch.dtype
) -> None:
    """Rows that are longer than a block, three heads for each key, values and gradients."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 300, 301, 430])
    time = int(bounds[-1])
    query = torch.randn(1, 6, time, 16, dtype=dtype, requires_grad=True)
    key = torch.randn(1, 2, time, 16, dtype=dtype, requires_grad=True)
    value = torch.randn(1, 2, time, 8, dtype=dtype, requires_grad=True)
    above = torch.randn(1, 6, time, 8)
    row = torch.bucketize(torch.arange(time), bounds[1:], right=True)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    seen = (row[:, None] == row) & (distance >= 0) & (distance < (window or time))

    ours, _ = packing.packed_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=window,
        cu_seq_lens_q=bounds,
    )
    theirs = scaled_dot_product_attention(
        query.float(),
        key.float().repeat_interleave(3, 1),
        value.float().repeat_interleave(3, 1),
        attn_mask=seen,
        scale=0.3,
    )
    limit = 1e-5 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(ours.transpose(1, 2).float(), theirs, rtol=limit, atol=limit)
    inputs = (query, key, value)
    mine = torch.autograd.grad(ours, inputs, above.transpose(1, 2).to(dtype))
    for one, other in zip(mine, torch.autograd.grad(theirs, inputs, above), strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(
            one.float(), other.float(), rtol=limit, atol=max(limit * scale, 1e-5)
        )


def test_nothing_is_learnt_across_a_boundary() -> None:
    """The first token of a row would be predicted from the row before it."""
    everything = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
    batch = PackingCollator(0)(everything)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 6]


def test_a_pass_without_rows_has_a_loss_of_zero() -> None:
    """A process may have none in the last step; the others wait for its gradients."""
    model = tiny("llama")
    for collator in (PackingCollator(0), PaddingCollator(0)):
        loss = answer_loss(model, collator([]))
        torch.autograd.backward(loss)
        assert loss.item() == 0


def test_packed_and_padded_training_end_in_the_same_adapter(
    tiny_model: Path, tmp_path: Path
) -> None:
    examples = [message_pair(*row) for row in ROWS]

    def trained(packed: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        trainer = build(tiny_model, tmp_path, examples, packing=packed, batchSize=2)
        if packed:
            assert base_of(trainer).config._attn_implementation == packing.ATTENTION_NAME
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        model = cast("PeftModel", trainer.model)
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        return losses, weights

    losses, packed = trained(packed=True)
    expected, padded = trained(packed=False)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_faster_dropout_drops_as_much_and_keeps_the_mean(share: float) -> None:
    torch.manual_seed(0)
    dropout = FastDropout(share)
    ones = torch.ones(1_000_003)
    dropped = dropout(ones)
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.002)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert dropped.unique().numel() == 2
    assert torch.equal(dropout.eval()(ones), ones)


# --- PyTorch's kernel, on a GPU ------------------------------------------------------------------


def test_the_stand_in_takes_what_the_kernel_takes() -> None:
    kernel = inspect.signature(varlen_attn).parameters
    stand_in = inspect.signature(plain_varlen_attn).parameters
    assert list(stand_in) == [name for name in kernel if name in stand_in]
    assert all(stand_in[name].kind is kernel[name].kind for name in stand_in)


@pytest.mark.parametrize("window", [None, 1, 7, 100], ids=["all", "itself", "window", "wide"])
def test_the_kernel_gets_rows_and_window_as_it_wants_them(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values as our own attention by blocks has them, which is compared with PyTorch's above."""
    monkeypatch.setattr(packing, "varlen_attn", plain_varlen_attn)
    torch.manual_seed(0)
    bounds = torch.tensor([0, 30, 31, 55], dtype=torch.int32)
    query, key, value = (torch.randn(1, heads, 55, 16) for heads in (6, 2, 2))
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "cu_seq_lens_q": bounds}
    module = torch.nn.Identity()
    expected, _ = packing.packed_attention(module, query, key, value, None, **options)
    options |= {"max_length_q": 30}
    found, _ = packing.kernel_attention(module, query, key, value, None, **options)
    torch.testing.assert_close(found, expected)
    alone, _ = packing.kernel_attention(module, query, key, value, None, scaling=0.3)
    one_row, _ = packing.packed_attention(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(alone, one_row)


def test_the_kernel_computes_in_the_type_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append({part.dtype for part in (query, *rest[:2])})
        return plain_varlen_attn(query, *rest, **options)

    monkeypatch.setattr(packing, "varlen_attn", look)
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        packing.kernel_attention(torch.nn.Identity(), query, key.bfloat16(), value, None)
    assert seen == [{torch.bfloat16}]


@dataclass(frozen=True)
class Gpu:
    """What the choice asks PyTorch."""

    capability: tuple[int, int]
    flash: bool = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: self.capability)
        monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: self.flash)


AMPERE, TURING = Gpu((8, 0)), Gpu((7, 5))
BY_KERNEL = packing.KERNEL_NAME
AUTOCAST = torch.float32, torch.bfloat16  # of the weights, and what is computed in


@pytest.mark.parametrize(
    ("gpu", "model", "expected"),
    [
        (AMPERE, ("llama", torch.bfloat16, "cuda"), [BY_KERNEL, "sdpa"]),
        (Gpu((9, 0), flash=True), ("llama", torch.bfloat16, "cuda"), [BY_KERNEL, FLASH, "sdpa"]),
        (AMPERE, ("mistral", torch.float16, "cuda"), [BY_KERNEL, "sdpa"]),
        (AMPERE, ("llama", torch.float32, "cuda"), ["sdpa"]),
        (AMPERE, ("llama", AUTOCAST, "cuda"), [BY_KERNEL, "sdpa"]),  # all weights are trained
        (TURING, ("llama", torch.float16, "cuda"), ["sdpa"]),
        (AMPERE, ("gemma2", torch.bfloat16, "cuda"), ["sdpa"]),  # its scores are capped
        (AMPERE, ("llama", torch.bfloat16, "cpu"), ["sdpa"]),  # it will be spread over GPUs
    ],
)
def test_the_kernel_is_tried_where_it_runs(
    gpu: Gpu,
    model: tuple[str, torch.dtype | tuple[torch.dtype, torch.dtype], str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu.install(monkeypatch)
    kind, types, device = model
    dtype, compute = types if isinstance(types, tuple) else (types, types)
    there = SimpleNamespace(
        config=tiny(kind).config, dtype=dtype, device=SimpleNamespace(type=device)
    )
    assert packing._candidates(cast("Any", there), "sdpa", compute) == expected


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_model_that_is_spread_over_gpus_proves_the_kernel_on_a_few_layers(
    right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself proves on the CPU that its rows can be packed at all."""
    model = tiny("gemma3_text", torch.bfloat16)
    AMPERE.install(monkeypatch)
    proven: list[tuple[int, str]] = []

    def kernel(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        out = plain_varlen_attn(query, *rest, **options)
        return out if right else out.cumsum(0)  # each row would see those before it

    def few_layers(whole: PreTrainedModel, device: str) -> PreTrainedModel:
        few = real_few_layers(whole, "cpu")
        proven.append((few.config.get_text_config().num_hidden_layers, device))
        return few

    real_few_layers = packing.few_layers
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    monkeypatch.setattr(packing, "few_layers", few_layers)
    assert prepare_packing(model)
    assert model.config._attn_implementation == (packing.KERNEL_NAME if right else "sdpa")
    assert proven == [(2, "cuda")], "a layer with a window and one without"


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_weights_in_float32_prove_the_kernel_as_they_train_under_autocast(
    right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel knows 16 bits only, and refuses what comes in float32."""
    seen = []

    def kernel(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(query.dtype)
        if query.dtype is torch.float32:
            raise RuntimeError("FlashAttention only supports fp16 and bf16")
        out = plain_varlen_attn(query, *rest, **options)
        return out if right else out.cumsum(0)

    model = tiny("llama")
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    monkeypatch.setattr(packing, "_candidates", lambda *_: [BY_KERNEL, "sdpa"])
    assert prepare_packing(model, compute=torch.bfloat16)
    assert seen
    assert set(seen) == {torch.bfloat16}
    assert model.config._attn_implementation == (BY_KERNEL if right else "sdpa")
    if right:
        batch = PackingCollator(0)(rows())
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, batch)
            model.set_attn_implementation("sdpa")
            expected = gradients(model, batch)
        for name, value in expected.items():
            error = float((found[name] - value).norm() / value.norm().clamp(min=1e-9))
            assert error < 0.15, name  # rounding; rows that saw each other differ by all
    model.set_attn_implementation("sdpa")
    assert prepare_packing(model)
    assert model.config._attn_implementation == "sdpa", "without autocast it can't"


def test_a_pytorch_without_the_kernel_packs_with_a_mask_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # it can't be imported
    assert packing._find_kernel() is None
    former = SimpleNamespace(varlen_attn=packing.packed_attention)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", former)
    assert packing._find_kernel() is None, "it knows no window"
    monkeypatch.setattr(packing, "varlen_attn", None)
    AMPERE.install(monkeypatch)
    there = SimpleNamespace(
        config=tiny("llama").config, dtype=torch.bfloat16, device=SimpleNamespace(type="cuda")
    )
    with caplog.at_level(logging.WARNING, "finetune_trainer"):
        assert packing._candidates(cast("Any", there), "sdpa", torch.bfloat16) == ["sdpa"]
    assert "has no kernel for packed rows" in caplog.text
    assert "4096 tokens" in caplog.text


@pytest.mark.parametrize(
    ("attention", "gpu", "engine", "expected"),
    [
        ("sdpa", TURING, "transformers", (1, 4096)),
        (BY_KERNEL, AMPERE, "transformers", (8, 16_000)),
        ("sdpa", TURING, "unsloth", (8, 16_000)),
        (packing.ATTENTION_NAME, None, "transformers", (8, 16_000)),
    ],
    ids=["a mask", "the kernel", "Unsloth's own", "a CPU"],
)
def test_passes_with_a_mask_stay_small(
    attention: str,
    gpu: Gpu | None,
    engine: str,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if gpu:
        gpu.install(monkeypatch)
    plan = TrainingPlan(
        batch_size=8,
        gradient_accumulation_steps=4,
        gradient_checkpointing=False,
        pass_tokens=16_000,
    )
    work = cast("Any", SimpleNamespace(plan=plan, engine=engine))
    model = cast("Any", SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention)))
    lengths = np.array([100, 2000], dtype=np.int32)
    found = packing.pass_limits(work, model, lengths, packed=True)
    assert (found.rows, found.tokens) == expected
    padded = packing.pass_limits(work, model, lengths, packed=False)
    assert (padded.rows, padded.tokens) == (8, 16_000)
