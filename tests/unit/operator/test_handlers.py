"""What the watches hold, and what becomes of an event."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from typing import Any, cast

import kopf
import pytest

from finetune_operator import handlers
from finetune_operator.cluster import Cluster, Credentials
from finetune_operator.handlers import (
    Endlessly,
    Index,
    Watches,
    WatchesError,
    kopf_settings,
    pod_keys,
)
from finetune_operator.reconcile import Snapshot
from tests.unit.operator.raw import raw_job, raw_pod

KEY = "ml/support"
MINE = "uid/ml/uid-1"


def raw(uid: str, created: str = "2026-11-24T12:00:00Z", version: str = "1") -> dict[str, Any]:
    meta = {"namespace": "ml", "uid": uid, "creationTimestamp": created}
    return {"metadata": {**meta, "resourceVersion": version}}


class FakeCluster:
    def __init__(self, *live: str) -> None:
        self.live = dict.fromkeys(live, "1")

    async def watched_versions(self, namespaces: tuple[str, ...]) -> dict[str, str]:
        del namespaces
        return dict(self.live)

    async def credentials(self) -> Credentials:
        return Credentials("https://server", "/ca", "token", None, None, insecure=False)


class World:
    def __init__(self, *live: str) -> None:
        self.added: list[str] = []
        self.cluster = FakeCluster(*live)
        self.watches = Watches(cast(Cluster, self.cluster), self.added.append)
        self.watches.synced = True

    async def shows(
        self,
        finetunejobs: list[dict[str, Any]],
        jobs: dict[str, list[dict[str, Any]]] | None = None,
        pods: dict[str, list[dict[str, Any]]] | None = None,
    ) -> None:
        for index, shown in (
            (self.watches._finetunejobs, {KEY: finetunejobs}),
            (self.watches._jobs, jobs or {}),
        ):
            for key, objects in shown.items():
                for each in objects:
                    index.put(each, key)
        for each, keys in by_object(pods or {}):
            self.watches._pods.put(each, *keys)

    async def event(self, kind: str, raw: dict[str, Any], change: str | None = None) -> None:
        """What Kopf calls; the change of an object that is listed is None."""
        handler = getattr(self.watches, f"_{kind}_event")
        await handler(event={"type": change, "object": raw})


def by_object(shown: dict[str, list[dict[str, Any]]]) -> list[tuple[dict[str, Any], list[str]]]:
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for key, objects in shown.items():
        for each in objects:
            found.setdefault(each["metadata"]["uid"], (each, []))[1].append(key)
    return list(found.values())


def finetunejob(uid: str = "uid-1", name: str = "support") -> dict[str, Any]:
    found = raw(uid)
    return {**found, "metadata": {**found["metadata"], "name": name}, "spec": {}}


async def test_a_snapshot_holds_the_children_of_that_very_object() -> None:
    world = World()
    await world.shows(
        [raw("uid-1")],
        jobs={MINE: [raw("job-1")], "uid/ml/uid-2": [raw("job-2")]},
        pods={MINE: [raw("pod-1")]},
    )
    expected = Snapshot(raw("uid-1"), (raw("job-1"),), (raw("pod-1"),))
    assert world.watches.snapshot(KEY) == expected


async def test_pods_of_an_earlier_object_of_that_name_are_told_apart() -> None:
    world = World()
    mine, old = raw("pod-1"), raw("pod-2")
    mine["metadata"]["labels"] = {"finetune.dev/job-uid": "uid-1"}
    old["metadata"]["labels"] = {"finetune.dev/job-uid": "uid-0"}
    await world.shows([raw("uid-1")], pods={MINE: [mine], "uid/ml/uid-0": [old], KEY: [mine, old]})
    snapshot = world.watches.snapshot(KEY)
    assert snapshot is not None
    assert (snapshot.pods, snapshot.earlier_pods) == ((mine,), (old,))


def test_a_pod_is_found_by_its_owners_uid_and_by_its_name() -> None:
    pod = raw_pod()
    pod["metadata"]["labels"] = {"finetune.dev/job-uid": "uid-1"}
    assert pod_keys(pod) == (MINE,)
    pod["metadata"]["annotations"] = {"finetune.dev/job-name": "support"}
    assert pod_keys(pod) == (MINE, KEY)


async def test_children_in_another_namespace_are_not_ours() -> None:
    """Whoever may create pods there could write our uid on one, with a result of his own."""
    world = World()
    forged_pod, forged_job = raw_pod(), raw_job()
    forged_pod["metadata"] |= {"labels": {"finetune.dev/job-uid": "uid-1"}, "namespace": "theirs"}
    forged_job["metadata"]["namespace"] = "theirs"
    await world.shows([raw("uid-1")])
    await world.event("job", forged_job)
    await world.event("pod", forged_pod)
    assert world.watches.snapshot(KEY) == Snapshot(raw("uid-1"), (), ())


def test_an_index_shows_an_object_under_its_present_keys() -> None:
    index = Index()
    index.put(raw("a"), "x", "y")
    index.put(raw("b"), "y")
    index.put(raw("a", version="2"), "y", "z")
    assert [each["metadata"]["uid"] for each in index.under("y")] == ["b", "a"]
    assert (index.under("x"), index.under("z")) == ([], [raw("a", version="2")])
    index.drop("a")
    index.drop("a")
    assert index.keys() == ["y"]


async def test_an_object_that_was_deleted_is_shown_no_more() -> None:
    world = World()
    await world.event("finetunejob", finetunejob())
    assert world.watches.snapshot(KEY) is not None
    await world.event("finetunejob", finetunejob(), "DELETED")
    assert world.watches.snapshot(KEY) is None
    assert world.added == [KEY, KEY]


async def test_a_late_event_does_not_bring_back_what_is_known_to_be_gone() -> None:
    world = World()
    await world.event("finetunejob", finetunejob())
    await world.watches.resync()
    await world.event("finetunejob", finetunejob(), "MODIFIED")
    assert world.watches.snapshot(KEY) is None


async def test_nothing_is_done_before_all_is_shown_that_there_was() -> None:
    world = World("uid-1", "job-1", "deleted meanwhile")
    watches = world.watches
    watches.synced = False
    first_lists = asyncio.create_task(watches._await_first_lists())
    await world.event("finetunejob", finetunejob())
    await asyncio.sleep(0)
    assert (watches.synced, world.added) == (False, [])
    with pytest.raises(WatchesError):
        watches.snapshot(KEY)
    job = raw_job()
    job["metadata"]["uid"] = "job-1"
    await world.event("job", job)
    await world.event("job", {**job, "metadata": raw("deleted meanwhile")["metadata"]}, "DELETED")
    await asyncio.wait_for(first_lists, 10)
    assert world.added == [KEY]
    assert watches.snapshot(KEY) is not None


async def test_what_is_not_watched_is_gone() -> None:
    world = World()
    await world.shows([])
    assert world.watches.snapshot(KEY) is None
    assert world.watches.snapshot("ml/other") is None


async def test_while_an_object_is_replaced_the_newer_one_counts() -> None:
    world = World()
    await world.shows([raw("new", "2026-11-24T13:00:00Z"), raw("old")])
    snapshot = world.watches.snapshot(KEY)
    assert snapshot is not None
    assert snapshot.finetunejob["metadata"]["uid"] == "new"


async def test_a_resync_drops_what_vanished_unseen_and_looks_at_all() -> None:
    world = World("uid-1", "job-1")
    await world.shows([raw("uid-1")], jobs={MINE: [raw("job-1"), raw("ghost")]})
    await world.watches.resync()
    snapshot = world.watches.snapshot(KEY)
    assert snapshot is not None
    assert snapshot.jobs == (raw("job-1"),)
    assert world.added == [KEY]


async def test_a_resync_drops_a_finetunejob_that_vanished_unseen() -> None:
    world = World()
    await world.shows([raw("uid-1")])
    world.added.clear()
    await world.watches.resync()
    assert world.watches.snapshot(KEY) is None
    assert world.added == [KEY], "whoever counts it has to forget it"


async def test_a_watch_that_shows_no_change_from_one_look_to_the_next_is_dead() -> None:
    world = World("uid-1", "job-1")
    await world.shows([raw("uid-1")], jobs={MINE: [raw("job-1")]})
    await world.watches.resync()
    world.cluster.live["job-1"] = "2"  # it has changed, and the watch doesn't say so
    await world.watches.resync()
    assert world.watches.dead == "", "the event may still be on its way"
    await world.watches.resync()
    assert "don't show changes of 1 objects" in world.watches.dead
    await world.shows([raw("uid-1")], jobs={MINE: [raw("job-1", version="2")]})
    await world.watches.resync()
    assert world.watches.dead == ""


async def test_a_watch_that_is_late_each_time_is_alive() -> None:
    world = World("uid-1")
    for version in ("1", "2", "3", "4"):
        await world.shows([raw("uid-1", version=version)])
        world.cluster.live["uid-1"] = str(int(version) + 1)
        await world.watches.resync()
        assert world.watches.dead == ""


async def test_a_watch_that_never_shows_a_new_object_is_dead() -> None:
    world = World("uid-1", "new")
    await world.shows([raw("uid-1")])
    await world.watches.resync()
    await world.watches.resync()
    assert world.watches.dead


async def test_watches_that_fail_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "RESTART_SECONDS", 0.01)
    world = World("uid-1")
    await world.shows([raw("uid-1"), raw("deleted meanwhile", created="2026-11-24T13:00:00Z")])
    failures: list[Exception] = [RuntimeError("500"), PermissionError("403")]
    counted: list[str] = []

    async def watch() -> None:
        if failures:
            raise failures.pop()
        # Until all has been shown anew, half of the children would look like none.
        with pytest.raises(WatchesError):
            world.watches.snapshot(KEY)
        await world.event("finetunejob", finetunejob())
        while not world.watches.synced:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        snapshot = world.watches.snapshot(KEY)
        assert snapshot is not None
        assert snapshot.finetunejob["metadata"]["uid"] == "uid-1"

    await asyncio.wait_for(world.watches.keep_watching(watch, lambda: counted.append("")), 10)
    assert (failures, len(counted)) == ([], 2)


async def test_between_two_tries_it_can_be_stopped() -> None:
    world = World()
    tries: list[str] = []

    async def watch() -> None:
        tries.append("")
        asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGTERM)
        raise RuntimeError("500")

    await asyncio.wait_for(world.watches.keep_watching(watch, lambda: None), 10)
    assert len(tries) == 1


async def test_what_fails_while_it_stops_begins_nothing_anew() -> None:
    """E.g. a request of a pass that Kopf has cancelled."""
    world = World()
    tries: list[str] = []

    async def watch() -> None:
        tries.append("")
        world.watches.stop.set()
        raise RuntimeError("404")

    await asyncio.wait_for(world.watches.keep_watching(watch, lambda: None), 10)
    assert len(tries) == 1


def test_no_outage_of_the_api_server_is_too_long() -> None:
    settings = kopf.OperatorSettings()
    kopf_settings(settings, 30.0)
    pauses = settings.networking.error_backoffs
    assert isinstance(pauses, Endlessly)
    day = list(itertools.islice(pauses, 24 * 3600))
    assert day[:6] == [1, 1, 2, 3, 5, 5]
    assert set(day[6:]) == {5}
    assert next(iter(pauses)) == 1, "from the start for each request"


async def test_an_event_of_a_child_is_one_of_its_finetunejob() -> None:
    world = World()
    pod = raw_pod()
    await world.event("pod", pod)
    pod["metadata"]["annotations"] = {"finetune.dev/job-name": "support"}
    await world.event("pod", pod)
    await world.event("finetunejob", finetunejob(name="other"))
    assert world.added == [KEY, "ml/other"]


async def test_kopf_gets_the_same_credentials() -> None:
    login = await World().watches._login()
    assert (login.server, login.scheme, login.token) == ("https://server", "Bearer", "token")


def test_kopf_neither_posts_nor_scans() -> None:
    settings = kopf.OperatorSettings()
    kopf_settings(settings, 30.0)
    assert not settings.posting.enabled
    assert settings.scanning.disabled
    ours = "app.kubernetes.io/managed-by=finetune-operator"
    assert settings.watching.label_selectors["batch", "v1", "jobs"] == ours
    assert settings.watching.label_selectors["", "v1", "pods"] == ours
