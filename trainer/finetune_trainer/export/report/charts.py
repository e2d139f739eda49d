"""The report's charts: SVG by matplotlib, with text as text, in the page's colours.

matplotlib draws with placeholder colours, which become the page's CSS variables, so that one
drawing serves light and dark. The same values give the same bytes: identifiers are hashed with a
fixed salt, and no date is written.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finetune_trainer.export.report.facts import Facts, LossPoint
from finetune_trainer.export.report.tables import count

MOST_POINTS = 300
"""Points of a curve; of longer trainings each is the mean of as many steps as it takes."""

INK, MUTED, GRID = "#010101", "#020202", "#030303"
TRAIN, EVAL, BEST, BARS = "#040404", "#050505", "#060606", "#070707"
SURFACE = "#080808"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    TRAIN: "--train",
    EVAL: "--accent",
    BEST: "--good",
    BARS: "--bars",
    SURFACE: "--surface",
}
_POINTS_PER_INCH = 72  # of matplotlib's SVG: one of its units is then one of the view box


@dataclass(frozen=True)
class Size:
    """Width and height in CSS pixels at which the text has its nominal size."""

    width: int
    height: int


WIDE, NARROW = Size(900, 330), Size(360, 280)
LENGTHS = Size(360, 230)


def loss_chart(facts: Facts, size: Size, name: str) -> str | None:
    """Training and held-out loss against the step; None where there is no finite loss.

    `name` keeps the identifiers apart from those of other charts of the page.
    """
    if not facts.losses and not facts.evaluations:
        return None
    with mpl.rc_context(_style(name)):
        figure, axes = _axes(size)
        _draw_training(axes, facts.losses)
        _draw_evaluations(axes, facts)
        last = max(point.step for point in (*facts.losses, *facts.evaluations))
        axes.set_xlim(-0.02 * last, last * 1.02 or 1)
        axes.set_xlabel("step")
        ticks = 8 if size.width > 500 else 5
        axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
        axes.margins(y=0.12)
        return _svg(figure, name)


def _draw_training(axes: Axes, losses: Sequence[LossPoint]) -> None:
    steps, values = thin(losses)
    axes.plot(steps, values, color=TRAIN, linewidth=1.6, marker="o", markersize=_dots(len(steps)))


def _draw_evaluations(axes: Axes, facts: Facts) -> None:
    found = facts.evaluations
    if not found:
        return
    steps, values = thin(found)
    axes.plot(steps, values, color=EVAL, linewidth=2.2, zorder=3)
    axes.plot(steps, values, "o", color=EVAL, markersize=_dots(len(steps)) + 1.5, zorder=4)
    if found[0].step == 0:
        axes.plot([0], [found[0].loss], "o", mfc=SURFACE, mec=EVAL, mew=2, markersize=8, zorder=5)
    if facts.best:
        _mark(axes, facts.best)


def _mark(axes: Axes, best: LossPoint) -> None:
    axes.axvline(best.step, color=BEST, linewidth=1.3, linestyle=(0, (4, 3)), zorder=1)
    axes.plot([best.step], [best.loss], "o", color=BEST, markersize=8, zorder=6)


def length_chart(facts: Facts, size: Size, name: str) -> str | None:
    """Rows by their length in tokens, with maxSequenceLength marked; None without a histogram."""
    bins = facts.dataset.histogram
    if not bins:
        return None
    width = bins[0][0]
    limit = facts.dataset.max_sequence_length or 0
    longest = bins[-1][0]
    with mpl.rc_context(_style(name)):
        figure, axes = _axes(size)
        lefts = [up_to - width for up_to, _ in bins]
        axes.bar(lefts, [rows for _, rows in bins], width * 0.9, align="edge", color=BARS)
        axes.set_xlim(0, longest * 1.04)
        axes.set_xlabel("tokens of an example")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(y=0.2)
        _mark_limit(axes, limit, longest)
        return _svg(figure, name)


def _mark_limit(axes: Axes, limit: int, longest: int) -> None:
    if not limit:
        return
    text = f"maxSequenceLength {count(limit)}"
    inside = limit <= longest * 1.5
    if inside:
        axes.set_xlim(0, max(longest, limit) * 1.04)
        axes.axvline(limit, color=BEST, linewidth=1.5, linestyle=(0, (4, 3)))
    else:  # a line that far to the right would squeeze the bars
        text += " \N{RIGHTWARDS ARROW}"
    place = (limit, 1.0) if inside else (1.0, 1.0)
    axes.annotate(
        text,
        place,
        xycoords=("data", "axes fraction") if inside else "axes fraction",
        xytext=(-5, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=INK,
    )


def thin(losses: Sequence[LossPoint]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS steps and losses, each the mean of its neighbours."""
    size = -(-len(losses) // MOST_POINTS) or 1
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    means = [(sum(p.step for p in part), sum(p.loss for p in part), len(part)) for part in parts]
    return [step / n for step, _, n in means], [loss / n for _, loss, n in means]


def _dots(count: int) -> float:
    return 4.5 if count <= 12 else 0.0


def _axes(size: Size) -> tuple[Figure, Axes]:
    figure = Figure((size.width / _POINTS_PER_INCH, size.height / _POINTS_PER_INCH))
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    # Fixed margins in pixels, for the browser's font is not matplotlib's.
    left, right, bottom, top = 38, 10, 44, 14
    figure.subplots_adjust(
        left / size.width, bottom / size.height, 1 - right / size.width, 1 - top / size.height
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure, axes


def _style(name: str) -> dict[Any, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page sets its own
        "font.size": 12,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }


_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _svg(figure: Figure, name: str) -> str:
    """The drawing as an element for a page: no identifiers or rules that reach outside."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=_NO_METADATA)
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"font: (\d+(?:\.\d+)?px) [^;\"]+", r"font-size: \1", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box, "matplotlib writes a view box"  # noqa: S101
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} aria-hidden="true">{rest}'
