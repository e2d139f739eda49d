"""Lengths in tokens: percentiles, bins, and the length that would be needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from finetune_trainer.prepare.findings import (
    BINS,
    TokenCounts,
    histogram,
    length_that_fits,
    percentile,
    spread,
    token_stats,
)


def lengths(*values: int) -> TokenCounts:
    return np.array(values, dtype=np.uint32)


def test_statistics_are_of_what_is_left_after_cutting() -> None:
    stats = token_stats(lengths(10, 20, 500), 100)
    assert (stats.count, stats.total, stats.max, stats.p95) == (3, 130, 100, 100)
    assert sum(bin_.rows for bin_ in stats.histogram) == 3
    assert stats.histogram[-1].up_to >= 100


def test_nothing_is_no_error() -> None:
    stats = token_stats(lengths(), 100)
    assert (stats.count, stats.total, stats.max, stats.p95) == (0, 0, 0, 0)
    assert stats.histogram == ()
    assert spread(lengths()) is None


def test_totals_do_not_overflow() -> None:
    assert token_stats(np.full(3, 2**31, dtype=np.uint32), 2**31).total == 3 * 2**31


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (95, 95), (99, 99), (100, 100)])
def test_a_percentile_is_a_length_that_is_there(percent: int, expected: int) -> None:
    assert percentile(np.arange(100, 0, -1, dtype=np.uint32), percent) == expected
    assert percentile(lengths(7), percent) == 7


@pytest.mark.parametrize(("allowed", "expected"), [(0, 40), (1, 30), (2, 20), (3, 10), (9, 10)])
def test_the_length_that_no_more_than_allowed_exceed(allowed: int, expected: int) -> None:
    found = lengths(30, 10, 40, 20)
    fits = length_that_fits(found, allowed)
    assert fits == expected
    assert (found > fits).sum() <= allowed


@pytest.mark.parametrize("longest", [1, 2, 31, 32, 33, 100, 2048, 1_000_000])
def test_the_bins_have_one_width_and_hold_all_rows(longest: int) -> None:
    found = lengths(*range(1, min(longest, 500) + 1), longest)
    bins = histogram(found)
    assert len(bins) <= BINS
    assert sum(bin_.rows for bin_ in bins) == len(found)
    edges = [0, *(bin_.up_to for bin_ in bins)]
    assert {b - a for a, b in itertools.pairwise(edges)} == {edges[1]}
    for low, high, bin_ in zip(edges, edges[1:], bins, strict=False):
        assert bin_.rows == ((found > low) & (found <= high)).sum()
