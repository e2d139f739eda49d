"""The life of a release, by Helm's own code on a real API server of its own.

`tests/data/first_release` holds the chart of 0.1.0 as `helm package` made it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from finetune_trainer.contract import Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import NAMESPACE, RELEASE, Operator
from hack.process import wait_until
from tests.chart import CHART, ROOT, render_all
from tests.fixtures import require_supported, start_or_leave_out
from tests.integration.operator.stage import Namespace, new_namespace

FIRST = ROOT / "tests" / "data" / "first_release" / "finetune-operator-0.1.0.tgz"
DEFINITION = "crd/finetunejobs.finetune.dev"
TEST = f"{RELEASE}-test"


@pytest.fixture(scope="module")
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """A control plane on which nothing is installed yet."""
    plane = ControlPlane(tmp_path_factory.mktemp("helm"))
    start_or_leave_out(request.config, "a control plane for Helm", plane.start)
    yield require_supported(request.config, plane)
    plane.stop()


@pytest.fixture(scope="module")
def releases(plane: ControlPlane) -> Iterator[helm.Config]:
    """Helm, with the administrator's rights."""
    with helm.Config(kubeconfig_path=plane.kubeconfig, namespace=NAMESPACE) as config:
        yield config


@pytest.fixture
def here(plane: ControlPlane) -> Iterator[Namespace]:
    with new_namespace(plane) as namespace:
        yield namespace


@pytest.fixture
def operator(plane: ControlPlane, releases: helm.Config, tmp_path: Path) -> Iterator[Operator]:
    """An operator of today, which the test starts, on a release of 0.1.0."""
    releases.install(FIRST, RELEASE, {"imagePullSecrets": ["pull"]}, create_namespace=True)
    operator = Operator(plane, tmp_path)
    yield operator
    operator.stop()


def read(plane: ControlPlane, *what: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plane.kubectl("get", *what, "-o", "json"))
    return found


def identities(here: Namespace) -> dict[str, str]:
    """The FineTuneJob and its Jobs, by their uids."""
    names = here.plane.kubectl("get", "ftj,jobs", "-n", here.name, "-o", "name").split()
    return {name: read(here.plane, name, "-n", here.name)["metadata"]["uid"] for name in names}


def has_rules(plane: ControlPlane) -> bool:
    """Whether the definition is today's, which waits for its first status (0.1.0's didn't)."""
    return "observedGeneration: -1" in yaml.safe_dump(read(plane, DEFINITION)["spec"])


def run_helm_test(plane: ControlPlane, folder: Path) -> subprocess.CompletedProcess[str]:
    """What `helm test` runs, as its ServiceAccount, on this machine: there is no node."""
    account = plane.kubeconfig_for_service_account(NAMESPACE, TEST)
    token = yaml.safe_load(account.read_text())["users"][0]["user"]["token"]
    (folder / "token").write_text(token)
    (folder / "ca.crt").write_text(plane.ca.read_text())
    host, _, port = plane.server.removeprefix("https://").rpartition(":")
    variables = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    [pod] = [each for each in render_all(healthPort=port_of(plane)) if each["kind"] == "Pod"]
    [container] = pod["spec"]["containers"]
    command = [sys.executable, *container["command"][1:], *container["args"]]
    environment = {**os.environ, **variables, "ACCOUNT_FOLDER": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def port_of(plane: ControlPlane) -> int:
    """The port of the operator's probes, by the release's values."""
    with helm.Config(kubeconfig_path=plane.kubeconfig, namespace=NAMESPACE) as config:
        return int(config.get_values(RELEASE)["healthPort"])


def apply_account_of_the_test(plane: ControlPlane) -> None:
    """Helm makes it before the pod, and takes it away after it."""
    hooks = [each for each in render_all() if each["metadata"]["name"] == TEST]
    account = [each for each in hooks if each["kind"] != "Pod"]
    assert [each["kind"] for each in account] == ["ServiceAccount", "Role", "RoleBinding"]
    plane.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(account))


def find_operators(plane: ControlPlane) -> list[str]:
    """The pod of 0.1.0, which stays until the next one is ready, and that one."""
    selector = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=operator"
    what = ("pods", "-n", NAMESPACE, "-l", selector, "-o", "name")

    def both() -> bool:
        return len(plane.kubectl("get", *what).split()) == 2

    wait_until(both, what="two pods of the operator", seconds=60)
    return [name.removeprefix("pod/") for name in plane.kubectl("get", *what).split()]


def give_addresses(plane: ControlPlane, names: list[str]) -> None:
    """Do for the operator's pods what a kubelet does."""
    address = {"status": {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}}
    how = ("-n", NAMESPACE, "--subresource=status", "--type=merge", "-p", json.dumps(address))
    for name in names:
        plane.kubectl("patch", f"pod/{name}", *how)


def test_a_release_of_the_first_version_lives_on(
    plane: ControlPlane,
    releases: helm.Config,
    here: Namespace,
    operator: Operator,
    tmp_path: Path,
) -> None:
    """0.1.0, upgrade, rollback, upgrade, uninstall, install: no FineTuneJob and no Job is lost."""
    here.wait("the definition", lambda: not here.refusal())
    assert not has_rules(plane)
    here.apply()
    before = identities(here)

    values = {"imagePullSecrets": ["pull"], "healthPort": operator.port}
    releases.upgrade(CHART, RELEASE, values)
    assert has_rules(plane)
    operator.start()
    here.wait_phase("Preparing")
    here.start_pod(Stage.PREPARE)
    running = identities(here)
    assert before.items() < running.items(), "the FineTuneJob is the same, and has a Job now"

    apply_account_of_the_test(plane)
    names = find_operators(plane)
    done = run_helm_test(plane, tmp_path)
    assert (done.stdout.count("has no address yet"), done.returncode) == (2, 1)
    give_addresses(plane, names)
    done = run_helm_test(plane, tmp_path)
    ready = "".join(f"{name} is ready.\n" for name in names)
    assert done.stdout == f"The API server serves FineTuneJobs.\n{ready}", done.stderr
    assert done.returncode == 0
    operator.stop()
    done = run_helm_test(plane, tmp_path)
    gone = f"can't be reached at http://127.0.0.1:{operator.port}/readyz"
    assert done.stdout.count(gone) == 2, done.stdout
    assert (done.returncode, done.stderr.strip()) == (1, "An operator is not ready.")

    releases.rollback(RELEASE, version=1)
    assert not has_rules(plane)
    assert identities(here) == running
    releases.upgrade(CHART, RELEASE, values)
    assert identities(here) == running

    releases.uninstall(RELEASE)
    left = plane.kubectl("get", "deployments,serviceaccounts", "-n", NAMESPACE, "-o", "name")
    assert "/finetune-operator\n" not in left
    assert read(plane, DEFINITION)["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert identities(here) == running

    releases.install(CHART, RELEASE, values)
    assert identities(here) == running
    assert [each["status"] for each in releases.history(RELEASE)] == ["deployed"]


def test_a_wrong_value_changes_nothing(releases: helm.Config) -> None:
    count = len(releases.history(RELEASE))
    with pytest.raises(helm.HelmError, match="/trainer/image"):
        releases.upgrade(CHART, RELEASE, {"trainer": {"image": {"repo": "r"}}})
    assert len(releases.history(RELEASE)) == count
