"""How much of a transfer is done, and of a stage's work: one share of all, and the time left.

A stage that does many things says beforehand how many seconds each should take. These are weights:
what counts is how they compare, and the pace of what is done corrects the rest.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from finetune_trainer.contract import Progress
from finetune_trainer.runtime import size

if TYPE_CHECKING:
    from finetune_trainer.runtime.reporter import Reporter

log = logging.getLogger(__name__)

TRUST = 0.1
"""Share of the whole work for which the prediction counts as much as what was measured."""


class Work:
    """Parts of a stage's work. The share that is done never goes back; any thread may call."""

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
