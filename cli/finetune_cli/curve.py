"""A line drawn in text: the loss over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]  # step, loss

# Bits of a braille character's dots, by column (2) and row (4).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
_LABEL = 8  # characters for the scale on the left, the axis included


def draw(points: Sequence[Point], width: int, height: int, *, ascii_only: bool = False) -> str:
    """The line through finite points as `height` lines of at most `width` characters.

    Empty where there are fewer than two points, or no room.
    """
    known = sorted({step: loss for step, loss in points if math.isfinite(loss)}.items())
    columns = width - _LABEL
    if len(known) < 2 or columns < 4 or height < 2:
        return ""
    across, down = (1, 1) if ascii_only else (2, 4)
    low, high = min(loss for _, loss in known), max(loss for _, loss in known)
    span = (high - low) or 1.0
    filled = [0] * (columns * height)
    for x, loss in enumerate(_resampled(known, columns * across)):
        y = round((high - loss) / span * (height * down - 1))
        filled[(y // down) * columns + x // across] |= _DOTS[x % across][y % down]
    rows = [filled[n * columns : (n + 1) * columns] for n in range(height)]
    labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
    bar, mark = ("|", "*") if ascii_only else ("┤", "")
    return "\n".join(
        f"{label:>{_LABEL - 2}} {bar}" + "".join(_character(bits, mark) for bits in row).rstrip()
        for label, row in zip(labels, rows, strict=True)
    )


def _character(bits: int, mark: str) -> str:
    if not bits:
        return " "
    return mark or chr(_BLANK + bits)


def _resampled(known: Sequence[Point], count: int) -> list[float]:
    """`count` values at equal distances along the steps, between the points by a straight line."""
    first, last = known[0][0], known[-1][0]
    found, after = [], 1
    for n in range(count):
        step = first + (last - first) * n / (count - 1)
        while after < len(known) - 1 and known[after][0] < step:
            after += 1
        (x0, y0), (x1, y1) = known[after - 1], known[after]
        share = min(1.0, max(0.0, (step - x0) / (x1 - x0)))
        found.append(y0 + (y1 - y0) * share)
    return found
