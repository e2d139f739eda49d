"""The way up from the worker to the stage: JSON lines through a FIFO.

The stage owns the status, the store and the decisions. The worker only says what happens. A FIFO
works through any number of processes in between, such as torchrun.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
