"""A keyed work queue: many events about one object become one pass over it.

At most one worker processes a key at a time. A key that is added meanwhile is processed once more
afterwards: no event is lost, and a hundred events cost one pass. A failed key is retried with
exponential backoff and jitter, and a success resets the backoff. Only a try whose time had come
makes the delay longer: a burst of events about an object that can't be written doesn't. Otherwise
the design is that of the rate-limited work queue of controllers in Go.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

logger = logging.getLogger(__name__)

BASE_DELAY = 0.5  # seconds after the first failure
MAX_DELAY = 300.0  # seconds between two tries at most
JITTER = 0.25  # random share of a delay, so that failures don't retry at the same time

Process = Callable[[str], Awaitable[float | None]]


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> None:
        """Cancel it."""


class Clock(Protocol):
    """The part of an event loop that deals with time."""

    def time(self) -> float:
        """Seconds on a monotonic clock."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """Call back after some seconds."""


class WorkQueue:
    """Keys to process, now or later. Not thread-safe."""

    def __init__(
        self,
        process: Process,
        clock: Clock | None = None,
        chance: Callable[[], float] = random.random,
        expected: tuple[type[Exception], ...] = (),
    ) -> None:
        self._process = process
        self._expected = expected  # failures that are logged without a stack trace
        self._clock = clock
        self._chance = chance
        self._ready: dict[str, float] = {}  # and since when, in the order in which they came
        self._active: set[str] = set()
        self._again: set[str] = set()
        self._later: dict[str, tuple[float, Timer]] = {}
        self._failures: dict[str, tuple[int, float]] = {}  # how many, and when it is tried again
        self._arrived = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._closing = False

    @property
    def clock(self) -> Clock:
        """The clock given, or the running event loop."""
        return self._clock or asyncio.get_running_loop()

    @property
    def depth(self) -> int:
        """How many keys wait for a worker; none while the queue is paused."""
        return len(self._ready) if self._open.is_set() else 0

    @property
    def age(self) -> float:
        """Seconds that the first of them has waited."""
        return self.clock.time() - next(iter(self._ready.values())) if self.depth else 0.0

    def add(self, key: str) -> None:
        """Process this key as soon as a worker is free."""
        if self._closing:
            return
        self._cancel_timer(key)
        if key in self._active:
            self._again.add(key)
        elif key not in self._ready:
            self._ready[key] = self.clock.time()
            self._arrived.set()

    def add_later(self, key: str, delay: float) -> None:
        """Process this key after some seconds; the earliest of several times counts."""
        due = self.clock.time() + delay
        if self._closing or key in self._ready or key in self._again:
            return
        if key in self._later:
            if self._later[key][0] <= due:
                return
            self._cancel_timer(key)
        timer = self.clock.call_later(delay, lambda: self.add(key))
        self._later[key] = (due, timer)

    def pause(self) -> None:
        """Begin no further pass; those in progress go on."""
        self._open.clear()

    def resume(self) -> None:
        """Go on with what has been added."""
        self._open.set()

    async def run(self, workers: int) -> None:
        """Process keys until `stop` is called, and finish the passes in progress."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._work())

    def stop(self) -> None:
        """Take no more keys and let `run` return."""
        self._closing = True
        self._ready.clear()
        for key in list(self._later):
            self._cancel_timer(key)
        self._arrived.set()
        self._open.set()

    async def _work(self) -> None:
        while not self._closing:
            await self._open.wait()
            if self._closing:
                return
            if not self._ready:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            key = next(iter(self._ready))
            del self._ready[key]
            await self._pass(key)

    async def _pass(self, key: str) -> None:
        self._active.add(key)
        try:
            delay = await self._process(key)
        except Exception as error:  # one key's failure must not end the worker
            delay = self._failed(key)
            trace = None if isinstance(error, self._expected) else error
            logger.warning(
                "%s; again in %.1f s", error, delay, exc_info=trace, extra={"finetunejob": key}
            )
        else:
            self._failures.pop(key, None)
        finally:
            self._active.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
        elif delay is not None:
            self.add_later(key, delay)

    def _failed(self, key: str) -> float:
        """Count a failure, and return how long to wait."""
        now = self.clock.time()
        failures, due = self._failures.get(key, (0, now))
        if now >= due:
            failures += 1
        # The exponent is bounded, since a float overflows after a thousand failures.
        delay = min(MAX_DELAY, BASE_DELAY * 2.0 ** min(failures - 1, 16))
        delay *= 1 - JITTER * self._chance()
        self._failures[key] = failures, now + delay
        return delay

    def _cancel_timer(self, key: str) -> None:
        entry = self._later.pop(key, None)
        if entry is not None:
            entry[1].cancel()
