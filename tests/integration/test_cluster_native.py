"""A node without Docker runs pods for real, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from hack import debian
from hack.cluster.native import NativeCluster
from hack.cluster.node import BINDS, CGROUPS
from hack.cluster.node_config import PAUSE_IMAGE
from hack.process import Unavailable
from tests.fixtures import start_or_leave_out

SCRIPT = """
b=/busybox
$b id -u
$b touch /tmp/written && echo "scratch space"
$b touch /written 2>/dev/null || echo "read-only root"
for try in 1 2 3 4 5 6; do  # kube-proxy may begin after the pod
  $b nc -w 5 $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT </dev/null 2>/dev/null && break
done && echo "reached the API"
echo '{"result": "from the pod"}' > /dev/termination-log
exit 14
"""
RESTRICTED_POD = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "fsGroup": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
RESTRICTED_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def job(name: str) -> str:
    container = {
        "name": "main",
        "image": PAUSE_IMAGE,
        "imagePullPolicy": "Never",
        "command": ["/busybox", "sh", "-c", SCRIPT],
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        "resources": {
            "requests": {"cpu": "50m", "memory": "32Mi"},
            "limits": {"cpu": "500m", "memory": "64Mi"},
        },
    }
    pod = {
        "restartPolicy": "Never",
        "securityContext": RESTRICTED_POD,
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "containers": [container],
    }
    return yaml.safe_dump(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name},
            "spec": {"backoffLimit": 0, "template": {"spec": pod}},
        }
    )


def start_anew(native: NativeCluster) -> None:
    if not debian.is_debian_like() or os.geteuid() != 0:
        raise Unavailable("it runs on Debian or Ubuntu, as root")
    native.down()
    native.up()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[NativeCluster]:
    native = NativeCluster("test")
    what = "the native Kubernetes node"
    start_or_leave_out(request.config, what, lambda: start_anew(native))
    yield native
    native.down()


def run_job(cluster: NativeCluster, name: str) -> dict[str, str]:
    """Run the job to its end; its log, exit code and termination message."""
    cluster.kubectl("apply", "-f", "-", input=job(name))
    cluster.kubectl("wait", "--for=condition=Failed", f"job/{name}", "--timeout=60s")
    path = "jsonpath={.items[0].status.containerStatuses[0].state.terminated['exitCode','message']}"
    state = cluster.kubectl("get", "pod", f"-l=job-name={name}", "-o", path)
    log = cluster.kubectl("logs", f"job/{name}")
    cluster.kubectl("delete", "job", name)
    return {"state": state.strip(), "log": log}


EXPECTED = {
    "state": '14 {"result": "from the pod"}',
    "log": "65532\nscratch space\nread-only root\nreached the API\n",
}


def test_a_restricted_pod_runs_reaches_the_api_server_and_reports(cluster: NativeCluster) -> None:
    assert run_job(cluster, "first") == EXPECTED


def test_up_again_reuses_the_running_cluster(cluster: NativeCluster) -> None:
    before = cluster.node.init_process()

    cluster.up()

    assert cluster.node.init_process() == before


def test_up_heals_a_node_whose_daemon_was_killed(cluster: NativeCluster) -> None:
    init = cluster.node.init_process()
    assert init is not None
    kubelet = next(child for child in init.children() if child.name() == "kubelet")
    kubelet.kill()
    init.wait(timeout=20)
    assert not cluster.healthy()

    cluster.up()

    assert run_job(cluster, "healed") == EXPECTED


def test_down_leaves_nothing_behind(cluster: NativeCluster) -> None:
    init = cluster.node.init_process()
    assert init is not None
    inside = init.children(recursive=True)
    network = cluster.node.network

    cluster.down()

    assert not [process for process in inside if process.is_running()]
    assert not network.present()
    assert str(cluster.folder) not in Path("/proc/mounts").read_text()
    assert not list(CGROUPS.glob(f"**/{cluster.node.cgroup}"))
    assert not cluster.folder.exists()
    assert network.host_address not in [
        address.address for entries in psutil.net_if_addrs().values() for address in entries
    ]


def test_up_works_after_down(cluster: NativeCluster) -> None:
    cluster.up()

    assert all(target.exists() for target in BINDS.values())
    assert run_job(cluster, "anew") == EXPECTED
