"""Divergences of log-probabilities, and what keeping them in 16 bits costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune_trainer.export.reference import (
    Floats,
    Measurement,
    Meter,
    create_logprobs,
    kl_divergence,
    normalised,
    read_logprobs,
    store_logprobs,
)


def logits(seed: int, tokens: int = 64, vocabulary: int = 5_000) -> Floats:
    values = np.random.default_rng(seed).normal(0, 3, (tokens, vocabulary))
    return values.astype(np.float32)


def test_the_figures_are_those_of_the_textbook() -> None:
    ours = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    theirs = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32))
    meter = Meter()
    meter.add(ours + 7, [0, 1], theirs - 2)  # log-probabilities up to a constant
    found = meter.measurement()
    divergence = (0.25 * np.log(0.5) + 0.5 * np.log(2)) / 2
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-5)
    assert found.same_top_token == 0.5
    assert found.perplexity == pytest.approx((0.5 * 0.8) ** -0.5, rel=1e-5)
    assert (found.tokens, found.finite) == (2, True)


def test_sixteen_bits_cost_next_to_nothing(tmp_path: Path) -> None:
    exact, other = normalised(logits(0)), normalised(logits(0) + 0.1 * logits(1))
    file = create_logprobs(tmp_path / "kept.npy", *exact.shape)
    store_logprobs(file, 0, exact.copy())
    kept = normalised(read_logprobs(tmp_path / "kept.npy"))
    assert kl_divergence(exact, kept).max() < 2e-6
    wanted = kl_divergence(exact, other).mean()
    assert kl_divergence(kept, other).mean() == pytest.approx(wanted, rel=1e-3)


def test_numbers_that_are_not_finite_are_no_figures() -> None:
    broken = logits(0)
    broken[3, 7] = np.nan
    meter = Meter()
    assert meter.add(broken, [0] * len(broken), None) is None
    assert meter.measurement().finite is False


def test_embeddings_behind_the_vocabulary_are_left_out() -> None:
    """Gemma 3's converter cuts them; a model gives them no weight worth mentioning."""
    ours = logits(0, vocabulary=100)
    padded = np.concatenate([ours, np.full((len(ours), 8), -30, np.float32)], axis=1)
    meter = Meter()
    meter.add(ours, [0] * len(ours), padded)
    assert meter.measurement().kl_divergence == pytest.approx(0, abs=1e-6)


def test_tokens_that_are_left_out_count_nowhere() -> None:
    found = Measurement((1.0, 2.0, 3.0), (0.1, 0.2, 0.9), (True, False, False))
    kept = found.only((True, True, False))
    assert (kept.tokens, kept.same_top_token) == (2, 0.5)
    assert kept.kl_divergence == pytest.approx(0.15)
    assert kept.perplexity == pytest.approx(np.exp(1.5))
    assert found.only((True, True, True)) is found
    assert found.only((False,) * 3).tokens == 0
