"""How a process of the trainer lives and ends. Below: how much of its work is done, and the units
in which it speaks to people.

lifecycle  its log, whom it trusts, what an error means, what is saved when it is told to stop
reporter   how far the work is, in the log and in status.progress
child      programs that it runs beside itself
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from finetune_trainer.contract import Progress

if TYPE_CHECKING:
    from finetune_trainer.runtime.reporter import Reporter

log = logging.getLogger(__name__)

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


TRUST = 0.1
"""Share of the whole work for which the prediction counts as much as what was measured."""


class Work:
    """Parts of a stage's work, one share of all, and the time left. It is said beforehand how many
    seconds each should take. These are weights: what counts is how they compare, and the pace of
    what is done corrects the rest.

    The share that is done never goes back; any thread may call.
    """

    def __init__(
        self, seconds: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`seconds` is what each part should take."""
        self._seconds = {name: max(0.0, value) for name, value in seconds.items()}
        self._shares = dict.fromkeys(self._seconds, 0.0)
        self._skipped: set[str] = set()
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()

    def advance(self, part: str, share: float) -> None:
        """So much of a part is done, 0 to 1. A part that nobody expected doesn't count."""
        with self._lock:
            if part in self._shares:
                self._shares[part] = min(1.0, max(self._shares[part], share))

    def reweigh(self, seconds: Mapping[str, float]) -> None:
        """More is known now: what each part should take. What is done stays so."""
        with self._lock:
            self._shares = {name: self._shares.get(name, 0.0) for name in seconds}
            self._seconds = {name: max(0.0, value) for name, value in seconds.items()}

    def skip(self, part: str) -> None:
        """What is left of a part needn't be done, so that it says nothing of the pace."""
        with self._lock:
            if self._shares.get(part, 1.0) < 1.0:
                self._shares[part] = 1.0
                self._skipped.add(part)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self._seconds)

    @property
    def share(self) -> float:
        """What is done of all, 0 to 1."""
        total = sum(self._seconds.values())
        return self._sum(self._shares) / total if total else 0.0

    @property
    def seconds_left(self) -> float:
        """How long the rest takes, by the prediction and by the pace so far."""
        total = sum(self._seconds.values())
        worked = self._sum(name for name in self._shares if name not in self._skipped)
        trust = TRUST * total
        pace = (self._clock() - self._began + trust) / (worked + trust) if total else 1.0
        return (total - self._sum(self._shares)) * pace

    def _sum(self, names: Iterable[str]) -> float:
        with self._lock:
            # What is known may have changed since the names were read.
            return sum(self._seconds.get(name, 0.0) * self._shares.get(name, 0.0) for name in names)


class Transfer:
    """Shows how far a download or upload is; called with bytes, from any thread."""

    def __init__(
        self,
        reporter: Reporter,
        what: str,
        total_bytes: int,
        share: Callable[[float], None] | None = None,
    ) -> None:
        self._reporter = reporter
        self._share = share
        self._what = what
        self._total = max(total_bytes, 1)
        self._done = 0
        self._lock = threading.Lock()
        self._logged_percent = 0
        reporter.message(f"{what} ({size(total_bytes)})")

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            percent = min(100 * self._done // self._total, 100)
            done = self._done
            loud = percent >= self._logged_percent + 25 and self._total > 100 << 20
            if loud:
                self._logged_percent = percent
        text = f"{self._what}: {percent}% of {size(self._total)}"
        if loud:
            log.info("%s", text)
        if self._share:
            self._share(done / self._total)
        self._reporter.update(Progress(message=text))
