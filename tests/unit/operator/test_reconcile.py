"""One pass, against a cluster that only remembers what it was asked."""

from __future__ import annotations

from typing import Any, cast

import pytest

from finetune_operator import errors
from finetune_operator.cluster import Cluster
from finetune_operator.metrics import Metrics
from finetune_operator.reconcile import SOON, Reconciler, Snapshot
from finetune_operator.settings import Settings
from tests.unit.operator.build import SPEC

KEY = "ml/support"
MADE = ["ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Job"]


class FakeCluster:
    """Answers like an API server on which everything works, unless told otherwise."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.failures: dict[tuple[str, str], errors.ClusterError] = {}
        self.existing: dict[str, Any] = {}
        self.patches: list[dict[str, Any]] = []
        self.version = 7

    def _call(self, verb: str, what: str) -> None:
        self.calls.append((verb, what))
        if (verb, what) in self.failures:
            raise self.failures[verb, what]

    async def create(self, body: dict[str, Any]) -> dict[str, Any]:
        self._call("create", body["kind"])
        stamped = {"uid": f"uid-{body['kind']}", "creationTimestamp": "2026-11-24T12:00:00Z"}
        return {**body, "metadata": {**body["metadata"], **stamped}}

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        self._call("get", kind)
        found: dict[str, Any] = self.existing[kind]
        return {**found, "metadata": {**found["metadata"], "name": name, "namespace": namespace}}

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        self._call("delete", f"{namespace}/{name}/{uid}")

    async def patch_status(
        self, namespace: str, name: str, resource_version: str, patch: dict[str, Any]
    ) -> dict[str, Any]:
        self._call("patch", f"{namespace}/{name}@{resource_version}")
        self.patches.append(patch)
        self.version += 1
        return {"metadata": {"resourceVersion": str(self.version)}}

    async def record_event(
        self, about: dict[str, Any], kind: str, reason: str, message: str
    ) -> None:
        del about, message
        self._call("event", f"{kind} {reason}")


class World:
    """A reconciler with its cluster, and what its watches show."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.metrics = Metrics()
        self.snapshot: Snapshot | None = None
        self.reconcile = Reconciler(
            cast(Cluster, self.cluster),
            lambda key: self.snapshot if key == KEY else None,
            Settings(trainer_image="trainer:1"),
            self.metrics,
        )

    def shows(
        self, version: str = "7", status: Any = None, jobs: Any = (), spec: Any = None, **meta: Any
    ) -> None:
        raw = {
            "metadata": {
                "name": "support",
                "namespace": "ml",
                "uid": "uid-1",
                "generation": 1,
                "resourceVersion": version,
                **meta,
            },
            "spec": spec or SPEC,
            "status": status or {},
        }
        self.snapshot = Snapshot(raw, tuple(jobs), ())

    def calls(self, verb: str) -> list[str]:
        return [what for called, what in self.cluster.calls if called == verb]

    def passes(self, result: str) -> float | None:
        return self.metrics.registry.get_sample_value(
            "finetune_reconciles_total", {"result": result}
        )


@pytest.fixture
def world() -> World:
    world = World()
    world.shows()
    return world


async def test_a_new_job_gets_its_children_then_its_status_then_its_events(world: World) -> None:
    assert await world.reconcile(KEY) is None
    assert world.cluster.calls == [
        *(("create", kind) for kind in MADE),
        ("patch", "ml/support@7"),
        ("event", "Normal StageStarted"),
    ]
    assert world.cluster.patches[0]["phase"] == "Preparing"
    assert world.passes("changed") == 1


async def test_a_pass_over_what_this_process_has_already_changed_waits(world: World) -> None:
    await world.reconcile(KEY)
    world.cluster.calls.clear()
    assert await world.reconcile(KEY) == SOON
    assert world.cluster.calls == []
    assert world.passes("stale") == 1


async def test_a_job_that_was_made_and_is_not_shown_yet_is_not_made_again(world: World) -> None:
    await world.reconcile(KEY)
    world.cluster.calls.clear()
    world.shows(version="8", status=world.cluster.patches[0])
    await world.reconcile(KEY)
    assert world.cluster.calls == []
    assert world.passes("unchanged") == 1


