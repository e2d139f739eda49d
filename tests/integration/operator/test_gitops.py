"""What Flux and Argo CD make of a FineTuneJob: their own programs, on the real API server."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api.observed import Phase
from finetune_trainer.contract import Reason, Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator
from tests.fixtures import start_or_leave_out
from tests.gitops import EXAMPLES, Repository, argo_health, find_programs, kstatus, programs, render
from tests.integration.operator.stage import (
    SPEC,
    Namespace,
    exported,
    new_namespace,
    prepared,
    trained,
)

PREPARE, TRAIN = Stage.PREPARE, Stage.TRAIN
NO_NODE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available.",
}
NO_SECRET = {
    "waiting": {
        "reason": "CreateContainerConfigError",
        "message": 'secret "object-store" not found',
    }
}
NO_IMAGE = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
KEEP = {"metadata": {"finalizers": ["example.com/keep"]}}
Verdicts = Callable[[], tuple[str, str]]


@pytest.fixture(scope="session", autouse=True)
def tools(request: pytest.FixtureRequest) -> None:
    """The tests need the programs."""
    start_or_leave_out(request.config, "the tests of what Flux and Argo CD see", find_programs)


@pytest.fixture
def here(installed: ControlPlane) -> Iterator[Namespace]:
    """An empty namespace that no operator looks at yet."""
    with new_namespace(installed) as namespace:
        yield namespace


@pytest.fixture
def to_come(installed: ControlPlane, tmp_path: Path) -> Iterator[Operator]:
    """An operator that the test starts."""
    operator = Operator(installed, tmp_path)
    yield operator
    operator.stop()


@pytest.fixture
def verdicts(here: Namespace, tmp_path: Path) -> Verdicts:
    """What the two make of it now."""

    def ask() -> tuple[str, str]:
        raw = raw_finetunejob(here)
        return kstatus(raw), argo_health(raw, tmp_path)[0]

    return ask


def raw_finetunejob(here: Namespace) -> dict[str, Any]:
    text = here.plane.kubectl("get", "ftj/support", "-n", here.name, "-o", "json")
    raw: dict[str, Any] = json.loads(text)
    return raw


def test_each_phase_is_what_it_is_to_flux_and_argo_cd(
    here: Namespace, to_come: Operator, verdicts: Verdicts
) -> None:
    here.apply()
    assert here.status() == {"observedGeneration": -1, "generation": 1}, "nobody has looked"
    assert verdicts() == ("InProgress", "Progressing")

    to_come.start()
    here.wait_phase("Preparing")
    assert verdicts() == ("InProgress", "Progressing")
    here.set_pod(here.pod(PREPARE), "Pending", conditions=[NO_NODE])
    assert here.wait_phase("Queued")["reason"] == "Unschedulable"
    assert verdicts() == ("InProgress", "Progressing")
    here.set_pod(here.pod(PREPARE), "Pending", NO_IMAGE, conditions=[])
    assert here.wait_phase("Waiting")["reason"] == "ImageNotPulled"
    assert verdicts() == ("InProgress", "Progressing")
    here.start_pod(PREPARE)
    assert "reason" not in here.wait_phase("Preparing")
    here.succeed(prepared())
    here.wait_phase("Training")
    assert verdicts() == ("InProgress", "Progressing")
    here.succeed(trained())
    here.wait_phase("Exporting")
    assert verdicts() == ("InProgress", "Progressing")
    here.succeed(exported())
    here.wait_phase("Succeeded")
    assert verdicts() == ("Current", "Healthy")

    here.apply(training={"seed": 3})
    here.wait_phase("Preparing")
    assert verdicts() == ("InProgress", "Progressing")
    here.fail(PREPARE, Reason.INVALID_CONFIG, "no such model")
    assert here.wait_phase("Failed")["reason"] == "InvalidConfig"
    assert verdicts() == ("Failed", "Degraded")

    patch = ("patch", "ftj/support", "-n", here.name, "--type=merge", "-p")
    here.plane.kubectl(*patch, json.dumps(KEEP))
    here.delete()
    assert verdicts()[0] == "Terminating"
    here.plane.kubectl(*patch, '{"metadata":{"finalizers":null}}')


COURSE = test_each_phase_is_what_it_is_to_flux_and_argo_cd


def condition(kind: str, status: str) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": "Why", "message": "Words."}


WRITTEN = {
    "Pending": ({"Progressing": "True", "Reconciling": "True"}, "Progressing", "Words."),
    "Suspended": (
        {"Progressing": "False", "Suspended": "True"},
        "Suspended",
        "spec.suspend is set.",
    ),
}
"""Phases that the course above doesn't pass: their conditions, and what Argo CD says."""


@pytest.mark.parametrize("phase", WRITTEN)
def test_what_has_not_begun_or_is_suspended_is_neither_done_nor_broken(
    phase: str, tmp_path: Path
) -> None:
    conditions, *health = WRITTEN[phase]
    kinds = {"Ready": "False", "Degraded": "False", **conditions}
    raw = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "support", "namespace": "ml", "generation": 1},
        "status": {
            "observedGeneration": 1,
            "phase": phase,
            "conditions": [condition(*each) for each in kinds.items()],
        },
    }
    assert kstatus(raw) == "InProgress"
    assert list(argo_health(raw, tmp_path)) == health


def test_no_phase_is_left_out() -> None:
    course = set(re.findall(r'wait_phase\("(\w+)"', inspect.getsource(COURSE)))
    assert course | set(WRITTEN) == set(Phase)


