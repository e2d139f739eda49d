"""How far a training may run ahead of its checkpoints in the store: one interval, and no further.

    step      0 ------- 5 ------- 10 ------- 15        checkpointSteps: 10
    written             5         10         15        every half interval
    stored                        5          10        each has the other half for its upload

So a kill at any moment costs one interval at most. Where the store is slower than that, the
training waits for it. The stage, which uploads, leaves the step of the newest checkpoint that it is
done with in a file, which the worker reads. One that the store refuses counts as done, with a
warning, so that an outage doesn't stop the training: only then may a kill cost more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 600.0  # where training.checkpointSteps is left out
STORED = "stored"


def tell_stored(room: Path, step: int) -> None:
    """The stage's end: checkpoints up to this step are done with."""
    draft = room / f"{STORED}.new"
    draft.write_text(str(step), encoding="ascii")
    draft.replace(room / STORED)


def read_stored(room: Path) -> int | None:
    """The worker's end; None where nobody uploads."""
    try:
        return int((room / STORED).read_text(encoding="ascii"))
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Mark:
    """A checkpoint, and when it was written: in steps, or in seconds on the clock."""

    step: int
    at: float


class Lead:
    """The checkpoints from the newest one in the store on."""

    def __init__(
        self, steps: int | None, room: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = steps
        self._room = room
        self._clock = clock
        self._interval = float(steps) if steps else INTERVAL_SECONDS
        self._half = float(max(steps // 2, 1)) if steps else INTERVAL_SECONDS / 2
        self._marks: list[Mark] = []
        self.begin(0)

    def begin(self, step: int) -> None:
        """The training begins, or goes on, with so many steps done."""
        stored = read_stored(self._room)
        self._marks = [self._mark(step)]
        if stored is not None and stored < step:  # a worker failed, and its last step is on disk
            self._marks.insert(0, self._mark(stored))

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of this step should be written."""
        now = self._mark(step).at
        return now - self._marks[-1].at >= self._half or now - self._secured() >= self._interval

    def written(self, step: int) -> None:
        """A checkpoint of this step is on disk."""
        self._marks.append(self._mark(step))

    def is_whole(self) -> bool:
        """Whether what is on disk is an interval ahead of the store: no further step may begin."""
        return len(self._marks) > 1 and self._marks[-1].at - self._secured() >= self._interval

    def _secured(self) -> float:
        """When the newest checkpoint in the store was written; forgets those before it."""
        stored = read_stored(self._room)
        newest = self._marks[-1].step if stored is None else stored
        while len(self._marks) > 1 and self._marks[1].step <= newest:
            self._marks.pop(0)
        return self._marks[0].at

    def _mark(self, step: int) -> Mark:
        return Mark(step, float(step) if self._steps else self._clock())
