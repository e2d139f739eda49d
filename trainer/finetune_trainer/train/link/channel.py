"""The way back from the worker to the stage: JSON lines through a FIFO.

The stage owns the status, the store and the decisions; the worker only says what happens. A FIFO
works through any number of processes in between, such as torchrun.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from finetune_trainer.contract import Notice, Progress

NAME = "messages"
POINT = "point"
DRAIN_SECONDS = 2.0


class Channel:
    """The worker's end; also a publisher for its Reporter."""

    def __init__(self, room: Path) -> None:
        self._stream = (room / NAME).open("w", encoding="utf-8")
        self._lock = threading.Lock()

    def publish(self, changes: Progress) -> None:
        """Changes of status.progress."""
        self._send(progress=changes.model_dump(mode="json", exclude_unset=True))

    def notice(self, notice: Notice) -> None:
        """Something that people should know."""
        self._send(notice=notice.model_dump(mode="json"))

    def checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint lies complete in a folder."""
        self._send(checkpoint={"step": step, "folder": str(folder)})

    def close(self) -> None:
        """Close this end."""
        self._stream.close()

    def _send(self, **message: Any) -> None:
        with self._lock:
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()


Handler = Callable[[dict[str, Any]], None]
Drain = Callable[[], None]


@contextmanager
def listening(room: Path, handle: Handler) -> Iterator[Drain]:
    """Call `handle`, in a thread, with each message that comes in while the block runs.

    All that the worker sent before the block ends has been handled afterwards. The function that
    it yields waits, from any thread, until all that was sent so far is handled.
    """
    listener = _Listener(room, handle)
    try:
        yield listener.drain
    finally:
        listener.close()
    if listener.errors:
        raise listener.errors[0]


class _Listener:
    """The stage's end."""

    def __init__(self, room: Path, handle: Handler) -> None:
        path = room / NAME
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        # Open for both, so that it neither waits for a worker nor ends when the first closes it.
        self._descriptor = os.open(path, os.O_RDWR)
        self._handle = handle
        self._lock = threading.Lock()
        self._closed = False
        self._reached: dict[str, threading.Event] = {}
        self.errors: list[Exception] = []
        self._thread = threading.Thread(target=self._read, name="messages", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Wait until all that was sent so far is handled."""
        point = uuid4().hex
        self._reached[point] = threading.Event()
        if self._send(json.dumps({POINT: point})):
            self._reached[point].wait(DRAIN_SECONDS)

    def close(self) -> None:
        """Handle what was sent, and end."""
        self._send("{}")
        self._thread.join()
        with self._lock:
            self._closed = True
            os.close(self._descriptor)

    def _send(self, text: str) -> bool:
        with self._lock:
            if self._closed:
                return False
            # On a line of its own, also after what a killed worker began to write.
            os.write(self._descriptor, f"\n{text}\n".encode())
            return True

    def _read(self) -> None:
        with os.fdopen(os.dup(self._descriptor), encoding="utf-8", errors="replace") as stream:
            for message in map(_parse, stream):
                if message == {}:
                    return
                if point := message.get(POINT):
                    self._reached[point].set()
                    continue
                try:
                    self._handle(message)
                except Exception as error:  # raised where somebody can answer for it
                    self.errors.append(error)


def _parse(line: str) -> dict[str, Any]:
    """A message; something without meaning for an empty line, or one that was cut off."""
    try:
        message = json.loads(line)
    except ValueError:
        return {"nothing": True}
    return message if isinstance(message, dict) else {"nothing": True}
