"""One pass, against a cluster that only remembers what it was asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import kopf
import pytest

from finetune_operator.cluster import (
    AlreadyExistsError,
    Cluster,
    ClusterError,
    ConflictError,
    DeniedError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from finetune_operator.handlers import kopf_settings
from finetune_operator.monitoring import Metrics
from finetune_operator.reconcile import (
    OWN_WRITES_SECONDS,
    STALE_RETRY_SECONDS,
    WATCH_SILENCE_SECONDS,
    Reconciler,
    Snapshot,
)
from finetune_operator.settings import Settings
from finetune_operator.status import timestamp
from finetune_trainer.contract import Hardware, RunConfig
from tests.unit.operator.build import SPEC
from tests.unit.operator.raw import raw_pod

KEY = "ml/support"
MADE = ["ServiceAccount", "ConfigMap", "Role", "RoleBinding", "Job"]


class FakeCluster:
    """Answers like an API server on which everything works, unless told otherwise."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.failures: dict[tuple[str, str], ClusterError] = {}
        self.existing: dict[str, Any] = {}
        self.patches: list[dict[str, Any]] = []
        self.made: list[dict[str, Any]] = []
        self.said: list[tuple[str, str]] = []
        self.version = 7
        self.live_version = "7"
        self.live: dict[str, list[dict[str, Any]]] = {}
        self.brief: dict[str, list[dict[str, Any]]] = {}

    def _call(self, verb: str, what: str) -> None:
        self.calls.append((verb, what))
        if (verb, what) in self.failures:
            raise self.failures[verb, what]

    async def create(self, body: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        self._call("rehearse" if dry_run else "create", body["kind"])
        if dry_run:
            return body
        # Now, as a server would: a Job that is long without a pod is worth a note in status.
        stamped = {"uid": f"uid-{body['kind']}", "creationTimestamp": timestamp(datetime.now(UTC))}
        made = {**body, "metadata": {**body["metadata"], **stamped}}
        self.made.append(made)
        return made

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        self._call("get", kind)
        if kind == "FineTuneJob":
            return {"metadata": {"resourceVersion": self.live_version}}
        found: dict[str, Any] = self.existing[kind]
        return {**found, "metadata": {**found["metadata"], "name": name, "namespace": namespace}}

    async def children(
        self, kind: str, namespace: str, labels: dict[str, str]
    ) -> list[dict[str, Any]]:
        self._call(f"{kind}s", f"{namespace}/{labels['finetune.dev/stage']}")
        return self.live.get(kind, [])

    async def in_brief(self, kind: str, namespaces: tuple[str, ...]) -> AsyncIterator[Any]:
        del namespaces
        self._call("list", kind)
        for each in self.brief.get(kind, []):
            yield each

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        del name
        self._call("delete", f"{kind} {namespace}/{uid}")

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
        self, about: dict[str, Any], kind: str, reason: str, message: str, scope: str
    ) -> None:
        del about
        self.said.append((message, scope))
        self._call("event", f"{kind} {reason}")

    async def node_labels(self, label: str) -> tuple[dict[str, str], ...]:
        self._call("nodes", label)
        return ({label: "81559"},)


