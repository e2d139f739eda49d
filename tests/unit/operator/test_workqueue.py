"""The work queue, on a clock that the test winds."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from finetune_operator.workqueue import BASE_DELAY, JITTER, MAX_DELAY, WorkQueue


class Handle:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    """Time that stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Handle, Callable[[], None]]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Handle:
        handle = Handle()
        heapq.heappush(self._timers, (self.now + delay, next(self._order), handle, callback))
        return handle

    @property
    def pending(self) -> list[float]:
        return sorted(due for due, _, handle, _ in self._timers if not handle.cancelled)

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        while self._timers and self._timers[0][0] <= self.now:
            _, _, handle, callback = heapq.heappop(self._timers)
            if not handle.cancelled:
                callback()
        await settle()


async def settle() -> None:
    """Let every task go on as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


class Work:
    """What the queue calls; each call is recorded, and may be held up or fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers: list[float | Exception | None] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once = 0
        self.most_at_once = 0

    async def __call__(self, key: str) -> float | None:
        self.calls.append(key)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
        finally:
            self.at_once -= 1
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer


@asynccontextmanager
async def running(
    work: Work, clock: FakeClock, workers: int = 2, chance: float = 0.0
) -> AsyncIterator[WorkQueue]:
    queue = WorkQueue(work, clock, chance=lambda: chance, expected=(ValueError,))
    task = asyncio.create_task(queue.run(workers))
    await settle()
    yield queue
    work.gate.set()
    queue.stop()
    await asyncio.wait_for(task, 5)


async def test_a_key_is_processed() -> None:
    work = Work()
    async with running(work, FakeClock()) as queue:
        queue.add("a")
        await settle()
    assert work.calls == ["a"]


async def test_a_key_added_many_times_before_a_worker_is_free_is_processed_once() -> None:
    work = Work()
    async with running(work, FakeClock()) as queue:
        for _ in range(10):
            queue.add("a")
        await settle()
    assert work.calls == ["a"]


async def test_a_key_is_never_processed_by_two_workers() -> None:
    work = Work()
    work.gate.clear()
    async with running(work, FakeClock(), workers=3) as queue:
        queue.add("a")
        await settle()
        queue.add("a")
        await settle()
        assert work.calls == ["a"]
        assert work.most_at_once == 1


async def test_a_key_added_while_it_is_processed_is_processed_once_more() -> None:
    work = Work()
    work.gate.clear()
    async with running(work, FakeClock()) as queue:
        queue.add("a")
        await settle()
        queue.add("a")
        queue.add("a")
        work.gate.set()
        await settle()
    assert work.calls == ["a", "a"]


async def test_different_keys_are_processed_at_the_same_time() -> None:
    work = Work()
    work.gate.clear()
    async with running(work, FakeClock(), workers=2) as queue:
        for key in "abc":
            queue.add(key)
        await settle()
        assert sorted(work.calls) == ["a", "b"]
        work.gate.set()
        await settle()
    assert sorted(work.calls) == ["a", "b", "c"]


async def test_a_pass_may_ask_for_another_later() -> None:
    work, clock = Work(), FakeClock()
    work.answers = [30.0]
    async with running(work, clock) as queue:
        queue.add("a")
        await settle()
        await clock.advance(29)
        assert work.calls == ["a"]
        await clock.advance(1)
        assert work.calls == ["a", "a"]


async def test_an_event_comes_before_a_later_pass_and_replaces_it() -> None:
    work, clock = Work(), FakeClock()
    work.answers = [30.0]
    async with running(work, clock) as queue:
        queue.add("a")
        await settle()
        queue.add("a")
        await settle()
        assert clock.pending == []
    assert work.calls == ["a", "a"]


@pytest.mark.parametrize("delays", [(5.0, 50.0), (50.0, 5.0)])
async def test_the_earliest_of_several_wishes_wins(delays: tuple[float, float]) -> None:
    work, clock = Work(), FakeClock()
    async with running(work, clock) as queue:
        for delay in delays:
            queue.add_later("a", delay)
        assert clock.pending == [5.0]
        await clock.advance(100)
    assert work.calls == ["a"]


