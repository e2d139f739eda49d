"""Who may do what: the operator by its chart, and a trainer by its own token."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from finetune_trainer.contract import Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import NAMESPACE, RELEASE
from hack.process import CommandFailed
from tests.integration.operator.stage import Namespace

OPERATOR = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"


def may(plane: ControlPlane, who: str, verb: str, what: str, namespace: str) -> bool:
    """Ask the API server."""
    command = ["auth", "can-i", verb, what, "--as", who, "-n", namespace]
    try:
        return plane.kubectl(*command).strip() == "yes"
    except CommandFailed:
        return False  # kubectl says no with its exit code


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
        ("delete", "configmaps"),
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


def report(here: Namespace, trainer: str, name: str) -> httpx.Response:
    """What a trainer does to report its progress."""
    account = trainer.rsplit(":", 1)[-1]
    token = here.plane.kubectl("create", "token", account, "-n", here.name).strip()
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{here.name}/finetunejobs/{name}/status"
    patch: dict[str, Any] = {"status": {"progress": {"percent": "50%"}}}
    return here.merge_patch(path, patch, token)


def test_a_trainer_may_report_the_progress_of_its_own_job_only(
    here: Namespace, trainer: str
) -> None:
    here.apply(name="another")
    assert report(here, trainer, "support").is_success
    assert here.status()["progress"] == {"percent": "50%"}
    assert report(here, trainer, "another").status_code == httpx.codes.FORBIDDEN


def test_a_users_service_account_is_given_the_same_right(here: Namespace) -> None:
    here.plane.kubectl("create", "serviceaccount", "workload", "-n", here.name)
    here.apply(serviceAccountName="workload")
    assert here.pod(Stage.PREPARE)["spec"]["serviceAccountName"] == "workload"
    assert here.children("serviceaccounts") == []
    trainer = f"system:serviceaccount:{here.name}:workload"
    assert report(here, trainer, "support").is_success
