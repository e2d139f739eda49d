"""What passes while a training runs.

The way up is JSON lines through a FIFO. The stage owns the status, the store and the decisions. The
worker only says what happens. A FIFO works through any number of processes in between, such as
torchrun.

The way down is a file with the step of the newest checkpoint that the stage is done with. By it the
worker knows how far it may run ahead of the store: one interval, and no further.

    step      0 ------- 5 ------- 10 ------- 15        checkpointSteps: 10
    written             5         10         15        every half interval
    stored                        5          10        each has the other half for its upload

So a kill at any moment costs one interval at most. Where the store is slower than that, the
training waits for it. A checkpoint that the store refuses counts as done, with a warning, so that
an outage doesn't stop the training: only then may a kill cost more.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from finetune_trainer.contract import Base, Notice, Progress

FIFO = "messages"
DRAIN_MARK = "drained"
DRAIN_SECONDS = 2.0
ALIVE_SECONDS = 0.5  # between two signs of life


class CheckpointOnDisk(Base):
    """A checkpoint that is complete on disk."""

    step: int
    folder: Path


class WorkerMessage(Base):
    """One line. It has one of these fields."""

    progress: Progress | None = None
    """Changes of status.progress: a field that is set to None is cleared, one left out stays."""

    notice: Notice | None = None
    checkpoint: CheckpointOnDisk | None = None
    alive: bool | None = None
    """A sign of life, while there is nothing else to say."""


class Channel:
    """The worker's end. It is also the publisher of the worker's Reporter."""

    def __init__(self, workdir: Path) -> None:
        self._stream = (workdir / FIFO).open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._lived_at = 0.0

    def publish(self, changes: Progress) -> None:
        self._send(WorkerMessage(progress=changes))

    def notice(self, notice: Notice) -> None:
        self._send(WorkerMessage(notice=notice))

    def checkpoint(self, step: int, folder: Path) -> None:
        self._send(WorkerMessage(checkpoint=CheckpointOnDisk(step=step, folder=folder)))

    def alive(self) -> None:
        """Say that the training isn't stuck; from its main thread, and as often as one likes."""
        now = time.monotonic()
        if now - self._lived_at >= ALIVE_SECONDS:
            self._lived_at = now
            self._send(WorkerMessage(alive=True))

    def close(self) -> None:
        self._stream.close()

    def _send(self, message: WorkerMessage) -> None:
        with self._lock:
            self._stream.write(message.model_dump_json(exclude_unset=True) + "\n")
            self._stream.flush()


Handler = Callable[[WorkerMessage], None]
Drain = Callable[[], None]


@contextmanager
def listening(workdir: Path, handle: Handler) -> Iterator[Drain]:
    """Call `handle`, in a thread, with each message that comes in while the block runs.

    When the block has ended, all that the worker sent is handled. The function that it yields
    waits, from any thread, until all that was sent so far is handled.
    """
    listener = _Listener(workdir, handle)
    try:
        yield listener.drain
    finally:
        listener.close()
    if listener.errors:
        raise listener.errors[0]


class _Listener:
    """The stage's end."""

    def __init__(self, workdir: Path, handle: Handler) -> None:
        path = workdir / FIFO
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        # Open for both, so that it neither waits for a worker nor ends when the first closes it.
        self._descriptor = os.open(path, os.O_RDWR)
        self._handle = handle
        self._lock = threading.Lock()
        self._closed = False
        self._drained: dict[str, threading.Event] = {}
        self.errors: list[Exception] = []
        self._thread = threading.Thread(target=self._read, name="messages", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        mark = uuid4().hex
        self._drained[mark] = threading.Event()
        if self._write_own({DRAIN_MARK: mark}):
            self._drained[mark].wait(DRAIN_SECONDS)

    def close(self) -> None:
        self._write_own({})  # the end
        self._thread.join()
        with self._lock:
            self._closed = True
            os.close(self._descriptor)

    def _write_own(self, line: dict[str, str]) -> bool:
        """Write to the own FIFO, behind all that the worker has sent."""
        with self._lock:
            if self._closed:
                return False
            # A killed worker may have left half a line before it.
            os.write(self._descriptor, f"\n{json.dumps(line)}\n".encode())
            return True

    def _read(self) -> None:
        with os.fdopen(os.dup(self._descriptor), encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue  # an empty line, or one that was cut off
                if found == {}:
                    return
                if isinstance(found, dict) and DRAIN_MARK in found:
                    self._drained[found[DRAIN_MARK]].set()
                    continue
                try:
                    self._handle(WorkerMessage.model_validate(found))
                except Exception as error:  # raised by `listening`, in the thread of its caller
                    self.errors.append(error)


# --- The way down ------------------------------------------------------------------------------

INTERVAL_SECONDS = 600.0  # where training.checkpointSteps is left out
FULL_INTERVAL_SECONDS = 3600.0  # of all weights, whose checkpoints are large
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
        self,
        steps: int | None,
        workdir: Path,
        clock: Callable[[], float] = time.monotonic,
        seconds: float = INTERVAL_SECONDS,
    ) -> None:
        """An interval is so many steps, or so many seconds where they are left out."""
        self._steps = steps
        self._workdir = workdir
        self._clock = clock
        self._interval = float(steps) if steps else seconds
        self._half = float(max(steps // 2, 1)) if steps else seconds / 2
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
