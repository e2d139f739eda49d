"""How far a GGUF file may be from its source, by its type and the model's size.

Sources. llama.cpp's own measurements on Llama 3 8B (its tools/perplexity/README.md, "LLaMA 3 8b
Scoreboard", revision f364eb6f: mean KL divergence from the 16-bit model over Wikitext-2, without
importance matrices but for types IQ) are PUBLISHED. A file of that size may have about three times
that, since fine-tuned answers are not Wikitext. Smaller models lose more: GROWTH follows the
measurements on SmolLM2-135M in docs/export-quality.md.

Below is what figures show. They are of some hundred tokens, so a file is refused only where the
lower bound of a confidence interval is over its limit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_trainer.contract import Quality, QualityLimit, Quantization
from finetune_trainer.contract.verdict import other_top_tokens, over_limit, worse_than_base
from finetune_trainer.export.reference import Measurement

PUBLISHED = {
    Quantization.Q8_0: 0.001355,
    Quantization.Q6_K: 0.005452,
    Quantization.Q5_K_M: 0.010762,
    Quantization.Q4_K_M: 0.031273,
    Quantization.IQ4_XS: 0.036334,
    Quantization.Q3_K_M: 0.101913,
    Quantization.IQ3_M: 0.102534,
    Quantization.IQ3_S: 0.111278,
    Quantization.IQ3_XS: 0.138693,
    Quantization.IQ3_XXS: 0.183625,
    Quantization.IQ2_M: 0.325989,
    Quantization.IQ2_S: 0.439197,
    Quantization.IQ2_XS: 0.546290,
    Quantization.IQ2_XXS: 0.812022,
}
"""Nats per token, Llama 3 8B."""

LARGE_LIMITS = {
    Quantization.Q8_0: 0.005,
    Quantization.Q6_K: 0.015,
    Quantization.Q5_K_M: 0.03,
    Quantization.Q4_K_M: 0.08,
    Quantization.IQ4_XS: 0.12,
    Quantization.Q3_K_M: 0.25,
    Quantization.IQ3_M: 0.26,
    Quantization.IQ3_S: 0.28,
    Quantization.IQ3_XS: 0.35,
    Quantization.IQ3_XXS: 0.45,
    Quantization.IQ2_M: 0.8,
    Quantization.IQ2_S: 1.0,
    Quantization.IQ2_XS: 1.3,
    Quantization.IQ2_XXS: 1.9,
}
"""Nats per token, for models of LARGE parameters and more."""

RUINED = 2.2
"""Nats per token at which no file passes, however small the model: as published, Llama 3 8B in
IQ1_S, which is off by 2.21, has a perplexity of 58 in place of 6.2."""

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
    return min(LARGE_LIMITS[kind] * size_factor(parameters), RUINED)


def size_factor(parameters: int) -> float:
    """How much more a model of this size may lose than a large one: 1 to about 7.2."""
    return float((LARGE / min(max(parameters, SMALL), LARGE)) ** GROWTH)


# --- What figures show -------------------------------------------------------------------------

ENOUGH_TOKENS = 256
"""From so many on, a mean within the limit is a verdict, whatever the interval."""

STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179),
    *(2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064),
)
"""97.5% quantiles of Student's distribution, for 1 to 24 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float], blocks: Sequence[int]) -> Estimate:
    """The mean of `values`, one a token. Tokens of one block depend on each other.

    So blocks are what is drawn: the mean is the ratio of their sums to their lengths, with the
    usual error of a ratio (Cochran, Sampling Techniques, 6.3). One block alone tells nothing.
    """
    sums, counts = defaultdict[int, float](float), defaultdict[int, int](int)
    for value, block in zip(values, blocks, strict=True):
        sums[block] += value
        counts[block] += 1
    mean = math.fsum(values) / len(values)
    drawn = len(sums)
    if drawn < 2:
        return Estimate(mean, -math.inf, math.inf)
    squares = math.fsum((sums[block] - mean * counts[block]) ** 2 for block in sums)
    error = math.sqrt(squares * drawn / (drawn - 1)) / len(values)
    half = _student_t(drawn - 1) * error
    return Estimate(mean, mean - half, mean + half)


def _student_t(freedom: int) -> float:
    # Behind the table, its asymptotic series to the first term (Abramowitz and Stegun, 26.7.5).
    return STUDENT_T[freedom - 1] if freedom <= len(STUDENT_T) else 1.96 + 2.37 / freedom


def least_same_top(limit: float) -> float:
    """The smallest share of tokens at which a file has to find the same one most likely.

    As published for Llama 3 8B (same table as PUBLISHED's source), 2.3% of the top tokens change at
    a divergence of 0.0014, 4.0% at 0.0055 and 8.1% at 0.031: 0.46 to 0.63 times its square root. So
    the square root of the limit leaves as much room as the limit itself.
    """
    return max(0.0, 1.0 - math.sqrt(limit))


@dataclass(frozen=True)
class Judgement:
    """What a file's figures show."""

    quality: Quality | None
    problems: tuple[str, ...]


def judge(
    found: Measurement,
    blocks: Sequence[int],
    limit: float,
    learnt: Learnt | None = None,
) -> Judgement:
    """Hold a file's figures against its limit, and against the base model where that is asked for.

    `blocks` says which tokens depend on each other (`estimate`).
    """
    if not found.finite:
        return Judgement(None, ("it computes numbers that are not finite",))
    if not found.tokens:
        return Judgement(None, ())
    off = estimate(found.divergence, blocks)
    quality = Quality(
        kl_divergence=off.mean,
        kl_divergence_low=max(0.0, off.low),
        same_top_token=found.same_top_token,
        perplexity=found.perplexity,
        max_kl_divergence=limit,
        judged=(
            off.low > limit
            or off.high <= limit
            or (off.mean <= limit and found.tokens >= ENOUGH_TOKENS)
        ),
    )
    problems = [over_limit(off.mean, limit)] if quality.over_limit else []
    least = least_same_top(limit)
    if estimate(found.same_top, blocks).high < least:
        problems.append(other_top_tokens(found.same_top_token, least))
    if learnt and learnt.lost_by(found, blocks):
        problems.append(worse_than_base(found.perplexity, learnt.base.perplexity))
    return Judgement(quality, tuple(problems))


@dataclass(frozen=True)
class Learnt:
    """What the training taught: base and tuned model on the same tokens."""

    base: Measurement
    tuned: Measurement

    def lost_by(self, found: Measurement, blocks: Sequence[int]) -> bool:
        """Whether a file is worse than the base model, and the tuned model better, beyond doubt."""
        return (
            _surprise_beyond(self.tuned, self.base, blocks).high < 0
            and _surprise_beyond(found, self.base, blocks).low > 0
        )


def _surprise_beyond(one: Measurement, other: Measurement, blocks: Sequence[int]) -> Estimate:
    pairs = zip(one.surprise, other.surprise, strict=True)
    return estimate([mine - theirs for mine, theirs in pairs], blocks)
