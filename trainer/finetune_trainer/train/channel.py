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
from typing import Any, TextIO
from uuid import uuid4

from finetune_trainer.outcome import Notice

NAME = "messages"
POINT = "point"
DRAIN_SECONDS = 2.0


class Channel:
    """The worker's end; also a publisher for its Reporter."""

    def __init__(self, room: Path) -> None:
        self._stream = (room / NAME).open("w", encoding="utf-8")
        self._lock = threading.Lock()

    def publish(self, progress: dict[str, Any]) -> None:
        """Fields of status.progress."""
        self._send(progress=progress)

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
    path = room / NAME
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    # Open for both, so that it neither waits for a worker nor ends when the first one closes it.
    descriptor = os.open(path, os.O_RDWR)
    lock, closed = threading.Lock(), threading.Event()
    errors: list[Exception] = []
    reached: dict[str, threading.Event] = {}

    def read(stream: TextIO) -> None:
        with stream:
            for line in stream:
                message = _parse(line)
                if message == {}:
                    return
                if point := message.get(POINT):
                    reached[point].set()
                    continue
                try:
                    handle(message)
                except Exception as error:  # raised below, where somebody can answer for it
                    errors.append(error)

    def send(text: str) -> None:
        with lock:
            if not closed.is_set():
                # On a line of its own, also after what a killed worker began to write.
                os.write(descriptor, f"\n{text}\n".encode())

    def drain() -> None:
        point = uuid4().hex
        reached[point] = threading.Event()
        send(json.dumps({POINT: point}))
        reached[point].wait(DRAIN_SECONDS)

    stream = os.fdopen(os.dup(descriptor), encoding="utf-8", errors="replace")
    reader = threading.Thread(target=read, args=(stream,), name="messages", daemon=True)
    reader.start()
    try:
        yield drain
    finally:
        send("{}")
        reader.join()
        with lock:
            closed.set()
            os.close(descriptor)
    if errors:
        raise errors[0]


def _parse(line: str) -> dict[str, Any]:
    """A message; something without meaning for an empty line, or one that was cut off."""
    try:
        message = json.loads(line)
    except ValueError:
        return {"nothing": True}
    return message if isinstance(message, dict) else {"nothing": True}
