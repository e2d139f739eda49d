"""How long the examples are, in tokens: for people, and for the plan of the memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import Base, LengthSpread

TokenCounts = npt.NDArray[np.uint32]
"""Tokens of each example of a file."""

BINS = 32  # of a histogram


class LengthBin(Base):
    """One bar of a histogram."""

    up_to: int
    """The longest length that counts here, in tokens; the bin before ends where this begins."""

    rows: int


class TokenStats(Base):
    """TokenCounts of the examples as they are trained on: cut at training.maxSequenceLength."""

    count: int
    """Examples."""

    total: int
    """Tokens of one pass over them."""

    max: int
    p95: int
    histogram: tuple[LengthBin, ...]


def token_stats(lengths: TokenCounts, limit: int) -> TokenStats:
    """Statistics of lengths that are cut at `limit`."""
    cut = np.minimum(lengths, limit)
    return TokenStats(
        count=len(cut),
        total=int(cut.sum(dtype=np.uint64)),
        max=int(cut.max(initial=0)),
        p95=percentile(cut, 95),
        histogram=histogram(cut),
    )


def histogram(lengths: TokenCounts) -> tuple[LengthBin, ...]:
    """Rows by length in up to BINS bins of one width; empty bins are there as well."""
    if not len(lengths):
        return ()
    width = -(-max(int(lengths.max()), 1) // BINS)
    rows = np.bincount((lengths.astype(np.int64) + width - 1) // width)
    counts = [int(rows[0]) + int(rows[1]) if len(rows) > 1 else int(rows[0]), *rows[2:].tolist()]
    return tuple(
        LengthBin(up_to=width * (number + 1), rows=count) for number, count in enumerate(counts)
    )


def spread(lengths: TokenCounts) -> LengthSpread | None:
    """Minimum, middle, upper end and sum."""
    if not len(lengths):
        return None
    return LengthSpread(
        min=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=round(float(lengths.mean()), 1),
        p95=percentile(lengths, 95),
        p99=percentile(lengths, 99),
        max=int(lengths.max()),
        total=int(lengths.sum(dtype=np.uint64)),
    )


def percentile(lengths: TokenCounts, percent: int) -> int:
    """The length that `percent` of the rows don't exceed: always one that is there."""
    if not len(lengths):
        return 0
    rank = -(-len(lengths) * percent // 100) - 1
    return int(np.partition(lengths, rank)[rank])


def length_that_fits(lengths: TokenCounts, allowed: int) -> int:
    """The smallest maximum that no more than `allowed` rows exceed."""
    rank = len(lengths) - 1 - min(allowed, len(lengths) - 1)
    return int(np.partition(lengths, rank)[rank])
