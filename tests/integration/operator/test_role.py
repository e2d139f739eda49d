"""The chart's rights are just those that the operator uses, and a refusal of any is told as such.

Every request that the operator can make is made on a real API server, by the operator's own client.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from finetune_operator.api import KIND
from finetune_operator.cluster import (
    PATHS,
    SUPPORTS,
    WATCHED,
    AlreadyExistsError,
    Cluster,
    ClusterError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
)
from finetune_operator.manifests import stage_objects
from finetune_operator.settings import Settings
from finetune_trainer.contract import Hardware, Stage
from hack import REPOSITORY
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import NAMESPACE, RELEASE, chart_objects
from tests.integration.operator.stage import Namespace, prepared
from tests.unit.operator.build import finetunejob, spec

PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/[^/]+(?:/namespaces/[^/]+)?/(?P<resource>[a-z]+)"
    r"(?:/(?P<name>[^/]+)(?:/(?P<sub>[a-z]+))?)?"
)
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
ACCOUNT = "powerless"
TO_START = (*SUPPORTS, "Job")
ASKED_BY_THE_SERVER = {("update", "finetune.dev", "finetunejobs/finalizers")}
"""By an admission plugin, for owner references that block a deletion."""


class Right(NamedTuple):
    verb: str
    group: str
    resource: str

    @classmethod
    def of(cls, method: str, path: str) -> Right:
        """What a request takes."""
        found = PATH.fullmatch(path)
        assert found is not None, path
        resource = "/".join(filter(None, (found["resource"], found["sub"])))
        read = "get" if found["name"] else "list"
        return cls(VERBS.get(method, read), found["group"] or "", resource)


class Recorded(Cluster):
    """The operator's client, which notes what it asks for."""

    rights: set[Right]

    async def _request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        self.rights.add(Right.of(method, path))
        return await super()._request(method, path, **more)


Call = Callable[[Cluster], Awaitable[object]]


def creating(body: dict[str, Any], *, dry_run: bool) -> Call:
    return lambda cluster: cluster.create(body, dry_run=dry_run)


def reading(kind: str, namespace: str) -> Call:
    return lambda cluster: cluster.get(kind, namespace, "none")


def deleting(kind: str, namespace: str) -> Call:
    return lambda cluster: cluster.delete(kind, namespace, "none", "uid-1")


def listing(kind: str) -> Call:
    async def read_all(cluster: Cluster) -> None:
        async for _ in cluster.in_brief(kind, ()):
            pass

    return read_all


def calls(namespace: str) -> Mapping[str, list[Call]]:
    """For each method of the client, how the operator calls it."""
    owner = finetunejob(namespace=namespace)
    made = stage_objects(
        owner,
        spec(),
        Settings(trainer_image="trainer:1"),
        stage=Stage.PREPARE,
        stage_key="1",
        attempt=1,
        resolved=None,
        hardware=Hardware(),
    )
    lease = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": RELEASE, "namespace": NAMESPACE},
        "spec": {"holderIdentity": "test"},
    }
    bodies = {body["kind"]: body for body in made}
    about = {"namespace": namespace, "name": "support", "uid": "uid-1"}
    everywhere: tuple[str, ...] = ()
    return {
        "create": [
            *(creating(body, dry_run=True) for body in (*bodies.values(), lease)),
            *(creating(body, dry_run=False) for body in bodies.values()),
        ],
        "get": [
            lambda c: c.get(KIND, namespace, "support"),
            lambda c: c.get("Lease", NAMESPACE, RELEASE),
            *(reading(kind, namespace) for kind in bodies),
        ],
        "replace": [lambda c: c.replace(lease)],
        "children": [
            lambda c: c.children("Job", namespace, {}),
            lambda c: c.children("Pod", namespace, {}),
        ],
        "workload": [lambda c: c.workload(namespace, "uid-1")],
        "delete_job": [lambda c: c.delete_job(namespace, "none", "uid-1")],
        "delete": [deleting(kind, namespace) for kind in SUPPORTS],
        "wake_job": [lambda c: c.wake_job(namespace, "none", "2026-01-01T00:00:00Z")],
        "patch_status": [lambda c: c.patch_status(namespace, "support", "1", {"phase": "Pending"})],
        "record_event": [
            # The second time it is there already.
            *[lambda c: c.record_event(about, "Normal", "Tested", "Once more.")] * 2,
        ],
        "failed_create": [lambda c: c.failed_create(namespace, "uid-1")],
        "failed_mount": [lambda c: c.failed_mount(namespace, "uid-1")],
        "node_labels": [lambda c: c.node_labels("nvidia.com/gpu.memory")],
        "watched_versions": [lambda c: c.watched_versions(everywhere)],
        "in_brief": [listing(kind) for kind in (*WATCHED, *SUPPORTS)],
        "any_finetunejob": [lambda c: c.any_finetunejob(everywhere)],
    }


HARMLESS = (NotFoundError, AlreadyExistsError, ConflictError, InvalidError)
"""What the API server says to a request that it would let pass."""


