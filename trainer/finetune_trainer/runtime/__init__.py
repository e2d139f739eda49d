"""How a process of the trainer lives and ends. Below are the units in which it speaks to people.

lifecycle  its log, whom it trusts, what an error means, what is saved when it is told to stop
reporter   how far the work is, in the log and in status.progress
work       a stage's parts and transfers: the share that is done, and the time left
child      programs that it runs beside itself
"""

from __future__ import annotations

import math
from datetime import UTC, datetime

GIB = 2**30
MIB = 2**20


def binary(count: int, *, up: bool = False) -> str:
    """E.g. 6.1 GiB or 84 MiB; with `up` rounded up, as a limit that is enough: 7Gi or 84Mi."""
    if up:
        return f"{math.ceil(count / GIB)}Gi" if count >= GIB else f"{math.ceil(count / MIB)}Mi"
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that can't be written."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def duration(seconds: float) -> str:
    """Write seconds as 4m10s or 2h05m."""
    whole = max(round(seconds), 0)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def timestamp() -> str:
    """Now, in UTC, as RFC 3339 writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def size(count: int) -> str:
    """Write bytes with the unit that fits, as 105 MB or 2.1 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
