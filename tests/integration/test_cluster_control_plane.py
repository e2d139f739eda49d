"""The control plane that the other integration tests stand on is a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hack.cluster import binaries
from hack.cluster.control_plane import ControlPlane
from hack.process import CommandFailed, output

COUNT = 50
CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "things.cluster-test.dev"},
    "spec": {
        "group": "cluster-test.dev",
        "scope": "Namespaced",
        "names": {"plural": "things", "singular": "thing", "kind": "Thing"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {"size": {"type": "integer"}},
                    }
                },
            }
        ],
    },
}


def thing(number: int) -> dict[str, object]:
    name = f"thing-{number}"
    return {
        "apiVersion": "cluster-test.dev/v1",
        "kind": "Thing",
        "metadata": {"name": name},
        "size": number,
    }


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    name = "cluster-test"
    control_plane.kubectl("create", "namespace", name)
    yield name
    control_plane.kubectl("delete", "namespace", name, "--wait=true", "--timeout=60s")


@pytest.fixture
def things(control_plane: ControlPlane) -> Iterator[None]:
    control_plane.apply_definitions("-", input=yaml.safe_dump(CRD))
    yield
    control_plane.kubectl("delete", "crd/things.cluster-test.dev")


@pytest.mark.usefixtures("things")
def test_fifty_custom_resources_are_created_and_read_back(
    control_plane: ControlPlane, namespace: str
) -> None:
    documents = yaml.safe_dump_all([thing(number) for number in range(COUNT)])

    control_plane.kubectl("apply", "-n", namespace, "-f", "-", input=documents)

    names = control_plane.kubectl("get", "things", "-n", namespace, "-o", "name").split()
    assert len(names) == COUNT


@pytest.mark.usefixtures("things")
def test_the_schema_of_a_custom_resource_is_enforced(
    control_plane: ControlPlane, namespace: str
) -> None:
    wrong = yaml.safe_dump({**thing(0), "size": "large"})

    with pytest.raises(CommandFailed, match="size"):
        control_plane.kubectl("create", "-n", namespace, "-f", "-", input=wrong)


def test_a_service_account_may_do_what_its_role_grants_and_nothing_else(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.kubectl("create", "serviceaccount", "reader", "-n", namespace)
    role = ["--verb=get,list", "--resource=configmaps"]
    control_plane.kubectl("create", "role", "reader", "-n", namespace, *role)
    binding = ["--role=reader", f"--serviceaccount={namespace}:reader"]
    control_plane.kubectl("create", "rolebinding", "reader", "-n", namespace, *binding)
    kubeconfig = control_plane.kubeconfig_for_service_account(namespace, "reader")
    kubectl = [str(binaries.kubectl()), "--kubeconfig", str(kubeconfig)]

    assert "kube-root-ca.crt" in output([*kubectl, "get", "configmaps"])
    with pytest.raises(CommandFailed, match="Forbidden"):
        output([*kubectl, "get", "secrets"])


def test_deleting_an_owner_collects_what_it_owns(
    control_plane: ControlPlane, namespace: str
) -> None:
    image = "--image=localhost/none:1"
    control_plane.kubectl("create", "job", "owner", "-n", namespace, image, "--", "none")
    selector = "-l=job-name=owner"
    control_plane.kubectl("wait", "--for=create", "pod", "-n", namespace, selector, "--timeout=20s")

    control_plane.kubectl("delete", "job", "owner", "-n", namespace, "--cascade=background")

    control_plane.kubectl("wait", "--for=delete", "pod", "-n", namespace, selector, "--timeout=30s")


@pytest.mark.usefixtures("control_plane")
def test_a_restart_keeps_data_and_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "restarted"
    with ControlPlane(folder) as first:
        first.kubectl("create", "configmap", "kept")
        token = first.admin_token

    with ControlPlane(folder) as second:
        assert second.admin_token == token
        assert "kept" in second.kubectl("get", "configmap", "kept")
        assert second.healthy()
    assert not second.etcd.alive()
    assert not second.apiserver.alive()
    assert not second.manager.alive()
