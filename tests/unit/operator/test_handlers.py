"""What the watches hold, and what becomes of an event."""

from __future__ import annotations

from typing import Any, cast

import kopf

from finetune_operator.cluster import Cluster, Credentials
from finetune_operator.handlers import Watches, _index_job, _index_pod, kopf_settings
from finetune_operator.reconcile import Snapshot

KEY = "ml/support"
MINE = "uid/ml/uid-1"


def raw(uid: str, created: str = "2026-11-24T12:00:00Z") -> dict[str, Any]:
    return {"metadata": {"namespace": "ml", "uid": uid, "creationTimestamp": created}}


class FakeCluster:
    def __init__(self, *live: str) -> None:
        self.live = set(live)

    async def watched_uids(self, namespaces: tuple[str, ...]) -> set[str]:
        del namespaces
        return self.live

    async def credentials(self) -> Credentials:
        return Credentials("https://server", "/ca", "token", None, None, insecure=False)


class World:
    def __init__(self, *live: str) -> None:
        self.added: list[str] = []
        self.watches = Watches(cast(Cluster, FakeCluster(*live)), self.added.append)

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
    pod = raw("pod-1")
    pod["metadata"]["labels"] = {"finetune.dev/job-uid": "uid-1"}
    assert await _index_pod("ml", cast(kopf.Body, pod)) == {MINE: pod}
    pod["metadata"]["annotations"] = {"finetune.dev/job-name": "support"}
    assert await _index_pod("ml", cast(kopf.Body, pod)) == {MINE: pod, KEY: pod}


async def test_children_in_another_namespace_are_not_ours() -> None:
    """Whoever may create pods there could write our uid on one, with a result of his own."""
    world = World()
    forged_pod, forged_job = raw("pod-1"), raw("job-1")
    forged_pod["metadata"]["labels"] = {"finetune.dev/job-uid": "uid-1"}
    owner = {"kind": "FineTuneJob", "uid": "uid-1", "controller": True}
    forged_job["metadata"]["ownerReferences"] = [owner]
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
