"""Ends a worker that hangs, e.g. in a collective or in the driver, where waiting would never end.

The worker gives signs of life through its connection, from its main thread: at each pass and step,
and while it waits for the store. When none has come for training.stallTimeout, every thread of it
writes its stack into the log, and it is killed. The stage then ends as Stalled, and the next
attempt goes on from the newest checkpoint, maybe on another node.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from finetune_trainer.contract import Training, parse_duration
from finetune_trainer.runtime import duration, lifecycle
from finetune_trainer.train.link import WorkerMessage

TICK_SECONDS = 5.0  # at most, between two looks
STACK_SECONDS = 5.0  # for writing the stacks
BEFORE_FIRST_STEP = 2  # times the timeout: the model is loaded, and kernels are compiled

log = logging.getLogger(__name__)


class StallWatch:
    """Watches over one worker, or over torchrun's."""

    def __init__(self, training: Training) -> None:
        self._timeout = parse_duration(training.stall_timeout).total_seconds()
        self._tick = min(TICK_SECONDS, self._timeout / 10)
        self._workers: set[int] = set()  # process ids
        self._silent = 0.0
        self._first_step: int | None = None
        self._limit = BEFORE_FIRST_STEP * self._timeout
        self.stalled = False
        """Whether it has ended the worker."""

    @property
    def words(self) -> str:
        return (
            f"Nothing came from the training process for {duration(self._limit)}, so it was ended "
            "(spec.training.stallTimeout). Its log shows where each of its threads was. The next "
            "attempt goes on from the newest checkpoint."
        )

    def heard(self, message: WorkerMessage) -> None:
        """The worker has said something."""
        self._silent = 0.0
        if message.process is not None:
            self._workers.add(message.process)
        step = message.progress.step if message.progress else None
        if step is None:
            return
        if self._first_step is None:
            self._first_step = step  # it says where it begins
        elif step > self._first_step:
            self._limit = self._timeout

    @contextmanager
    def over(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Watch while the block runs, which waits for the process."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(process, ended), name="stall watch")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
        while not ended.wait(self._tick):
            # Not by the clock: where the pod as a whole was frozen, the worker is not to blame.
            self._silent += self._tick
            if lifecycle.is_stopping():
                return  # the stop has its own deadline
            if self._silent >= self._limit:
                self._end(process, ended)
                return

    def _end(self, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
        self.stalled = True
        log.error("%s Where its threads are:", self.words)
        # One that was stopped by a signal writes its stack when it continues, first of all.
        for worker, number in itertools.product(self._workers, (signal.SIGUSR1, signal.SIGCONT)):
            with suppress(ProcessLookupError):
                os.kill(worker, number)
        ended.wait(STACK_SECONDS)
        process.kill()  # workers of torchrun die with it
