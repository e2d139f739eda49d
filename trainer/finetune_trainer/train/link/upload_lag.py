"""How far a training may run ahead of its checkpoints in the store: one interval, and no further.

    step      0 ------- 5 ------- 10 ------- 15        checkpointSteps: 10
    written             5         10         15        every half interval
    stored                        5          10        each has the other half for its upload

So a kill at any moment costs one interval at most. Where the store is slower than that, the
training waits for it. The stage uploads. It writes the step of the newest checkpoint that it is
done with to a file, and the worker reads it. A checkpoint that the store refuses counts as done,
with a warning, so that an outage doesn't stop the training: only then may a kill cost more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 600.0  # where training.checkpointSteps is left out
STORED_STEP = "stored-step"


def write_stored_step(workdir: Path, step: int) -> None:
    """The stage's end: all checkpoints up to this step are done with."""
    draft = workdir / f"{STORED_STEP}.new"
    draft.write_text(str(step), encoding="ascii")
    draft.replace(workdir / STORED_STEP)


def read_stored_step(workdir: Path) -> int | None:
    """The worker's end; None where nobody uploads."""
    try:
        return int((workdir / STORED_STEP).read_text(encoding="ascii"))
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A checkpoint on disk."""

    step: int
    at: float
    """When it was written: in steps, or in seconds on the clock."""


class UploadLag:
    """The checkpoints on disk, from the newest one in the store on."""

    def __init__(
        self, steps: int | None, workdir: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = steps
        self._workdir = workdir
        self._clock = clock
        self._interval = float(steps) if steps else INTERVAL_SECONDS
        self._half = float(max(steps // 2, 1)) if steps else INTERVAL_SECONDS / 2
        self._written: list[WrittenCheckpoint] = []
        self.start_from(0)

    def start_from(self, step: int) -> None:
        """The training begins, or goes on, with so many steps done."""
        stored = read_stored_step(self._workdir)
        self._written = [self._now(step)]
        if stored is not None and stored < step:  # a worker failed, and its last step is on disk
            self._written.insert(0, self._now(stored))

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of this step should be written."""
        now = self._now(step).at
        return now - self._written[-1].at >= self._half or now - self._stored_at() >= self._interval

    def add_written(self, step: int) -> None:
        self._written.append(self._now(step))

    def must_wait(self) -> bool:
        """Whether the disk is an interval ahead of the store: no further step may begin."""
        return len(self._written) > 1 and self._written[-1].at - self._stored_at() >= self._interval

    def _stored_at(self) -> float:
        """When the newest checkpoint in the store was written. Forgets those before it."""
        stored = read_stored_step(self._workdir)
        newest = self._written[-1].step if stored is None else stored
        while len(self._written) > 1 and self._written[1].step <= newest:
            self._written.pop(0)
        return self._written[0].at

    def _now(self, step: int) -> WrittenCheckpoint:
        return WrittenCheckpoint(step, float(step) if self._steps else self._clock())
