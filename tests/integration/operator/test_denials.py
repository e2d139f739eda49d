"""What others than the spec's author deny is waited out, and goes on when it is mended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from finetune_trainer.contract import Stage
from hack.cluster.control_plane import ControlPlane
from tests.integration.operator.admission import AdmissionServer, Answer, deny, patch
from tests.integration.operator.stage import Namespace, exported, prepared, trained

PREPARE, TRAIN = Stage.PREPARE, Stage.TRAIN


def quota(here: Namespace, jobs: int) -> str:
    """A quota that admits so many Jobs; returns its name."""
    body = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "jobs", "namespace": here.name},
        "spec": {"hard": {"count/jobs.batch": str(jobs)}},
    }
    here.plane.kubectl("apply", "-f", "-", input=json.dumps(body))
    found = ("get", "quota", "jobs", "-n", here.name, "-o", "jsonpath={.status.hard}")
    here.wait("the quota", lambda: here.plane.kubectl(*found))
    return "quota/jobs"


def denied(here: Namespace) -> str:
    """What Degraded says of a denial."""
    return str(here.wait("the denial", lambda: _words(here)))


def _words(here: Namespace) -> str:
    _, reason, message = here.condition("Degraded")
    return message if reason == "RequestDenied" else ""


def test_a_quota_is_told_and_waited_out(here: Namespace) -> None:
    name = quota(here, jobs=0)
    here.apply()
    assert "exceeded quota: jobs" in denied(here)
    assert (here.status()["phase"], here.status()["reason"]) == ("Waiting", "RequestDenied")
    assert here.jobs() == []
    here.plane.kubectl("delete", name, "-n", here.name)
    here.succeed(prepared())
    here.wait_phase("Training")
    assert here.condition("Degraded")[0] == "False"


def test_a_quota_leaves_a_running_training_alone(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    pod = here.start_pod(TRAIN)["metadata"]["uid"]
    here.wait_phase("Training")
    name = quota(here, jobs=2)
    here.apply(training={"seed": 3})  # prepare has to look at it
    assert "exceeded quota: jobs" in denied(here)
    assert here.pod(TRAIN)["metadata"]["uid"] == pod
    here.plane.kubectl("delete", name, "-n", here.name)
    here.succeed(prepared(PREPARE))
    here.wait_phase("Training")
    assert here.pod(TRAIN)["metadata"]["uid"] == pod
    here.succeed(trained())
    here.wait_phase("Exporting")


@pytest.fixture
def policy(supported: ControlPlane, here: Namespace) -> Iterator[str]:
    """A policy of the platform's that lets no Job into the namespace; the binding's name."""
    name = f"no-jobs-{uuid4().hex[:8]}"
    kind: dict[str, Any] = {"apiVersion": "admissionregistration.k8s.io/v1"}
    rule = {
        "apiGroups": ["batch"],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": ["jobs"],
    }
    expression = {"expression": "false", "message": "jobs need an owner"}
    constraints = {"resourceRules": [rule]}
    where = {"matchLabels": {"kubernetes.io/metadata.name": here.name}}
    bodies = [
        {
            **kind,
            "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": name},
            "spec": {"matchConstraints": constraints, "validations": [expression]},
        },
        {
            **kind,
            "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": name},
            "spec": {
                "policyName": name,
                "validationActions": ["Deny"],
                "matchResources": {"namespaceSelector": where},
            },
        },
    ]
    for body in bodies:
        supported.kubectl("apply", "-f", "-", input=json.dumps(body))
    probe = ("create", "job", "probe", "--image=x", "-n", here.name, "--dry-run=server")
    here.wait("the policy", lambda: not succeeds(supported, *probe))
    yield f"validatingadmissionpolicybinding/{name}"
    for each in ("validatingadmissionpolicybinding", "validatingadmissionpolicy"):
        supported.kubectl("delete", each, name, "--ignore-not-found")


def succeeds(plane: ControlPlane, *command: str) -> bool:
    from hack.process import CommandFailed

    try:
        plane.kubectl(*command)
    except CommandFailed:
        return False
    return True


def test_a_policy_is_not_the_specs_fault(here: Namespace, policy: str) -> None:
    here.apply()
    assert "jobs need an owner" in denied(here)
    assert here.status()["phase"] == "Waiting"
    here.plane.kubectl("delete", policy)
    here.succeed(prepared())
    here.wait_phase("Training")


@contextmanager
def webhook(here: Namespace, folder: Path, kind: str, answer: Answer) -> Iterator[AdmissionServer]:
    """A webhook that is asked about each new Job in the namespace, when it is in effect."""
    name = f"jobs-{here.name}"
    asked: list[str] = []

    def note(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["name"])
        return answer(request)

    with AdmissionServer(folder, note) as server:
        body = server.configuration(kind, name, here.name)
        here.plane.kubectl("apply", "-f", "-", input=json.dumps(body))
        probe = ("create", "job", "probe", "--image=x", "-n", here.name, "--dry-run=server")

        def in_effect() -> bool:
            succeeds(here.plane, *probe)
            return bool(asked)

        here.wait("the webhook", in_effect)
        yield server
    here.plane.kubectl("delete", kind, name, "--ignore-not-found")


def test_a_webhooks_denial_is_not_the_specs_fault(here: Namespace, tmp_path: Path) -> None:
    answers: list[dict[str, Any]] = [deny(400, "jobs need a cost centre")]
    with webhook(here, tmp_path, "ValidatingWebhookConfiguration", lambda _: answers[-1]):
        here.apply()
        assert "jobs need a cost centre" in denied(here)
        assert here.jobs() == []
        answers.append({"allowed": True})
        here.succeed(prepared())
        here.wait_phase("Training")


def test_a_webhook_that_is_away_is_told(here: Namespace, tmp_path: Path) -> None:
    name = f"jobs-{here.name}"
    with AdmissionServer(tmp_path, lambda _: {"allowed": True}) as gone:
        body = gone.configuration("ValidatingWebhookConfiguration", name, here.name)
    here.plane.kubectl("apply", "-f", "-", input=json.dumps(body))
    probe = ("create", "job", "probe", "--image=x", "-n", here.name, "--dry-run=server")
    here.wait("the webhook", lambda: not succeeds(here.plane, *probe))
    here.apply()
    assert "failed calling webhook" in denied(here)
    here.plane.kubectl("delete", "validatingwebhookconfiguration", name)
    here.succeed(prepared())
    here.wait_phase("Training")


def test_a_queue_that_suspends_each_new_job_is_waited_for(here: Namespace, tmp_path: Path) -> None:
    """As Kueue does, until it is the Job's turn."""
    held = patch({"op": "add", "path": "/spec/suspend", "value": True})
    with webhook(here, tmp_path, "MutatingWebhookConfiguration", lambda _: held):
        here.apply()
        here.wait("the queue", lambda: here.condition("Progressing")[1] == "JobSuspended")
        assert here.status()["phase"] == "Queued"
        assert here.condition("Degraded")[0] == "False"
        assert here.children("pods") == []
        [job] = here.children("jobs")
        turn = json.dumps({"spec": {"suspend": False}})
        here.plane.kubectl("patch", "job", job["metadata"]["name"], "-n", here.name, "-p", turn)
        here.start_pod(PREPARE)
        here.wait_phase("Preparing")


