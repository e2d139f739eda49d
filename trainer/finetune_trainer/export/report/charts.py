"""The report's charts, as what the template chart.svg.jinja draws, in CSS pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from finetune_trainer.export.report import tables
from finetune_trainer.export.report.facts import Facts, LossPoint

MOST_POINTS = 300
"""Points of a curve; of longer trainings each is the mean of as many steps as it takes."""


class Size(NamedTuple):
    """Width and height at which the text has its nominal size."""

    width: int
    height: int


WIDE, NARROW = Size(900, 330), Size(360, 280)
LENGTHS = Size(360, 230)


class Line(NamedTuple):
    points: str
    colour: str
    width: float


class Dot(NamedTuple):
    x: float
    y: float
    radius: float
    colour: str
    hollow: bool = False


@dataclass
class Chart:
    """Axes with what is drawn between them. The names of colours are the page's CSS variables."""

    size: Size
    name: str
    """Keeps identifiers apart from those of other charts of the page."""

    title: str
    description: str
    below: str
    """What the horizontal axis shows."""

    across: tuple[float, float]
    """Its range."""

    up: tuple[float, float]
    most: int
    """Labels of the horizontal axis."""

    lines: list[Line] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    bars: list[tuple[float, float, float, float]] = field(default_factory=list)
    mark: float | None = None
    note: tuple[float, str] | None = None

    left, top = 38, 14

    @property
    def width(self) -> int:
        return self.size.width

    @property
    def height(self) -> int:
        return self.size.height

    @property
    def right(self) -> int:
        return self.width - 10

    @property
    def bottom(self) -> int:
        return self.height - 44

    @property
    def columns(self) -> list[tuple[float, str]]:
        return [(self.x(tick), tables.count(round(tick))) for tick in self._steps]

    @property
    def _steps(self) -> list[float]:
        return [tick for tick in ticks(*self.across, self.most, least=1) if tick >= 0]

    @property
    def rows(self) -> list[tuple[float, str]]:
        found = ticks(*self.up, 5, least=1 if self.bars else 0)
        places = max((_places(tick) for tick in found), default=0)
        return [(self.y(tick), short(tick, places)) for tick in found]

    def x(self, value: float) -> float:
        low, high = self.across
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.up
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)

    def curve(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        """A line, with a dot at each point where they are few."""
        placed = [(self.x(x), self.y(y)) for x, y in points]
        self.lines.append(Line(" ".join(f"{x},{y}" for x, y in placed), colour, width))
        if len(placed) <= 12:
            self.dots += [Dot(x, y, width + 1, colour) for x, y in placed]


def loss_chart(facts: Facts, size: Size, name: str) -> Chart | None:
    """Training and held-out loss against the step; None where there is no finite loss."""
    curves = [thin(found) for found in (facts.losses, facts.evaluations)]
    drawn = [point for curve in curves for point in curve]
    if not drawn:
        return None
    last = max(point.step for point in (*facts.losses, *facts.evaluations))
    low, high = min(loss for _, loss in drawn), max(loss for _, loss in drawn)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 0.5
    chart = Chart(
        size=size,
        name=name,
        title="Loss by step",
        description=_described(facts),
        below="step",
        across=(-0.02 * last, last * 1.02 or 1),
        up=(low - margin, high + margin),
        most=8 if size.width > 500 else 5,
    )
    for points, colour, width in zip(curves, ("--train", "--accent"), (1.6, 2.2), strict=True):
        if points:
            chart.curve(points, colour, width)
    _mark_evaluations(chart, facts)
    return chart


def _mark_evaluations(chart: Chart, facts: Facts) -> None:
    """The base model, and the lowest loss."""
    if facts.evaluations and facts.evaluations[0].step == 0:
        base = facts.evaluations[0].loss
        chart.dots.append(Dot(chart.x(0), chart.y(base), 4, "--accent", hollow=True))
    if best := facts.best:
        chart.mark = chart.x(best.step)
        low, high = chart.up
        chart.dots.append(Dot(chart.mark, chart.y(min(max(best.loss, low), high)), 4, "--good"))


def _described(facts: Facts) -> str:
    said = []
    if facts.losses:
        first, last = tables.loss(facts.losses[0].loss), tables.loss(facts.losses[-1].loss)
        said.append(f"Training from {first} to {last}")
    if best := facts.best:
        said.append(f"on held-out rows the lowest is {tables.loss(best.loss)} at step {best.step}")
    return "; ".join(said) or "On held-out rows only"


def length_chart(facts: Facts, size: Size, name: str) -> Chart | None:
    """Rows by their length in tokens, with maxSequenceLength marked; None without a histogram."""
    bins = facts.dataset.histogram
    if not bins:
        return None
    width, longest = bins[0][0], bins[-1][0]
    limit = facts.dataset.max_sequence_length or 0
    inside = limit <= longest * 1.5  # a line far to the right would squeeze the bars
    chart = Chart(
        size=size,
        name=name,
        title="Rows by their length in tokens",
        description=f"The longest has up to {tables.count(longest)} tokens; "
        f"training.maxSequenceLength is {tables.count(limit)}",
        below="tokens of an example",
        across=(0, (max(longest, limit) if inside else longest) * 1.04),
        up=(0, max(rows for _, rows in bins) * 1.2 or 1),
        most=6,
    )
    for up_to, rows in bins:
        x, y = chart.x(up_to - width), chart.y(rows)
        end = chart.x(up_to - 0.1 * width)
        chart.bars.append((x, y, round(end - x, 1), round(chart.bottom - y, 1)))
    if limit:
        chart.mark = chart.x(limit) if inside else None
        arrow = "" if inside else " \N{RIGHTWARDS ARROW}"
        chart.note = (
            (chart.mark or chart.right) - 5,
            f"maxSequenceLength {tables.count(limit)}{arrow}",
        )
    return chart


def thin(losses: Sequence[LossPoint]) -> list[tuple[float, float]]:
    """At most MOST_POINTS steps and losses, each the mean of its neighbours."""
    size = -(-len(losses) // MOST_POINTS) or 1
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [
        (sum(p.step for p in part) / len(part), sum(p.loss for p in part) / len(part))
        for part in parts
    ]


def ticks(low: float, high: float, most: int, least: float = 0) -> list[float]:
    """At most `most` round numbers between two, 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (step * power for step in (1, 2, 5, 10, 20))
    step = next(s for s in steps if s >= least and math.floor((high - low) / s) < most)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _places(value: float) -> int:
    """Digits behind the point."""
    return len(f"{value:.6f}".rstrip("0").partition(".")[2])


def short(value: float, places: int) -> str:
    """A number that fits beside an axis."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / min(unit, 1e3 if letter == 'k' else unit):g}{letter}"
    return f"{value:.{places}f}"
