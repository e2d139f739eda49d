"""The Trainer's log as curves that can be judged: points, bins, epochs, noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

BINS = 32
"""Bins that a curve is reduced to (medians), so that 50 or 50,000 log lines are judged alike."""


@dataclass(frozen=True)
class Point:
    """One line of the Trainer's log."""

    step: int
    epoch: float
    loss: float | None = None
    """Mean since the line before."""

    grad_norm: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None
    """Mean over the held-out rows."""


def points(log: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The Trainer's `state.log_history` without its summaries."""
    names = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return [
        Point(
            step=int(entry["step"]),
            epoch=float(entry.get("epoch") or 0.0),
            **{name: float(entry[name]) for name in names if entry.get(name) is not None},
        )
        for entry in log
        if "loss" in entry or "eval_loss" in entry
    ]


def curve(train: Sequence[Point]) -> list[tuple[int, float]]:
    """The losses as at most BINS medians, each with the last step of its bin."""
    size = math.ceil(len(train) / BINS)
    # Full bins up to the end: the newest lines matter most, and the first bin may be smaller.
    cuts = list(range(len(train) % size or size, len(train) + 1, size)) if size else []
    bins = [train[max(end - size, 0) : end] for end in cuts]
    return [(bin_[-1].step, median(loss_of(p) for p in bin_)) for bin_ in bins]


def spread(values: Sequence[float]) -> float:
    """Standard deviation of the noise, from the differences of neighbours: a trend hardly counts.

    The mean of |difference| is 2/sqrt(pi) standard deviations for normal noise.
    """
    if len(values) < 2:
        return 0.0
    return fmean(abs(b - a) for a, b in pairwise(values)) * math.sqrt(math.pi) / 2


@dataclass(frozen=True)
class Block:
    """Neighbouring log lines that span an epoch or a little more."""

    first_step: int
    last_step: int
    epoch: float
    """Where it ends."""

    loss: float
    """Mean over its steps."""

    rate: float | None
    """Mean learning rate."""


def epochs_of(train: Sequence[Point]) -> list[Block]:
    """The curve in blocks of whole log lines, each at least an epoch long."""
    blocks: list[Block] = []
    lines: list[tuple[int, Point]] = []  # steps of each line
    began, step = 0.0, 0
    for point in train:
        lines.append((max(point.step - step, 1), point))
        step = point.step
        if point.epoch - began >= 1 - 1e-6:
            steps = sum(count for count, _ in lines)
            rates = [p.learning_rate for _, p in lines if p.learning_rate is not None]
            blocks.append(
                Block(
                    first_step=lines[0][1].step,
                    last_step=point.step,
                    epoch=point.epoch,
                    loss=sum(count * loss_of(p) for count, p in lines) / steps,
                    rate=fmean(rates) if rates else None,
                )
            )
            lines, began = [], point.epoch
    return blocks


def is_finite(value: float | None) -> bool:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)


def loss_of(point: Point) -> float:
    """The training loss of a point that has one."""
    assert point.loss is not None, "points with a loss only"  # noqa: S101
    return point.loss


def eval_loss_of(point: Point) -> float:
    """The held-out loss of a point that has one."""
    assert point.eval_loss is not None, "points with an eval loss only"  # noqa: S101
    return point.eval_loss


def evaluations_of(trainer: Trainer) -> dict[int, dict[str, float]]:
    """Step -> what the evaluation there found; step 0 is the base model."""
    entries = trainer.state.log_history
    return {int(entry["step"]): entry for entry in entries if "eval_loss" in entry}