async def test_failures_come_back_after_twice_the_time_each() -> None:
    work, clock = Work(), FakeClock()
    work.answers = [ValueError("no")] * 4
    async with running(work, clock) as queue:
        queue.add("a")
        await settle()
        pauses = []
        for _ in range(4):
            pauses.append(clock.pending[0] - clock.now)
            await clock.advance(pauses[-1])
    assert pauses == [BASE_DELAY, BASE_DELAY * 2, BASE_DELAY * 4, BASE_DELAY * 8]


async def test_no_failure_waits_longer_than_the_cap() -> None:
    work, clock = Work(), FakeClock()
    work.answers = [ValueError("no")] * 2000
    async with running(work, clock) as queue:
        queue.add("a")
        await settle()
        for _ in range(1200):  # enough to overflow a float if the exponent were not bounded
            await clock.advance(MAX_DELAY)
        assert clock.pending[0] - clock.now == MAX_DELAY


async def test_failures_are_spread_by_chance() -> None:
    work, clock = Work(), FakeClock()
    work.answers = [ValueError("no")]
    async with running(work, clock, chance=1.0) as queue:
        queue.add("a")
        await settle()
        assert clock.pending == [BASE_DELAY * (1 - JITTER)]


async def test_a_burst_of_events_does_not_make_the_pause_longer() -> None:
    work, clock = Work(), FakeClock()
    work.answers = [ValueError("no")] * 51
    async with running(work, clock) as queue:
        for _ in range(50):
            queue.add("a")
            await clock.advance(0.001)
        assert len(work.calls) == 50
        assert clock.pending[0] - clock.now == pytest.approx(BASE_DELAY, abs=0.002)
        await clock.advance(BASE_DELAY)
        assert clock.pending[0] - clock.now == BASE_DELAY * 2


async def test_a_success_forgets_the_failures() -> None:
    work, clock = Work(), FakeClock()
    work.answers = [ValueError("no"), ValueError("no"), None, ValueError("no")]
    async with running(work, clock) as queue:
        queue.add("a")
        await settle()
        await clock.advance(10)
        await clock.advance(10)
        queue.add("a")
        await settle()
        assert clock.pending[0] - clock.now == BASE_DELAY


async def test_only_unexpected_failures_are_logged_with_a_stack_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    work, clock = Work(), FakeClock()
    work.answers = [ValueError("expected"), TypeError("a bug")]
    with caplog.at_level(logging.WARNING):
        async with running(work, clock) as queue:
            queue.add("a")
            await settle()
            await clock.advance(BASE_DELAY)
    traces = [(record.getMessage(), bool(record.exc_info)) for record in caplog.records]
    assert traces == [("expected; again in 0.5 s", False), ("a bug; again in 1.0 s", True)]


async def test_stopping_finishes_what_is_under_way_and_drops_the_rest() -> None:
    work, clock = Work(), FakeClock()
    work.gate.clear()
    queue = WorkQueue(work, clock)
    task = asyncio.create_task(queue.run(1))
    await settle()
    queue.add("a")
    await settle()
    queue.add("b")
    queue.add_later("c", 1)
    queue.stop()
    await settle()
    assert not task.done()
    work.gate.set()
    await asyncio.wait_for(task, 5)
    queue.add("d")
    assert work.calls == ["a"]
    assert clock.pending == []


async def test_a_paused_queue_keeps_what_is_added_and_goes_on_with_it() -> None:
    work, clock = Work(), FakeClock()
    async with running(work, clock) as queue:
        queue.pause()
        queue.add("a")
        queue.add("b")
        await settle()
        assert work.calls == []
        assert (queue.depth, queue.age) == (0, 0.0), "a standby is not behind"
        queue.resume()
        await settle()
        assert work.calls == ["a", "b"]


async def test_a_paused_queue_can_be_stopped() -> None:
    queue = WorkQueue(Work(), FakeClock())
    queue.pause()
    task = asyncio.create_task(queue.run(2))
    await settle()
    queue.stop()
    await asyncio.wait_for(task, 5)
