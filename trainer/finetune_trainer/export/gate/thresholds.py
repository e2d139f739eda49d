"""How far a GGUF file may be from its source, by its type and the model's size.

Sources. llama.cpp's own measurements on Llama 3 8B (its tools/perplexity/README.md, "LLaMA 3 8b
Scoreboard", revision f364eb6f: mean KL divergence from the 16-bit model over Wikitext-2, without
importance matrices but for IQ4_XS) are PUBLISHED. A file of that size may have about three times
that, since fine-tuned answers are not Wikitext. Smaller models lose more: GROWTH follows the
measurements on SmolLM2-135M in docs/export-quality.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from finetune_trainer.contract import QualityLimit, Quantization

PUBLISHED = {
    Quantization.Q8_0: 0.001355,
    Quantization.Q6_K: 0.005452,
    Quantization.Q5_K_M: 0.010762,
    Quantization.Q4_K_M: 0.031273,
    Quantization.IQ4_XS: 0.036334,
    Quantization.Q3_K_M: 0.101913,
}
"""Nats per token, Llama 3 8B."""

LARGE_LIMITS = {
    Quantization.Q8_0: 0.005,
    Quantization.Q6_K: 0.015,
    Quantization.Q5_K_M: 0.03,
    Quantization.Q4_K_M: 0.08,
    Quantization.IQ4_XS: 0.12,
    Quantization.Q3_K_M: 0.25,
}
"""Nats per token, for models of LARGE parameters and more."""

UNQUANTIZED_LIMITS = {
    Quantization.F32: 0.001,
    Quantization.F16: 0.001,
    Quantization.BF16: 0.002,
}
"""Nats per token from base model and adapter in float32, whatever the model's size. llama.cpp
rounds activations to the weights' type, so BF16 with its 8 bits differs more than F16 with 11."""

NOISE = {
    Quantization.F32: 0.0002,
    Quantization.F16: 0.0002,
    Quantization.BF16: 0.001,
}
"""Nats per token that rounding alone may make. Measured on SmolLM2-135M: F16 2e-6, BF16 9e-5 to
5e-4; on Llama 3 8B llama.cpp's own comparison gave F16 2.5e-5."""

EFFECT_SHARE = 0.002
"""A file without quantization may be off by this share of the adapter's effect (the divergence of
tuned and base model), within NOISE and UNQUANTIZED_LIMITS. A gentle training moves the model only
a little, and a merge that does half of it would otherwise pass: halving the scale of every delta
costs about a quarter of the effect."""

LARGE = 8.0e9  # parameters
SMALL = 1.0e8  # parameters; below, the limits grow no more
GROWTH = 0.45
"""Exponent of the size. It puts the limits for SmolLM2-135M at half as much again, or more, as the
worst of what was measured on it."""


def limit_for(
    kind: Quantization,
    parameters: int,
    limits: Iterable[QualityLimit] = (),
    effect: float | None = None,
) -> float:
    """The largest mean KL divergence of a file, in nats per token.

    `limits` are those of the spec, which come first. `effect` is what the adapter changes, in nats
    per token; it counts for types that are held against base model and adapter.
    """
    for item in limits:
        if item.quantization is kind:
            return item.max_kl_divergence
    if kind in UNQUANTIZED_LIMITS:
        most = UNQUANTIZED_LIMITS[kind]
        return most if effect is None else min(most, max(NOISE[kind], EFFECT_SHARE * effect))
    return LARGE_LIMITS[kind] * size_factor(parameters)


def size_factor(parameters: int) -> float:
    """How much more a model of this size may lose than a large one: 1 to about 7.2."""
    return float((LARGE / min(max(parameters, SMALL), LARGE)) ** GROWTH)