def test_every_method_of_the_client_is_called_here_and_by_the_operator() -> None:
    methods = {
        name
        for name, method in inspect.getmembers(Cluster, inspect.isfunction)
        if not name.startswith("_")
        and (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method))
    }
    assert methods - {"close", "credentials"} == calls("default").keys()
    package = Path(REPOSITORY, "operator", "finetune_operator")
    sources = "".join(file.read_text() for file in package.rglob("*.py"))
    for name in methods:
        assert re.search(rf"\b(self|cluster|_cluster)\.{name}\(", sources), f"{name} is unused"
    reachable = {PATHS[kind] for kind in (KIND, "Pod", "Event", "Lease", "Node", *TO_START)}
    assert set(PATHS.values()) == reachable


@contextmanager
def client_of(plane: ControlPlane, namespace: str, account: str) -> Iterator[None]:
    kubeconfig = plane.kubeconfig_for_service_account(namespace, account)
    with mock.patch.dict(os.environ, KUBECONFIG=str(kubeconfig)):
        yield


def granted() -> set[Right]:
    """What the chart's ClusterRole and the Role for the Lease let the operator do."""
    objects = chart_objects()
    names = {("ClusterRole", RELEASE), ("Role", f"{RELEASE}-leader-election")}
    roles = [each for each in objects if (each["kind"], each["metadata"]["name"]) in names]
    assert len(roles) == len(names)
    return {
        Right(verb, group, resource)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


async def test_the_charts_rights_are_just_those_that_are_used(here: Namespace) -> None:
    here.apply()
    Recorded.rights = set()
    with client_of(here.plane, NAMESPACE, RELEASE):
        async with Recorded.connect(10, lambda *_: None) as cluster:
            for name, ways in calls(here.name).items():
                for call in ways:
                    try:
                        await call(cluster)
                    except HARMLESS:
                        pass
                    except ClusterError as error:
                        pytest.fail(f"{name}: {type(error).__name__}: {error}")
    watched = {
        Right(verb, Right.of("GET", PATHS[kind]).group, Right.of("GET", PATHS[kind]).resource)
        for kind in WATCHED
        for verb in ("list", "watch")  # Kopf's requests
    }
    used = Recorded.rights | watched | {Right(*each) for each in ASKED_BY_THE_SERVER}
    assert sorted(used - granted()) == [], "the chart doesn't grant what is used"
    assert sorted(granted() - used) == [], "the chart grants what nothing uses"


async def test_each_refusal_is_told_as_one_with_what_is_missing(here: Namespace) -> None:
    here.apply()
    here.plane.kubectl("create", "serviceaccount", ACCOUNT, "-n", here.name)
    with client_of(here.plane, here.name, ACCOUNT):
        async with Recorded.connect(10, lambda *_: None) as cluster:
            for name, ways in calls(here.name).items():
                for call in ways:
                    Recorded.rights = set()
                    with pytest.raises(ForbiddenError) as caught:
                        await call(cluster)
                    (right,) = Recorded.rights
                    words = f'cannot {right.verb} resource "{right.resource}"'
                    assert words in str(caught.value), name


@contextmanager
def without(plane: ControlPlane, verb: str, resource: str) -> Iterator[None]:
    """The operator lacks one right for a time."""
    name = f"clusterrole/{RELEASE}"
    role = json.loads(plane.kubectl("get", name, "-o", "json"))
    whole = json.dumps({"rules": role["rules"]})
    fewer = []
    for rule in role["rules"]:
        others = [each for each in rule["resources"] if each != resource]
        verbs = [each for each in rule["verbs"] if each != verb]
        fewer += [{**rule, "resources": others}] if others else []
        fewer += (
            [{**rule, "resources": [resource], "verbs": verbs}]
            if others != rule["resources"] and verbs
            else []
        )
    plane.kubectl("patch", name, "--type=merge", "-p", json.dumps({"rules": fewer}))
    try:
        yield
    finally:
        plane.kubectl("patch", name, "--type=merge", "-p", whole)


@pytest.mark.parametrize(
    "resource", ["serviceaccounts", "roles", "rolebindings", "configmaps", "jobs"]
)
def test_a_job_waits_for_a_right_that_its_stage_needs_and_goes_on_by_itself(
    here: Namespace, resource: str
) -> None:
    def denial() -> str:
        _, reason, message = here.condition("Degraded")
        return message if reason == "RequestDenied" else ""

    with without(here.plane, "create", resource):
        here.apply()
        words = here.wait("the denial", denial)
        assert f'cannot create resource "{resource}"' in words
        assert (here.status()["phase"], here.status()["reason"]) == ("Waiting", "RequestDenied")
    here.apply(ttlSecondsAfterFinished=60)  # an edit has it tried at once
    here.succeed(prepared())
    here.wait_phase("Training")


@pytest.mark.parametrize(("verb", "resource"), [("list", "nodes"), ("create", "events")])
def test_a_job_goes_on_without_a_right_that_only_tells_more(
    here: Namespace, verb: str, resource: str
) -> None:
    limits = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    with without(here.plane, verb, resource):
        here.apply(stages={"train": limits})
        here.succeed(prepared())
        here.wait_phase("Training")