def test_kubectl_shows_what_stands_in_the_way(here: Namespace, to_come: Operator) -> None:
    to_come.start()
    here.apply()
    here.set_pod(here.pod(PREPARE), "Pending", conditions=[NO_NODE])
    here.wait_phase("Queued")
    assert columns(here) == {
        "NAME": "support",
        "PHASE": "Queued",
        "REASON": "Unschedulable",
        "STAGE": "prepare",
    }
    here.start_pod(PREPARE)
    here.wait_phase("Preparing")
    assert columns(here) == {"NAME": "support", "PHASE": "Preparing", "STAGE": "prepare"}


def columns(here: Namespace) -> dict[str, str]:
    """The columns of `kubectl get` that have a value, without the age."""
    head, row = here.plane.kubectl("get", "ftj/support", "-n", here.name).splitlines()
    names = head.split()
    starts = [head.index(name) for name in names]
    ends = [*starts[1:], None]
    cells = {
        name: row[start:end].strip() for name, start, end in zip(names, starts, ends, strict=True)
    }
    del cells["AGE"]
    return {name: cell for name, cell in cells.items() if cell}


class Applier:
    """A GitOps engine over a folder: applies it server-side, waits by kstatus, and prunes."""

    def __init__(self, here: Namespace, folder: Path) -> None:
        self.folder = folder
        self._common = [
            programs()["kapply"],
            "--kubeconfig",
            str(here.plane.kubeconfig),
            "--namespace",
            here.name,
        ]
        self._namespace = here.name
        folder.mkdir()
        self._run("init", str(folder))

    def write(self, name: str, **spec: Any) -> None:
        body = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": self._namespace},
            "spec": {**SPEC, **spec},
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(body))

    def sync(self, repository: Repository, overlay: str, seconds: int) -> str:
        """Pull, render, apply, wait and prune."""
        (self.folder / "rendered.yaml").write_text(repository.render(overlay))
        return self.apply(seconds)

    def apply(self, seconds: int) -> str:
        """Apply, and wait until all is Current; what it says, also where that fails."""
        wait = [f"--reconcile-timeout={seconds}s", "--status-events"]
        return self._run("apply", str(self.folder), "--server-side", *wait)

    def _run(self, verb: str, *arguments: str) -> str:
        command = [*self._common[:1], verb, *arguments, *self._common[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr


def test_an_engine_syncs_a_working_copy_of_git_waits_and_prunes(
    here: Namespace, to_come: Operator, tmp_path: Path
) -> None:
    repository = Repository(tmp_path, here.name)
    engine = Applier(here, tmp_path / "rendered")
    said = engine.sync(repository, "staging", seconds=4)
    assert "support is InProgress" in said, said
    assert "support is Current" not in said, "nobody has looked at it yet"

    to_come.start()
    here.set_pod(here.pod(PREPARE), "Pending", NO_SECRET)  # External Secrets is late
    assert here.wait_phase("Waiting")["reason"] == "SecretNotFound"
    here.start_pod(PREPARE)  # as the kubelet does when the Secret is there
    here.succeed(prepared())
    here.succeed(trained())
    here.succeed(exported())
    here.wait_phase("Succeeded")
    said = engine.sync(repository, "staging", seconds=60)
    assert "support is Current" in said, said
    assert_no_drift(here, repository)

    base = repository.origin / "teams" / "base"
    text = (base / "support.yaml").read_text()
    (base / "support.yaml").write_text(text.replace("name: support\n", "name: another\n"))
    overlay = repository.origin / "teams" / "overlays" / "staging" / "kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("name: support\n", "name: another\n"))
    repository.commit("Replace support")
    said = engine.sync(repository, "staging", seconds=4)
    assert "support pruned" in said or "support prune successful" in said, said
    assert here.plane.kubectl("get", "ftj", "-n", here.name, "-o", "name").split() == [
        "finetunejob.finetune.dev/another"
    ]


def assert_no_drift(here: Namespace, repository: Repository) -> None:
    """Neither a diff as Argo CD makes it, nor a write when the same is applied again."""
    by = ("--server-side", "--field-manager=argocd-controller", "-f", "-")
    text = repository.render("staging")
    assert here.plane.kubectl("diff", *by, input=text) == ""
    here.plane.kubectl("apply", *by, input=text)
    before = raw_finetunejob(here)["metadata"]
    here.plane.kubectl("apply", *by, input=text)
    after = raw_finetunejob(here)["metadata"]
    assert (after["resourceVersion"], after["generation"]) == (before["resourceVersion"], 1)


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_the_api_server_takes_each_overlay(here: Namespace, overlay: str, tmp_path: Path) -> None:
    text = Repository(tmp_path, here.name).render(overlay)
    said = here.plane.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", input=text)
    assert "support serverside-applied" in said
    namespace = yaml.safe_load(render(EXAMPLES / "teams", overlay))["metadata"]["namespace"]
    assert namespace == f"ml-{overlay}"


def test_a_gitops_engine_fails_fast(here: Namespace, to_come: Operator, tmp_path: Path) -> None:
    to_come.start()
    here.apply()
    here.fail(PREPARE, Reason.DATASET_EMPTY, "no rows")
    here.wait_phase("Failed")
    engine = Applier(here, tmp_path / "repository")
    engine.write("support")
    begun = time.monotonic()
    said = engine.apply(seconds=60)
    assert "support is Failed" in said, said
    assert time.monotonic() - begun < 30
