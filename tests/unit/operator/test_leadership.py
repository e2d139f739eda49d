"""The election, by a clock that the test moves."""

from __future__ import annotations

import asyncio
import copy
from typing import Any, cast

import pytest

from finetune_operator.cluster import (
    AlreadyExistsError,
    Cluster,
    ConflictError,
    NotFoundError,
    UnavailableError,
)
from finetune_operator.leadership import Leadership

Lease = dict[str, Any]


class Store:
    """The API server's part: one Lease, whose resourceVersion fences its writers."""

    def __init__(self) -> None:
        self.lease: Lease | None = None
        self.version = 0
        self.away = False

    async def get(self, *_: str) -> Lease:
        self._answer()
        if self.lease is None:
            raise NotFoundError("no Lease")
        return copy.deepcopy(self.lease)

    async def create(self, body: Lease) -> Lease:
        self._answer()
        if self.lease is not None:
            raise AlreadyExistsError("there is one")
        return self._store(body)

    async def replace(self, body: Lease) -> Lease:
        self._answer()
        if body["metadata"]["resourceVersion"] != str(self.version):
            raise ConflictError("it has changed")
        return self._store(body)

    def _answer(self) -> None:
        if self.away:
            raise UnavailableError("no API server")

    def _store(self, body: Lease) -> Lease:
        self.version += 1
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return self.lease


class World:
    """Operators, and time that passes only where they sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.store = Store()

    def operator(self, name: str) -> Leadership:
        return Leadership(cast(Cluster, self.store), "ns/lease", name, 10, clock=lambda: self.now)

    @property
    def spec(self) -> Lease:
        assert self.store.lease is not None
        found: Lease = self.store.lease["spec"]
        return found


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    pause = asyncio.sleep

    async def sleep(seconds: float) -> None:
        made.now += seconds
        await pause(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return made


async def test_the_first_one_leads_and_the_second_waits(world: World) -> None:
    first, second = world.operator("first"), world.operator("second")
    await first.acquire()
    assert first.leads
    assert not await second._try()
    assert not second.leads
    assert (world.spec["holderIdentity"], world.spec["leaseDurationSeconds"]) == ("first", 10)


async def test_a_lease_that_goes_on_changing_is_never_taken(world: World) -> None:
    first, second = world.operator("first"), world.operator("second")
    await first.acquire()
    for _ in range(20):
        world.now += 5
        assert await first._try()
        assert not await second._try()


async def test_one_that_no_longer_renews_is_replaced_after_the_duration(world: World) -> None:
    first, second = world.operator("first"), world.operator("second")
    await first.acquire()
    began = world.now
    await second.acquire()
    assert 10 <= world.now - began <= 12
    assert not first.leads
    assert world.spec["leaseTransitions"] == 1
    await first.hold()  # it wakes up
    assert not first.leads
    assert world.spec["holderIdentity"] == "second"


async def test_a_holder_gives_up_before_another_one_may_begin(world: World) -> None:
    first = world.operator("first")
    await first.acquire()
    world.store.away = True
    began = world.now
    await first.hold()
    assert world.now - began < 10
    assert not first.leads


async def test_it_leads_again_after_an_outage(world: World) -> None:
    first = world.operator("first")
    await first.acquire()
    world.store.away = True
    await first.hold()
    world.store.away = False
    await first.acquire()
    assert first.leads
    assert world.spec["leaseTransitions"] == 0


async def test_a_container_that_was_started_anew_goes_on_at_once(world: World) -> None:
    await world.operator("first").acquire()
    began = world.now
    await world.operator("first").acquire()
    assert world.now == began


async def test_what_is_given_back_is_free_at_once(world: World) -> None:
    first, second = world.operator("first"), world.operator("second")
    await first.acquire()
    await first.release()
    assert not first.leads
    began = world.now
    await second.acquire()
    assert world.now == began
    await first.release()  # it isn't its any more
    assert world.spec["holderIdentity"] == "second"


async def test_of_two_that_take_it_at_the_same_time_one_gets_it(world: World) -> None:
    both = [world.operator(name) for name in ("first", "second")]
    assert sorted(await asyncio.gather(*(each._try() for each in both))) == [False, True]
    world.now += 60
    await asyncio.gather(*(each._try() for each in both))  # both have seen it
    world.now += 60
    assert sorted(await asyncio.gather(*(each._try() for each in both))) == [False, True]


async def test_giving_back_what_cannot_be_reached_is_no_error(world: World) -> None:
    first = world.operator("first")
    await first.acquire()
    world.store.away = True
    await first.release()
    assert not first.leads