async def test_a_patch_that_changed_nothing_is_not_waited_for(world: World) -> None:
    world.cluster.version = 6  # the answer to the patch bears the version that was there
    await world.reconcile(KEY)
    world.cluster.calls.clear()
    await world.reconcile(KEY)
    assert world.calls("patch") == ["ml/support@7"]


async def test_what_is_there_already_and_ours_is_fine(world: World) -> None:
    ours = {"metadata": {"ownerReferences": [{"uid": "uid-1", "controller": True}]}}
    for kind in MADE[:-1]:
        world.cluster.failures["create", kind] = errors.AlreadyExistsError("there")
        world.cluster.existing[kind] = ours
    await world.reconcile(KEY)
    assert world.calls("get") == MADE[:-1]
    assert world.calls("create") == MADE


async def test_what_is_there_already_and_not_ours_is_not_used(world: World) -> None:
    world.cluster.failures["create", "ConfigMap"] = errors.AlreadyExistsError("there")
    world.cluster.existing["ConfigMap"] = {"metadata": {"ownerReferences": []}}
    with pytest.raises(errors.ForbiddenError, match="belongs to someone else"):
        await world.reconcile(KEY)
    assert "Job" not in world.calls("create")
    assert world.calls("event") == ["Warning Forbidden"]


async def test_a_job_that_the_server_calls_invalid_fails_with_its_words(world: World) -> None:
    refusal = errors.InvalidError("POST …: cpu: lots", "cpu: lots is no quantity")
    world.cluster.failures["create", "Job"] = refusal
    await world.reconcile(KEY)
    patch = world.cluster.patches[0]
    assert patch["phase"] == "Failed"
    assert patch["conditions"][0]["reason"] == "InvalidSpec"
    assert patch["conditions"][0]["message"] == "cpu: lots is no quantity"
    assert world.calls("event") == ["Warning InvalidSpec"]


async def test_a_quota_is_told_to_the_user_and_tried_again(world: World) -> None:
    world.cluster.failures["create", "Job"] = errors.ForbiddenError("exceeded quota")
    with pytest.raises(errors.ForbiddenError):
        await world.reconcile(KEY)
    assert world.calls("event") == ["Warning Forbidden"]
    assert world.passes("error") == 1


async def test_a_status_that_changed_meanwhile_is_looked_at_again(world: World) -> None:
    world.cluster.failures["patch", "ml/support@7"] = errors.ConflictError("changed")
    assert await world.reconcile(KEY) == SOON
    assert world.calls("event") == []


async def test_an_object_that_vanished_meanwhile_is_forgotten(world: World) -> None:
    world.cluster.failures["patch", "ml/support@7"] = errors.NotFoundError("gone")
    assert await world.reconcile(KEY) is None
    assert world.passes("gone") == 1


async def test_an_object_that_is_gone_is_forgotten(world: World) -> None:
    world.snapshot = None
    assert await world.reconcile(KEY) is None
    assert world.cluster.calls == []


async def test_an_event_that_gets_lost_is_no_failure(world: World) -> None:
    world.cluster.failures["event", "Normal StageStarted"] = errors.UnavailableError("down")
    assert await world.reconcile(KEY) is None
    assert world.passes("changed") == 1


async def test_a_spec_that_cannot_be_read_fails_without_children(world: World) -> None:
    world.shows(spec={**SPEC, "training": {"epochs": "many"}})
    await world.reconcile(KEY)
    assert world.calls("create") == []
    assert world.cluster.patches[0]["conditions"][2]["reason"] == "InvalidSpec"


async def test_a_job_of_an_earlier_spec_is_deleted_by_uid(world: World) -> None:
    job = {
        "metadata": {
            "name": "old",
            "uid": "job-uid",
            "creationTimestamp": "2026-11-24T12:00:00Z",
            "ownerReferences": [{"uid": "uid-1", "controller": True}],
            "labels": {"finetune.dev/stage": "prepare", "finetune.dev/attempt": "1"},
            "annotations": {"finetune.dev/key": "1"},
        },
        "spec": {"template": {"spec": {"containers": []}}},
    }
    world.shows(jobs=[job], generation=2)
    await world.reconcile(KEY)
    assert world.calls("delete") == ["ml/old/job-uid"]
    assert world.calls("create") == []
