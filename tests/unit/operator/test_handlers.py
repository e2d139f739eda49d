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
    Watches,
    WatchesError,
    _index_job,
    _index_pod,
    kopf_settings,
)
from finetune_operator.pods import pod_in_brief
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
        return self.live

    async def credentials(self) -> Credentials:
        return Credentials("https://server", "/ca", "token", None, None, insecure=False)


class World:
    def __init__(self, *live: str) -> None:
        self.added: list[str] = []
        self.cluster = FakeCluster(*live)
        self.watches = Watches(cast(Cluster, self.cluster), self.added.append)

    async def shows(
        self,
        finetunejobs: list[dict[str, Any]],
        jobs: dict[str, list[dict[str, Any]]] | None = None,
        pods: dict[str, list[dict[str, Any]]] | None = None,
    ) -> None:
        indexes = {"finetunejobs": {KEY: finetunejobs}, "jobs": jobs or {}, "pods": pods or {}}
        await self.watches._startup(**indexes)


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


async def test_a_pod_is_found_by_its_owners_uid_and_by_its_name() -> None:
    pod = pod_in_brief(raw_pod())
    pod["metadata"]["labels"] = {"finetune.dev/job-uid": "uid-1"}
    assert await _index_pod("ml", cast(kopf.Body, pod)) == {MINE: pod}
    pod["metadata"]["annotations"] = {"finetune.dev/job-name": "support"}
    assert await _index_pod("ml", cast(kopf.Body, pod)) == {MINE: pod, KEY: pod}


async def test_children_in_another_namespace_are_not_ours() -> None:
    """Whoever may create pods there could write our uid on one, with a result of his own."""
    world = World()
    forged_pod, forged_job = raw_pod(), raw_job()
    forged_pod["metadata"]["labels"] = {"finetune.dev/job-uid": "uid-1"}
    await world.shows(
        [raw("uid-1")],
        jobs={k: [v] for k, v in (await _index_job("theirs", cast(kopf.Body, forged_job))).items()},
        pods={k: [v] for k, v in (await _index_pod("theirs", cast(kopf.Body, forged_pod))).items()},
    )
    assert world.watches.snapshot(KEY) == Snapshot(raw("uid-1"), (), ())


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
    await world.watches.resync(())
    snapshot = world.watches.snapshot(KEY)
    assert snapshot is not None
    assert snapshot.jobs == (raw("job-1"),)
    assert world.added == [KEY]


async def test_a_resync_drops_a_finetunejob_that_vanished_unseen() -> None:
    world = World()
    await world.shows([raw("uid-1")])
    await world.watches.resync(())
    assert world.watches.snapshot(KEY) is None


async def test_a_watch_that_shows_no_change_from_one_look_to_the_next_is_dead() -> None:
    world = World("uid-1", "job-1")
    await world.shows([raw("uid-1")], jobs={MINE: [raw("job-1")]})
    await world.watches.resync(())
    world.cluster.live["job-1"] = "2"  # it has changed, and the watch doesn't say so
    await world.watches.resync(())
    assert world.watches.dead == "", "the event may still be on its way"
    await world.watches.resync(())
    assert "don't show changes of 1 objects" in world.watches.dead
    await world.shows([raw("uid-1")], jobs={MINE: [raw("job-1", version="2")]})
    await world.watches.resync(())
    assert world.watches.dead == ""


async def test_a_watch_that_is_late_each_time_is_alive() -> None:
    world = World("uid-1")
    for version in ("1", "2", "3", "4"):
        await world.shows([raw("uid-1", version=version)])
        world.cluster.live["uid-1"] = str(int(version) + 1)
        await world.watches.resync(())
        assert world.watches.dead == ""


async def test_a_watch_that_never_shows_a_new_object_is_dead() -> None:
    world = World("uid-1", "new")
    await world.shows([raw("uid-1")])
    await world.watches.resync(())
    await world.watches.resync(())
    assert world.watches.dead


async def test_watches_that_fail_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "RESTART_SECONDS", 0.01)
    world = World()
    await world.shows([raw("uid-1")])
    failures: list[Exception] = [RuntimeError("500"), PermissionError("403")]
    counted: list[str] = []

    async def watch() -> None:
        if failures:
            raise failures.pop()
        # Until Kopf has filled its indexes anew, half of the children would look like none.
        with pytest.raises(WatchesError):
            world.watches.snapshot(KEY)
        assert not world.watches.synced
        await world.watches._finetunejob_event("ml", "support")
        assert world.watches.snapshot(KEY) is not None

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
    name = {"finetune.dev/job-name": "support"}
    await world.watches._child_event("ml", name)
    await world.watches._child_event("ml", {})
    await world.watches._finetunejob_event("ml", "other")
    assert world.added == [KEY, "ml/other"]
    assert world.watches.synced


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
