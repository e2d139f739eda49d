"""How far a GGUF file may be off: by type, size, the adapter's effect, and what the spec says."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import stdev

import pytest

from finetune_trainer.contract import QualityLimit, Quantization
from finetune_trainer.contract.output import NEED_IMPORTANCE
from finetune_trainer.export.gate.thresholds import (
    LARGE_LIMITS,
    PUBLISHED,
    RUINED,
    Judgement,
    Learnt,
    estimate,
    judge,
    least_same_top,
    limit_for,
    size_factor,
)
from finetune_trainer.export.reference import Measurement

Q = Quantization
QUANTIZED = (Q.Q8_0, Q.Q6_K, Q.Q5_K_M, Q.Q4_K_M, Q.IQ4_XS, Q.Q3_K_M, *NEED_IMPORTANCE)
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


def test_no_model_is_so_small_that_a_ruined_file_passes() -> None:
    assert max(limit_for(kind, 1_000) for kind in Q) == RUINED


def test_the_smaller_the_model_the_larger_the_limit() -> None:
    sizes = (1_000, 10**8, 135_000_000, 10**9, 3 * 10**9, 8 * 10**9, 70 * 10**9)
    factors = [size_factor(size) for size in sizes]
    assert factors[0] == factors[1] == pytest.approx(7.19, abs=0.01)
    assert all(one > other for one, other in pairwise(factors[1:-1]))
    assert factors[-2:] == [1.0, 1.0]


def test_a_type_that_its_neighbour_is_taken_for_is_over_its_limit() -> None:
    """As published for 8B: a file that is two types smaller than its name does not pass. Those of
    two and three bits lie closer together, so there it is a file that is four types smaller."""
    few = QUANTIZED[6:]
    for name, content in (
        *zip(QUANTIZED, QUANTIZED[2:6], strict=False),
        *zip(few, few[4:], strict=False),
    ):
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


# --- What figures show -------------------------------------------------------------------------


def measured(*divergence: float, surprise: float = 1.0, same: float = 1.0) -> Measurement:
    """So many tokens; the last of them find another top token."""
    count = len(divergence)
    alike = round(count * same)
    return Measurement(
        surprise=tuple(surprise + 0.01 * (index % 3) for index in range(count)),
        divergence=divergence,
        same_top=(True,) * alike + (False,) * (count - alike),
    )


def words(found: Judgement) -> str:
    return "; ".join(found.problems)


def blocks(tokens: int) -> list[int]:
    return [index // 16 for index in range(tokens)]


def test_the_interval_is_the_textbooks() -> None:
    """Blocks of one size are what is drawn: their means 1, 2, 3 and 4, and t(3) = 3.182."""
    found = estimate([1, 1, 2, 2, 3, 3, 4, 4], [0, 0, 1, 1, 2, 2, 3, 3])
    half = 3.182 * stdev([1, 2, 3, 4]) / 2
    assert found.mean == 2.5
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert estimate([1, 2, 3], [0, 0, 0]).low == -math.inf
    wide, narrow = (estimate([0, 1] * n, range(2 * n)) for n in (10, 200))
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_a_mean_over_the_limit_refuses_beyond_doubt_alone() -> None:
    """Three blocks, of which one is far off: the mean is over the limit, and may be chance."""
    chance = judge(measured(*[0.001] * 32, *[0.3] * 16), blocks(48), 0.08)
    assert chance.quality is not None
    assert chance.quality.kl_divergence > 0.08
    assert (chance.problems, chance.quality.judged, chance.quality.passed) == ((), False, True)
    far = judge(measured(*[0.2, 0.3, 0.1, 0.4] * 12), blocks(48), 0.08)
    assert far.quality is not None
    assert (far.quality.over_limit, far.quality.judged) == (True, True)
    assert "0.25 nats per token, and 0.08 is the limit" in words(far)


@pytest.mark.parametrize(("tokens", "judged"), [(32, False), (256, True)])
def test_a_mean_within_the_limit_is_a_verdict_of_enough_tokens(tokens: int, judged: bool) -> None:
    values = [0.001] * (tokens - 16) + [0.09] * 16
    found = judge(measured(*values), blocks(tokens), 0.08)
    assert found.quality is not None
    assert (found.problems, found.quality.judged) == ((), judged)


def test_few_tokens_are_a_verdict_where_they_agree() -> None:
    found = judge(measured(*[4e-6, 6e-6, 5e-6, 3e-6] * 10), blocks(40), 0.001)
    assert found.quality is not None
    assert found.quality.judged


def test_nothing_measured_is_no_problem() -> None:
    assert judge(measured(), [], 0.1) == Judgement(None, ())
    broken = Measurement((), finite=False)
    assert "not finite" in words(judge(broken, [], 0.1))


def test_other_top_tokens_are_a_problem() -> None:
    """Though the divergence keeps its limit: 0.08 lets 28% of the top tokens change."""
    assert least_same_top(0.08) == pytest.approx(0.717, abs=0.001)
    values = [0.01, 0.02] * 150
    assert judge(measured(*values, same=0.75), range(300), 0.08).problems == ()
    assert "most likely at 50.0% of the tokens" in words(
        judge(measured(*values, same=0.5), range(300), 0.08)
    )


@pytest.mark.parametrize(
    ("kind", "changed"), [(Q.Q8_0, 0.02326), (Q.Q6_K, 0.03969), (Q.Q4_K_M, 0.08099)]
)
def test_published_top_tokens_pass_with_room_to_spare(kind: Quantization, changed: float) -> None:
    """Llama 3 8B, llama.cpp's comparison with Llama 2."""
    allowed = 1 - least_same_top(LARGE_LIMITS[kind])
    assert 2.5 < allowed / changed < 4


def test_a_file_has_to_beat_the_base_model_where_the_tuned_one_does() -> None:
    """Whatever limits the spec sets."""
    base, tuned, bad = (measured(*[0.5] * 64, surprise=value) for value in (3, 2, 4))
    learnt = Learnt(base, tuned)
    assert "perplexity 55.14, and 20.28 of the base model" in words(
        judge(bad, blocks(64), 100.0, learnt)
    )
    assert judge(tuned, blocks(64), 100.0, learnt).problems == ()
    assert judge(bad, blocks(64), 100.0, Learnt(base, bad)).problems == (), "nor does the tuned one"
