"""Uploads checkpoints in a thread of its own, beside the training (see lead)."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.contract import StageError, TrainingPlan
from finetune_trainer.train.supervisor.checkpoints import CheckpointStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Local:
    """A complete checkpoint on disk."""

    step: int
    folder: Path
    plan: TrainingPlan
    max_sequence_length: int


class Uploader:
    """Brings the newest checkpoint to the store; an older one that still waits is left out.

    On disk the newest one is kept, for a worker that starts again in this process.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._waiting: Local | None = None
        self._uploading: Local | None = None
        self._closing = False
        self._done_with: Callable[[int], None] = lambda _: None
        self._thread = threading.Thread(target=self._loop, name="checkpoints", daemon=True)
        self.newest: Local | None = None
        """The newest complete checkpoint on disk."""

        self.stored: int | None = None
        """Step of the newest checkpoint in the store."""

        self.seconds = 0.0
        """What the last upload took."""

    def start(
        self, fetched: Local | None = None, done_with: Callable[[int], None] = lambda _: None
    ) -> None:
        """Begin; `fetched` is what was found in the store.

        `done_with` is told the step of each checkpoint that is stored or can't be, the first time
        at once: of what was fetched, or 0.
        """
        if fetched:
            self.newest, self.stored = fetched, fetched.step
        self._done_with = done_with
        self._done_with(self.stored or 0)
        self._thread.start()

    def offer(self, checkpoint: Local) -> None:
        """A further checkpoint is complete on disk."""
        with self._changed:
            if checkpoint == self.newest:
                return
            before, self.newest = self.newest, checkpoint
            self._waiting = checkpoint
            self._changed.notify_all()
            if before and before != self._uploading:
                self._remove(before)

    def finish(self, deadline: float) -> int | None:
        """Wait until everything is in the store, or until the deadline; returns `stored`.

        What could not be uploaded before is tried once more.
        """
        with self._changed:
            newest = self.newest
            idle = self._waiting is None and self._uploading is None
            if newest and idle and newest.step != self.stored:
                self._waiting = newest
                self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._waiting is None and self._uploading is None,
                timeout=max(deadline - time.monotonic(), 0),
            )
            return self.stored

    def close(self) -> None:
        """End; an upload in progress is finished, one that waits is not begun."""
        with self._changed:
            self._closing = True
            self._waiting = None
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while checkpoint := self._take():
            began = time.monotonic()
            stored = self._upload(checkpoint)
            with self._changed:
                if stored:
                    self.stored = checkpoint.step
                    self.seconds = time.monotonic() - began
                self._uploading = None
                if self.newest is not checkpoint:
                    self._remove(checkpoint)
                self._changed.notify_all()
            self._done_with(checkpoint.step)
            if stored:
                self._prune(checkpoint.step)

    def _take(self) -> Local | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closing)
            self._uploading, self._waiting = self._waiting, None
            return self._uploading

    def _upload(self, checkpoint: Local) -> bool:
        try:
            self._store.save(
                checkpoint.folder, checkpoint.step, checkpoint.plan, checkpoint.max_sequence_length
            )
        except Exception as error:  # whatever it is: the training may wait for this thread
            log.warning(
                "The checkpoint of step %d is not in the store, the training goes on: %s",
                checkpoint.step,
                error,
            )
            return False
        log.info("Checkpoint of step %d saved", checkpoint.step)
        return True

    def _prune(self, newest: int) -> None:
        try:
            self._store.prune(newest)
        except (StageError, OSError) as error:
            log.warning("Older checkpoints stay in the store: %s", error)

    def _remove(self, checkpoint: Local) -> None:
        if self.newest is None or self.newest.folder != checkpoint.folder:
            shutil.rmtree(checkpoint.folder, ignore_errors=True)