class World:
    """A reconciler with its cluster, and what its watches show."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.metrics = Metrics()
        self.leads = True
        self.snapshot: Snapshot | None = None
        self.reconcile = Reconciler(
            cast(Cluster, self.cluster),
            lambda key: self.snapshot if key == KEY else None,
            Settings(trainer_image="trainer:1"),
            self.metrics,
            lambda: self.leads,
        )

    def shows(
        self,
        version: str = "7",
        status: Any = None,
        jobs: Any = (),
        pods: Any = (),
        spec: Any = None,
        **meta: Any,
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
        self.snapshot = Snapshot(raw, tuple(jobs), tuple(pods))

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


async def test_a_job_starts_only_once_status_says_so(world: World) -> None:
    assert await world.reconcile(KEY) is None
    assert world.cluster.calls == [
        ("Jobs", "ml/prepare"),
        ("Pods", "ml/prepare"),
        ("rehearse", "Job"),
        *(("create", kind) for kind in MADE[:-1]),
        ("patch", "ml/support@7"),
        ("create", "Job"),
        ("event", "Normal StageStarted"),
    ]
    assert world.cluster.patches[0]["phase"] == "Preparing"
    assert world.passes("changed") == 1


async def test_a_pass_over_what_this_process_has_already_changed_waits(world: World) -> None:
    await world.reconcile(KEY)
    world.cluster.calls.clear()
    assert await world.reconcile(KEY) == STALE_RETRY_SECONDS
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
    ours = {
        "metadata": {
            "namespace": "ml",
            "ownerReferences": [{"kind": "FineTuneJob", "uid": "uid-1", "controller": True}],
        }
    }
    for kind in MADE[:-1]:
        world.cluster.failures["create", kind] = AlreadyExistsError("there")
        world.cluster.existing[kind] = ours
    await world.reconcile(KEY)
    assert world.calls("get") == MADE[:-1]
    assert world.calls("create") == MADE


async def test_what_is_there_already_and_not_ours_is_not_used(world: World) -> None:
    world.cluster.failures["create", "ConfigMap"] = AlreadyExistsError("there")
    world.cluster.existing["ConfigMap"] = {"metadata": {"ownerReferences": []}}
    with pytest.raises(ForbiddenError, match="belongs to someone else"):
        await world.reconcile(KEY)
    assert "Job" not in world.calls("create")
    assert world.calls("event") == ["Warning RequestDenied"]


async def test_a_job_that_the_server_calls_invalid_fails_with_its_words(world: World) -> None:
    refusal = InvalidError("POST …: cpu: lots", "cpu: lots is no quantity")
    world.cluster.failures["rehearse", "Job"] = refusal
    await world.reconcile(KEY)
    patch = world.cluster.patches[0]
    assert patch["phase"] == "Failed"
    assert patch["conditions"][0]["reason"] == "InvalidSpec"
    assert patch["conditions"][0]["message"] == "cpu: lots is no quantity"
    assert world.calls("event") == ["Warning InvalidSpec"]


async def test_one_that_lost_the_lead_after_its_status_does_not_act(world: World) -> None:
    world.leads = False
    assert await world.reconcile(KEY) == STALE_RETRY_SECONDS
    assert world.cluster.patches[0]["phase"] == "Preparing"
    assert "Job" not in world.calls("create")


@pytest.mark.parametrize(
    "refusal",
    [
        ForbiddenError("POST …", "exceeded quota: gpus"),
        DeniedError("POST …", 'admission webhook "images" denied the request'),
    ],
)
async def test_a_denial_is_told_to_the_user_and_tried_again(
    world: World, refusal: ClusterError
) -> None:
    world.cluster.failures["rehearse", "Job"] = refusal
    with pytest.raises(type(refusal)):
        await world.reconcile(KEY)
    patch = world.cluster.patches[0]
    assert (patch["phase"], patch["reason"]) == ("Waiting", "RequestDenied")
    assert patch["stages"][0]["state"] == "Pending"
    assert {each["reason"] for each in patch["conditions"][1:]} == {"RequestDenied"}
    assert refusal.detail in patch["conditions"][2]["message"]
    assert world.calls("event") == ["Warning RequestDenied"]
    assert world.passes("error") == 1

    world.shows("8", status=patch)
    with pytest.raises(type(refusal)):
        await world.reconcile(KEY)
    assert len(world.cluster.patches) == 1, "said once"

    world.cluster.failures.clear()
    await world.reconcile(KEY)
    assert world.calls("create")[-1] == "Job"
    assert world.cluster.patches[-1]["phase"] == "Preparing"
    assert world.cluster.patches[-1]["reason"] is None


async def test_the_same_words_about_another_attempt_are_another_event(world: World) -> None:
    edited = World()
    edited.shows("7", generation=2)
    for each in (world, edited):
        await each.reconcile(KEY)
    ((words, first),), ((again, second),) = world.cluster.said, edited.cluster.said
    assert words == again == "Started prepare, attempt 1."
    assert first != second


async def test_a_denial_of_the_next_stage_leaves_the_running_one_alone(world: World) -> None:
    training(world)
    assert world.snapshot is not None
    world.snapshot.finetunejob["metadata"]["generation"] = 2  # prepare looks at the new spec
    world.cluster.failures["rehearse", "Job"] = ForbiddenError("POST …", "exceeded quota")
    with pytest.raises(ForbiddenError):
        await world.reconcile(KEY)
    assert world.calls("delete") == []
    assert world.cluster.patches[0]["stages"][1]["state"] == "Running"


@pytest.mark.parametrize(
    ("state", "starts"), [({"running": {}}, False), ({"terminated": {"exitCode": 14}}, True)]
)
async def test_nothing_is_started_beside_a_pod_that_the_watch_does_not_show_yet(
    world: World, state: dict[str, Any], starts: bool
) -> None:
    known = {"annotations": {"finetune.dev/job-name": "support"}}
    statuses = [{"name": "trainer", "state": state}]
    left = raw_pod(containerStatuses=statuses)
    world.cluster.live["Pod"] = [{**left, "metadata": {**left["metadata"], **known}}]
    await world.reconcile(KEY)
    assert world.calls("Pods") == ["ml/prepare"]
    assert ("Job" in world.calls("create")) is starts
    assert bool(world.cluster.patches) is starts


async def test_an_operator_that_knows_what_there_was_asks_for_no_pods(world: World) -> None:
    assert await world.reconcile.take_over() == set()
    await world.reconcile(KEY)
    assert world.calls("Jobs") == world.calls("Pods") == []
    assert world.calls("create") == MADE
    # One of the same name: the pods of the first may be at work yet.
    world.shows(uid="uid-2")
    await world.reconcile(KEY)
    assert world.calls("Jobs") == world.calls("Pods") == ["ml/prepare"]


@pytest.mark.parametrize("kind", ["Job", "Pod"])
async def test_what_another_operator_has_started_is_asked_for(world: World, kind: str) -> None:
    known = {"annotations": {"finetune.dev/job-name": "support"}, "namespace": "ml"}
    world.cluster.brief[kind] = [{"metadata": known}]
    await world.reconcile.take_over()
    await world.reconcile(KEY)
    assert world.calls("Pods") == ["ml/prepare"]


async def test_an_operator_that_led_before_knows_nothing_any_more(world: World) -> None:
    await world.reconcile.take_over()
    world.reconcile.step_down()
    await world.reconcile(KEY)
    assert world.calls("Pods") == ["ml/prepare"]


async def test_a_job_like_one_just_admitted_is_not_rehearsed(world: World) -> None:
    await world.reconcile(KEY)
    world.shows(uid="uid-2")
    await world.reconcile(KEY)
    assert world.calls("rehearse") == ["Job"]
    world.shows(uid="uid-3", spec={**SPEC, "serviceAccountName": "mine"})
    await world.reconcile(KEY)
    assert world.calls("rehearse") == ["Job"] * 2, "another kind of Job"


async def test_after_a_denial_each_job_is_rehearsed(world: World) -> None:
    await world.reconcile(KEY)
    world.cluster.failures["create", "Job"] = ForbiddenError("POST …", "exceeded quota: gpus")
    world.shows(uid="uid-2")
    with pytest.raises(ForbiddenError):
        await world.reconcile(KEY)
    assert world.cluster.patches[-1]["phase"] == "Preparing"
    assert len(world.calls("event")) == 1, "it was not started"
    world.cluster.failures = {("rehearse", "Job"): ForbiddenError("POST …", "exceeded quota: gpus")}
    world.shows("9", status=world.cluster.patches[-1], uid="uid-2")
    with pytest.raises(ForbiddenError):
        await world.reconcile(KEY)
    assert world.cluster.patches[-1]["reason"] == "RequestDenied"
    assert world.calls("event")[1:] == ["Warning RequestDenied"]


async def test_what_stands_is_not_made_again_for_the_next_stage(world: World) -> None:
    await world.reconcile(KEY)
    world.shows("9", generation=2, jobs=ended_jobs(world))
    await world.reconcile(KEY)
    assert world.calls("create") == [*MADE, "Job"]


FAILED = {
    "observedGeneration": 1,
    "phase": "Failed",
    "stages": [{"name": "prepare", "state": "Failed", "attempt": 1}],
}
SUPPORTS = {f"{kind} ml/uid-{kind}" for kind in MADE[:-1]}


def ended_jobs(world: World) -> list[dict[str, Any]]:
    """The Jobs that were made, after their end."""
    failed = {"conditions": [{"type": "Failed", "status": "True"}]}
    return [{**each, "status": failed} for each in world.cluster.made if each["kind"] == "Job"]


async def test_what_the_stages_needed_goes_when_all_is_over(world: World) -> None:
    await world.reconcile(KEY)
    assert world.calls("delete") == []
    world.cluster.live_version = "9"
    world.shows("9", status=FAILED)
    await world.reconcile(KEY)
    assert world.calls("delete") == [], "a Job may have a pod at work"
    world.shows("9", status=FAILED, jobs=ended_jobs(world))
    await world.reconcile(KEY)
    assert set(world.calls("delete")) == SUPPORTS
    await world.reconcile(KEY)
    assert len(world.calls("delete")) == len(SUPPORTS), "once"


async def test_nothing_is_deleted_on_what_has_changed(world: World) -> None:
    await world.reconcile(KEY)
    world.cluster.live_version = "10"  # an edit that the watch doesn't show yet
    world.shows("9", status=FAILED, jobs=ended_jobs(world))
    assert await world.reconcile(KEY) == STALE_RETRY_SECONDS
    world.cluster.live_version, world.leads = "9", False
    assert await world.reconcile(KEY) == 2 * STALE_RETRY_SECONDS
    assert world.calls("delete") == []
    world.leads = True
    await world.reconcile(KEY)
    assert set(world.calls("delete")) == SUPPORTS


async def test_what_an_operator_before_has_left_is_deleted(world: World) -> None:
    owner = {"kind": "FineTuneJob", "uid": "uid-1", "name": "support", "controller": True}
    meta = {"namespace": "ml", "name": "role", "uid": "uid-Role", "ownerReferences": [owner]}
    others = {"namespace": "ml", "name": "else", "uid": "uid-else"}
    world.cluster.brief["Role"] = [{"metadata": meta}, {"metadata": others}]
    assert await world.reconcile.take_over() == {KEY}
    world.shows(status=FAILED)
    await world.reconcile(KEY)
    assert world.calls("delete") == ["Role ml/uid-Role"]


async def test_an_operator_without_the_right_to_tidy_up_goes_on(world: World) -> None:
    await world.reconcile(KEY)
    world.cluster.live_version = "9"
    for each in SUPPORTS:
        world.cluster.failures["delete", each] = ForbiddenError("DELETE …", "no right")
    world.shows("9", status=FAILED, jobs=ended_jobs(world))
    assert await world.reconcile(KEY) is None
    await world.reconcile(KEY)
    assert len(world.calls("delete")) == len(SUPPORTS), "tried once"


async def test_nothing_is_started_on_a_status_that_has_changed(world: World) -> None:
    world.cluster.failures["patch", "ml/support@7"] = ConflictError("changed")
    assert await world.reconcile(KEY) == STALE_RETRY_SECONDS
    assert "Job" not in world.calls("create")
    assert world.calls("event") == []


async def test_conflicts_in_a_row_are_waited_out_ever_longer(world: World) -> None:
    world.cluster.failures["patch", "ml/support@7"] = ConflictError("changed")
    pauses = [await world.reconcile(KEY) for _ in range(7)]
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    world.cluster.failures.clear()
    await world.reconcile(KEY)  # this one holds
    assert await world.reconcile(KEY) == STALE_RETRY_SECONDS


def test_own_writes_are_remembered_for_longer_than_a_dead_watch_goes_unnoticed() -> None:
    assert OWN_WRITES_SECONDS > WATCH_SILENCE_SECONDS
    settings = kopf.OperatorSettings()
    kopf_settings(settings, 30.0)
    assert settings.watching.inactivity_timeout == WATCH_SILENCE_SECONDS


async def test_an_object_that_vanished_meanwhile_is_forgotten(world: World) -> None:
    world.cluster.failures["patch", "ml/support@7"] = NotFoundError("gone")
    assert await world.reconcile(KEY) is None
    assert world.passes("gone") == 1


async def test_an_object_that_is_gone_is_forgotten(world: World) -> None:
    world.snapshot = None
    assert await world.reconcile(KEY) is None
    assert world.cluster.calls == []


async def test_an_event_that_gets_lost_is_no_failure(world: World) -> None:
    world.cluster.failures["event", "Normal StageStarted"] = UnavailableError("down")
    assert await world.reconcile(KEY) is None
    assert world.passes("changed") == 1


def training(world: World, **status: Any) -> None:
    """Let the watches show a job whose training runs and reports a notice."""
    notice = {"code": "LossRising", "step": 40, "evidence": "3.4", "remedy": "Lower it."}
    stages = [
        {"name": "prepare", "state": "Succeeded", "fingerprint": "prepare-a", "attempt": 1},
        {"name": "train", "state": "Running", "fingerprint": "train-a", "attempt": 1},
        {"name": "export", "state": "Pending", "fingerprint": "export-a"},
    ]
    meta = {
        "name": "support-train-1",
        "namespace": "ml",
        "uid": "job-uid",
        "creationTimestamp": "2026-11-24T12:00:00Z",
        "ownerReferences": [{"kind": "FineTuneJob", "uid": "uid-1", "controller": True}],
        "labels": {"finetune.dev/stage": "train", "finetune.dev/attempt": "1"},
        "annotations": {"finetune.dev/key": "train-a"},
    }
    template = {"spec": {"containers": [{"name": "trainer", "image": "trainer:1"}]}}
    job = {"metadata": meta, "spec": {"template": template}}
    owner = [{"kind": "Job", "uid": "job-uid", "controller": True}]
    pod = {
        "metadata": {"name": "pod", "namespace": "ml", "uid": "pod-uid", "ownerReferences": owner},
        **template,
        "status": {
            "phase": "Running",
            "containerStatuses": [{"name": "trainer", "state": {"running": {}}}],
        },
    }
    known = {
        "observedGeneration": 1,
        "phase": "Training",
        "stages": stages,
        "progress": {"job": "support-train-1", "notices": [notice]},
    }
    world.shows(status={**known, **status}, jobs=[job], pods=[pod])


async def test_a_notice_is_posted_before_the_status_remembers_it(world: World) -> None:
    training(world)
    await world.reconcile(KEY)
    assert world.cluster.calls == [
        ("event", "Warning LossRising"),
        ("patch", "ml/support@7"),
    ]
    assert world.cluster.said == [("step 40: 3.4. Lower it.", "train-a")]
    assert [each["code"] for each in world.cluster.patches[0]["notices"]] == ["LossRising"]


async def test_a_notice_whose_status_could_not_be_written_is_posted_again(world: World) -> None:
    training(world)
    world.cluster.failures["patch", "ml/support@7"] = ConflictError("changed")
    assert await world.reconcile(KEY) == STALE_RETRY_SECONDS
    world.cluster.failures.clear()
    await world.reconcile(KEY)
    # The same words in the same scope: to the API server that is one Event.
    assert world.cluster.said == [("step 40: 3.4. Lower it.", "train-a")] * 2


async def test_a_notice_that_status_remembers_is_not_posted_again(world: World) -> None:
    training(world)
    await world.reconcile(KEY)
    training(world, notices=world.cluster.patches[0]["notices"])
    other = World()
    other.snapshot = world.snapshot  # the operator was started anew
    await other.reconcile(KEY)
    assert other.cluster.said == []


GPU = {**SPEC, "stages": {"train": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}}
LABEL = "nvidia.com/gpu.memory"


def told(world: World) -> Any:
    """What run.json says of the hardware."""
    (made,) = (body for body in world.cluster.made if body["kind"] == "ConfigMap")
    return RunConfig.model_validate_json(made["data"]["run.json"]).hardware


async def test_the_nodes_tell_a_prepare_how_much_memory_the_gpu_will_have(world: World) -> None:
    world.shows(spec=GPU)
    await world.reconcile(KEY)
    assert world.calls("nodes") == [LABEL]
    assert told(world) == Hardware(gpus=1, gpu_memory_bytes=81559 << 20)


async def test_an_operator_that_may_not_read_nodes_goes_on_without(world: World) -> None:
    world.cluster.failures["nodes", LABEL] = ForbiddenError("no")
    world.shows(spec=GPU)
    await world.reconcile(KEY)
    assert told(world) == Hardware(gpus=1)
    assert world.calls("event") == ["Normal StageStarted"]


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(SPEC, id="without a GPU"),
        pytest.param({**GPU, "training": {"gpuMemory": "80Gi"}}, id="with its memory"),
    ],
)
async def test_nodes_are_not_read_where_that_tells_nothing(world: World, spec: Any) -> None:
    world.shows(spec=spec)
    await world.reconcile(KEY)
    assert world.calls("nodes") == []


async def test_a_spec_that_cannot_be_read_fails_without_children(world: World) -> None:
    world.shows(spec={**SPEC, "training": {"epochs": "many"}})
    await world.reconcile(KEY)
    assert world.calls("create") == []
    assert world.cluster.patches[0]["conditions"][2]["reason"] == "InvalidSpec"


async def test_a_job_of_an_earlier_spec_is_deleted_by_uid(world: World) -> None:
    job = {
        "metadata": {
            "name": "old",
            "namespace": "ml",
            "uid": "job-uid",
            "creationTimestamp": "2026-11-24T12:00:00Z",
            "ownerReferences": [{"kind": "FineTuneJob", "uid": "uid-1", "controller": True}],
            "labels": {"finetune.dev/stage": "prepare", "finetune.dev/attempt": "1"},
            "annotations": {"finetune.dev/key": "1"},
        },
        "spec": {"template": {"spec": {"containers": []}}},
    }
    world.shows(jobs=[job], generation=2)
    await world.reconcile(KEY)
    assert world.calls("delete") == ["ml/old/job-uid"]
    assert world.calls("create") == []

    # The same again, when only the Job is left to do: no write proves that the status is current.
    world.shows(jobs=[job], generation=2, version="8", status=world.cluster.patches[0])
    for live, deleted in (("9", 1), ("8", 2)):
        world.cluster.live_version = live
        await world.reconcile(KEY)
        assert len(world.calls("delete")) == deleted


async def test_a_pod_whose_job_was_deleted_keeps_the_next_from_starting(world: World) -> None:
    training(world)
    assert world.snapshot is not None
    (pod,) = world.snapshot.pods
    pod["metadata"]["labels"] = {"finetune.dev/stage": "train"}
    world.snapshot = replace(world.snapshot, jobs=())
    await world.reconcile(KEY)
    assert world.calls("create") == []
    reasons = [each["reason"] for each in world.cluster.patches[0]["conditions"]]
    assert reasons[1] == "Stopping"
    pod["status"] = {"phase": "Failed"}
    world.shows("9", status=world.snapshot.finetunejob["status"], pods=[pod])
    await world.reconcile(KEY)
    assert "Job" in world.calls("create")
