"""Who may do what: the operator by its chart, and a trainer by its own token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import yaml

from finetune_trainer.contract import Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import NAMESPACE, RELEASE, chart_objects
from tests.integration.operator.stage import Namespace

OPERATOR = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"


def may(plane: ControlPlane, who: str, verb: str, what: str, namespace: str) -> bool:
    """Ask the API server; `what` is resource.group/name."""
    resource, _, name = what.partition("/")
    resource, _, group = resource.partition(".")
    attributes = {"verb": verb, "group": group, "resource": resource, "name": name}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": who,
            "groups": ["system:serviceaccounts", "system:authenticated"],
            "resourceAttributes": {**attributes, "namespace": namespace},
        },
    }
    command = ("create", "--raw", "/apis/authorization.k8s.io/v1/subjectaccessreviews", "-f", "-")
    answer = json.loads(plane.kubectl(*command, input=json.dumps(review)))["status"]
    assert "evaluationError" not in answer, answer
    return bool(answer["allowed"])


@pytest.mark.parametrize(
    ("verb", "what"),
    [
        ("get", "secrets"),
        ("list", "secrets"),
        ("watch", "secrets"),
        ("create", "secrets"),
        ("update", "finetunejobs.finetune.dev"),
        ("patch", "finetunejobs.finetune.dev"),
        ("create", "pods"),
        ("update", "configmaps"),
        ("patch", "roles.rbac.authorization.k8s.io"),
        ("watch", "configmaps"),
        ("delete", "namespaces"),
        ("get", "nodes"),
        ("patch", "nodes"),
        ("create", "clusterrolebindings"),
    ],
)
def test_the_operator_may_not(installed: ControlPlane, verb: str, what: str) -> None:
    assert not may(installed, OPERATOR, verb, what, "default")


def test_the_operator_may_make_jobs(installed: ControlPlane) -> None:
    assert may(installed, OPERATOR, "create", "jobs.batch", "default")


@pytest.fixture
def trainer(here: Namespace) -> str:
    """The user name of a job's own ServiceAccount."""
    here.apply()
    account = here.pod(Stage.PREPARE)["spec"]["serviceAccountName"]
    return f"system:serviceaccount:{here.name}:{account}"


@pytest.mark.parametrize(
    ("verb", "what"),
    [
        ("get", "secrets"),
        ("get", "pods"),
        ("get", "finetunejobs.finetune.dev/support"),
        ("patch", "finetunejobs.finetune.dev/support"),
        ("patch", "jobs.batch"),
    ],
)
def test_a_trainer_may_not(here: Namespace, trainer: str, verb: str, what: str) -> None:
    assert not may(here.plane, trainer, verb, what, here.name)


def report(
    here: Namespace, trainer: str, name: str, status: dict[str, Any] | None = None
) -> httpx.Response:
    """What a trainer does to report its progress, or something else."""
    account = trainer.rsplit(":", 1)[-1]
    token = here.plane.kubectl("create", "token", account, "-n", here.name).strip()
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{here.name}/finetunejobs/{name}/status"
    patch = {"status": status or {"progress": {"percent": "50%"}}}
    return here.merge_patch(path, patch, token)


def test_a_trainer_may_report_the_progress_of_its_own_job_only(
    here: Namespace, trainer: str
) -> None:
    here.apply(name="another")
    assert report(here, trainer, "support").is_success
    assert here.status()["progress"] == {"percent": "50%"}
    assert report(here, trainer, "another").status_code == httpx.codes.FORBIDDEN


@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Succeeded"},
        {"conditions": []},
        {"artifacts": [{"path": "adapter/", "uri": "s3://else/", "bytes": 1, "sha256": "0"}]},
        {"progress": {"percent": "50%"}, "usage": {"gpuSeconds": 0}},
    ],
    ids="+".join,
)
def test_a_trainer_may_report_nothing_else(
    supported: ControlPlane, here: Namespace, trainer: str, status: dict[str, Any]
) -> None:
    del supported
    before = here.status()
    answer = report(here, trainer, "support", status)
    assert answer.status_code == httpx.codes.FORBIDDEN, answer.text
    assert "belongs to the operator" in answer.text
    assert here.status() == before


def test_a_namespaces_policy_says_what_its_jobs_may_ask_for(
    supported: ControlPlane, here: Namespace
) -> None:
    """By the chart's own policy, and each refusal names the field."""
    policy = {
        "name": here.name,
        "namespaces": [here.name],
        "images": ["registry.example.com/"],
        "serviceAccounts": ["workload"],
        "priorityClasses": [],
        "nodeSelectors": ["pool=shared"],
        "queues": ["team-a", ""],
    }
    with policies(supported, policy):
        here.wait("the policy", lambda: here.refusal(serviceAccountName="admin"))
        refused: dict[str, dict[str, Any]] = {
            "spec.serviceAccountName must be workload here": {"serviceAccountName": "admin"},
            "must begin with registry.example.com/": {"stages": {"train": {"image": "else/it"}}},
            "priorityClassName must be left out here": {
                "stages": {"export": {"priorityClassName": "high"}}
            },
            "nodeSelector must have none but pool=shared": {
                "stages": {"train": {"nodeSelector": {"pool": "reserved"}}}
            },
            "spec.queueName must be team-a": {"queueName": "team-b"},
        }
        for words, spec in refused.items():
            assert words in here.refusal(**spec)
        allowed: dict[str, Any] = {
            "serviceAccountName": "workload",
            "queueName": "team-a",
            "stages": {
                "train": {
                    "image": "registry.example.com/trainer:1",
                    "nodeSelector": {"pool": "shared"},
                }
            },
        }
        assert here.refusal(**allowed) == ""
        assert here.refusal() == ""


@contextmanager
def policies(plane: ControlPlane, policy: dict[str, Any]) -> Iterator[None]:
    """The chart's admission policies with this one beside the others."""
    rendered = yaml.safe_dump_all(
        each
        for each in chart_objects(admission={"policies": [policy]})
        if each["metadata"]["name"] == f"{RELEASE}-{policy['name']}"
    )
    plane.kubectl("apply", "-f", "-", input=rendered)
    yield
    plane.kubectl("delete", "-f", "-", input=rendered)


def test_a_users_service_account_is_given_the_same_right(here: Namespace) -> None:
    here.plane.kubectl("create", "serviceaccount", "workload", "-n", here.name)
    here.apply(serviceAccountName="workload")
    assert here.pod(Stage.PREPARE)["spec"]["serviceAccountName"] == "workload"
    assert here.children("serviceaccounts") == []
    trainer = f"system:serviceaccount:{here.name}:workload"
    assert report(here, trainer, "support").is_success
