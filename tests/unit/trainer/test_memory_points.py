"""Predictions against published measurements.

Compared is the memory predicted for the published number of tokens in a pass with the published
memory. "GB" of a GPU's size is read as GiB, as GPUs are sold; where a page says what its allocator
counted, the CUDA context is left out of the prediction as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from finetune_trainer.contract import Lora, TargetModule
from finetune_trainer.memory.predict import GPU_OVERHEAD, Head, Kept, Recipe, predict
from tests.unit.trainer.test_memory_shape import shape

GIB, GB = 2**30, 10**9
WITHIN = 0.20
T = TargetModule


class Point(NamedTuple):
    model: str
    tokens: int
    published: float
    recipe: Recipe


# HF + FlashAttention 2 in Unsloth's benchmarks (docs, "Context length benchmarks"): the longest
# sequence that GPUs of a size train with QLoRA, r=32 on all linear layers, batch 1, all padded.
# HF's prepare_model_for_kbit_training holds embeddings in float32; all logits are computed at once.
HF_QLORA = Recipe(
    Lora(r=32, dropout=0, target_modules=tuple(T)), quantized=True, embedding=4, head=Head.FULL
)
UNSLOTH = {
    f"Unsloth's table, {model}, {size} GB": Point(model, tokens, size * GIB, HF_QLORA)
    for model, size, tokens in [
        ("llama-3.1-8b", 12, 932),
        ("llama-3.1-8b", 16, 2551),
        ("llama-3.1-8b", 24, 5789),
        ("llama-3.1-8b", 40, 12_264),
        ("llama-3.1-8b", 48, 15_502),
        ("llama-3.1-8b", 80, 28_454),
        ("llama-3.3-70b", 80, 6916),
    ]
}

# LLaMA-Factory's wiki, "Performance comparison": Llama-2-7B, QLoRA, r=8 on all linear layers,
# batch 1, FlashAttention 2, A100 40 GB. Its figures are whole GB.
FACTORY_RECIPE = replace(HF_QLORA, lora=Lora(r=8, dropout=0, target_modules=tuple(T)))
FACTORY = {
    f"LLaMA-Factory's wiki, {tokens} tokens": Point(
        "llama-2-7b", tokens, size * GIB, FACTORY_RECIPE
    )
    for tokens, size in [(1024, 6), (2048, 7), (4096, 9), (8192, 12), (16_384, 19), (32_768, 32)]
}

# LitGPT's tutorials/resource-tables.md: LoRA r=8 on query and value, bf16-true (adapters too),
# nothing computed again, longest Alpaca example 1,304 tokens, max_memory_allocated on an A100.
LITGPT_RECIPE = Recipe(
    Lora(r=8, target_modules=(T.Q, T.V)), adapter=2, kept=Kept.ALL, head=Head.FULL, overhead=0
)
LITGPT_NF4 = replace(LITGPT_RECIPE, quantized=True)
LITGPT = {
    "LitGPT, 7B, batch 1": Point("llama-2-7b", 1304, 21.30 * GB, LITGPT_RECIPE),
    "LitGPT, 7B, batch 2": Point("llama-2-7b", 2608, 29.07 * GB, LITGPT_RECIPE),
    "LitGPT, 13B, batch 1": Point("llama-2-13b", 1304, 38.12 * GB, LITGPT_RECIPE),
    "LitGPT, 7B, nf4-dq": Point("llama-2-7b", 1304, 13.84 * GB, LITGPT_NF4),
    "LitGPT, 13B, nf4-dq": Point("llama-2-13b", 1304, 22.55 * GB, LITGPT_NF4),
}

# torchtune's README, "Optimization flags" (3B: batch 2 x 4,096, r=64 on all but key, activations
# offloaded) and "Memory and training speed" (8B: batch 2 x 2,048, r=8 on query, value, output;
# recomputation, except on the A6000, where 14 GiB more can only be kept activations). bf16
# throughout, compiled, loss in chunks, figures of PyTorch's allocator.
TUNE_3B = Recipe(
    Lora(r=64, dropout=0, target_modules=(T.Q, T.V, T.O, T.GATE, T.UP, T.DOWN)),
    adapter=2,
    kept=Kept.NOTHING,
    overhead=0,
)
TUNE_8B = Recipe(Lora(r=8, dropout=0, target_modules=(T.Q, T.V, T.O)), adapter=2, overhead=0)
TORCHTUNE = {
    "torchtune, 3B LoRA": Point("llama-3.2-3b", 8192, 8.5 * GIB, TUNE_3B),
    "torchtune, 3B QLoRA": Point("llama-3.2-3b", 8192, 4.6 * GIB, replace(TUNE_3B, quantized=True)),
    "torchtune, 8B LoRA": Point("llama-3.1-8b", 4096, 16.2 * GIB, TUNE_8B),
    "torchtune, 8B QLoRA": Point("llama-3.1-8b", 4096, 7.4 * GIB, replace(TUNE_8B, quantized=True)),
    "torchtune, 8B LoRA, kept": Point(
        "llama-3.1-8b", 4096, 30.3 * GIB, replace(TUNE_8B, kept=Kept.ALL)
    ),
    "torchtune, 70B LoRA, FSDP over 8": Point(
        "llama-3.3-70b", 4096, 27.6 * GIB, replace(TUNE_8B, shards=8)
    ),
}

# LongLoRA's plain LoRA row (arXiv 2309.12307, table 12, by way of the odyn-network data set):
# Llama-2-7B, r=8 on attention, batch 1, FlashAttention 2, recomputation, 8 GPUs with ZeRO-2.
LONGLORA = {
    "LongLoRA's LoRA row": Point(
        "llama-2-7b",
        8192,
        25.7 * GB,
        Recipe(Lora(r=8, dropout=0), head=Head.FULL, overhead=GPU_OVERHEAD),
    )
}

POINTS = {**UNSLOTH, **FACTORY, **LITGPT, **TORCHTUNE, **LONGLORA}


@pytest.mark.parametrize("point", POINTS.values(), ids=list(POINTS))
def test_a_published_point(point: Point) -> None:
    predicted = predict(shape(point.model), point.recipe, point.tokens).total
    assert predicted == pytest.approx(point.published, rel=WITHIN)


def test_all_points_together_are_nearer() -> None:
    errors = [
        predict(shape(p.model), p.recipe, p.tokens).total / p.published - 1 for p in POINTS.values()
    ]
    assert len(errors) == 25
    assert sum(abs(error) for error in errors) / len(errors) < 0.10
    assert abs(sum(errors) / len(errors)) < 0.05


def total(recipe: Recipe, tokens: int = 4096, labels: int | None = None) -> int:
    return predict(shape("llama-3.1-8b"), recipe, tokens, labels).total


def test_what_saves_memory_is_predicted_to_do_so() -> None:
    usual = Recipe(Lora())
    assert total(replace(usual, quantized=True)) < 0.6 * total(usual)
    assert total(replace(usual, kept=Kept.ALL)) > 1.5 * total(usual)
    assert total(replace(usual, head=Head.FULL)) > total(usual)
    assert total(replace(usual, shards=4)) < 0.6 * total(usual)
    assert total(usual, 8192) > total(usual)
    assert total(replace(usual, head=Head.LABELS), labels=10) < total(
        replace(usual, head=Head.LABELS)
    )
