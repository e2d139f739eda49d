"""How far a GGUF file may be off: by type, size, the adapter's effect, and what the spec says."""

from __future__ import annotations

from itertools import pairwise

import pytest

from finetune_trainer.contract import QualityLimit, Quantization
from finetune_trainer.export.gate.thresholds import (
    LARGE_LIMITS,
    PUBLISHED,
    limit_for,
    size_factor,
)

Q = Quantization
QUANTIZED = (Q.Q8_0, Q.Q6_K, Q.Q5_K_M, Q.Q4_K_M, Q.IQ4_XS, Q.Q3_K_M)
SMOLLM2 = 134_515_008
MEASURED = {
    # docs/export-quality.md: SmolLM2-135M, the worst of three models that are not on a 4-bit grid.
    Q.F32: 2e-6,
    Q.F16: 3e-6,
    Q.BF16: 5.4e-4,
    Q.Q8_0: 0.012,
    Q.Q4_K_M: 0.15,
}


def test_every_type_has_a_limit_and_smaller_files_may_lose_more() -> None:
    limits = [limit_for(kind, 8_000_000_000) for kind in Q]
    assert limits == sorted(limits)
    assert set(LARGE_LIMITS) == set(PUBLISHED) == set(QUANTIZED)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_llama_cpp_published_passes_with_room_to_spare(kind: Quantization) -> None:
    assert 2 < limit_for(kind, 8_030_261_248) / PUBLISHED[kind] < 4


@pytest.mark.parametrize("kind", MEASURED)
def test_what_was_measured_on_a_small_model_passes(kind: Quantization) -> None:
    assert MEASURED[kind] * 1.5 < limit_for(kind, SMOLLM2)


def test_the_smaller_the_model_the_larger_the_limit() -> None:
    sizes = (1_000, 10**8, 135_000_000, 10**9, 3 * 10**9, 8 * 10**9, 70 * 10**9)
    factors = [size_factor(size) for size in sizes]
    assert factors[0] == factors[1] == pytest.approx(7.19, abs=0.01)
    assert all(one > other for one, other in pairwise(factors[1:-1]))
    assert factors[-2:] == [1.0, 1.0]


def test_a_type_that_its_neighbour_is_taken_for_is_over_its_limit() -> None:
    """As published for 8B: a file that is two types smaller than its name does not pass."""
    for name, content in zip(QUANTIZED, QUANTIZED[2:], strict=False):
        assert PUBLISHED[content] > limit_for(name, 8_000_000_000)


@pytest.mark.parametrize(
    ("effect", "limit"),
    [(None, 0.001), (2.4, 0.001), (0.2, 0.0004), (0.01, 0.0002), (0.0, 0.0002)],
)
def test_without_quantization_the_adapters_effect_counts(
    effect: float | None, limit: float
) -> None:
    assert limit_for(Q.F16, SMOLLM2, effect=effect) == pytest.approx(limit)


def test_the_effect_does_not_count_for_quantized_files() -> None:
    assert limit_for(Q.Q8_0, SMOLLM2, effect=0.001) == limit_for(Q.Q8_0, SMOLLM2)


def test_the_specs_own_limit_comes_first() -> None:
    limits = (QualityLimit(quantization=Q.Q8_0, max_kl_divergence=0.5),)
    assert limit_for(Q.Q8_0, SMOLLM2, limits) == 0.5
    assert limit_for(Q.F16, SMOLLM2, limits) == 0.001