def test_a_cluster_without_kueue_is_told_and_the_job_waits(here: Namespace) -> None:
    here.apply(queueName="team-a")
    here.wait("the condition", lambda: here.condition("Degraded")[1] == "Inadmissible")
    assert "The cluster has no Kueue." in here.condition("Degraded")[2]
    assert here.status()["phase"] == "Queued"
    assert here.children("pods") == []
    here.apply()  # without a queue
    here.start_pod(PREPARE)
    here.wait_phase("Preparing")


def test_the_stages_pods_are_admitted_under_pod_security_restricted(here: Namespace) -> None:
    enforce = "pod-security.kubernetes.io/enforce=restricted"
    here.plane.kubectl("label", "namespace", here.name, enforce)
    plain = ("run", "plain", "--image=x", "-n", here.name, "--dry-run=server")
    here.wait("Pod Security", lambda: not succeeds(here.plane, *plain))
    mounted = [
        {"image": {"reference": "models.example/base:1"}, "mountPath": "/base"},
        {"configMap": {"name": "settings"}, "mountPath": "/settings"},
        {"secret": {"secretName": "licence"}, "mountPath": "/licence"},
    ]
    train = {"volumes": mounted, "workspace": {"storage": "1Gi"}}
    here.apply(stages={"train": train, "export": {"workspace": {"sizeLimit": "1Gi"}}})
    for result in (prepared(), trained(), exported()):
        here.succeed(result)
    here.wait_phase("Succeeded")
