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

from finetune_trainer.outcome import Notice

NAME = "messages"


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


@contextmanager
def listening(room: Path, handle: Handler) -> Iterator[None]:
    """Call `handle`, in a thread, with each message that comes in while the block runs.

    All that the worker sent before the block ends has been handled afterwards.
    """
    path = room / NAME
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    # Open for both, so that it neither waits for a worker nor ends when the first one closes it.
    descriptor = os.open(path, os.O_RDWR)
    errors: list[Exception] = []

    def read() -> None:
        with os.fdopen(os.dup(descriptor), encoding="utf-8") as stream:
            for line in stream:
                message = json.loads(line)
                if message == {}:
                    return
                try:
                    handle(message)
                except Exception as error:  # raised below, where somebody can answer for it
                    errors.append(error)

    reader = threading.Thread(target=read, name="messages", daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.write(descriptor, b"{}\n")
        reader.join()
        os.close(descriptor)
    if errors:
        raise errors[0]
