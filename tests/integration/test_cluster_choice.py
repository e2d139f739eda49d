"""Which cluster and which binaries a machine gets, and what it is told where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from hack import debian
from hack.cluster import binaries, node_config, provider
from hack.cluster.kind import KindCluster
from hack.cluster.kubernetes_build import TARGETS
from hack.cluster.native import NativeCluster
from hack.cluster.node_network import NodeNetwork
from hack.process import Unavailable

SOURCES = """\
bookworm|main|http://one.invalid/debian/
bookworm-updates|main|http://one.invalid/debian/
bookworm-security|main|http://one.invalid/debian-security/
bookworm|main|http://vendor.invalid/tools/
bookworm|stable|http://other.invalid/debian/
"""


@pytest.fixture
def bookworm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(debian.MIRROR_VARIABLE, raising=False)
    monkeypatch.setattr(debian, "os_release", lambda: {"VERSION_CODENAME": "bookworm"})


@pytest.mark.usefixtures("bookworm")
def test_the_mirror_is_the_one_of_the_machines_own_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(debian, "output", lambda _: SOURCES)

    assert debian.mirror() == "http://one.invalid/debian/"


@pytest.mark.usefixtures("bookworm")
def test_without_a_debian_mirror_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "output", lambda _: "noble|main|http://one.invalid/ubuntu/\n")

    with pytest.raises(Unavailable, match=debian.MIRROR_VARIABLE):
        debian.mirror()


def test_assets_without_a_controller_manager_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("etcd", "kube-apiserver", "kubectl"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(tmp_path))

    with pytest.raises(Unavailable, match=r"lacks kube-controller-manager\."):
        binaries.ensure(binaries.CONTROL_PLANE)


def test_complete_assets_win_over_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("etcd", "kube-apiserver", "kube-controller-manager"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(tmp_path))

    found = binaries.ensure(binaries.CONTROL_PLANE)

    assert {path.parent for path in found.values()} == {tmp_path}


@pytest.fixture
def node_assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with the programs of a whole node, but without busybox."""
    for target in ("etcd", *TARGETS):
        for name in binaries.PROGRAMS[target]:
            (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The targets that would be built or fetched on this Debian, which has nothing yet."""
    asked: list[str] = []

    def from_debian(targets: tuple[str, ...]) -> dict[str, Path]:
        asked.extend(targets)
        return {name: Path("/debian", name) for each in targets for name in binaries.PROGRAMS[each]}

    monkeypatch.setattr(binaries, "_from_debian", from_debian)
    return asked


def test_assets_of_a_whole_node_serve_it_with_busybox_from_debian(
    node_assets: Path, built: list[str]
) -> None:
    found = binaries.ensure(binaries.NODE)

    assert built == ["pause"]
    assert found.pop("busybox") == Path("/debian/busybox")
    assert {path.parent for path in found.values()} == {node_assets}
    assert {"kubelet", "kube-proxy", "kube-scheduler", "kube-apiserver"} <= found.keys()


def test_busybox_in_the_assets_is_taken(node_assets: Path, built: list[str]) -> None:
    (node_assets / "busybox").touch(mode=0o755)

    assert binaries.ensure(binaries.NODE)["busybox"] == node_assets / "busybox"
    assert built == []


def test_assets_without_a_kubelet_leave_the_whole_node_to_debians_source(
    node_assets: Path, built: list[str]
) -> None:
    (node_assets / "kubelet").unlink()

    assert node_assets not in {path.parent for path in binaries.ensure(binaries.NODE).values()}
    assert tuple(built) == binaries.NODE


@pytest.mark.parametrize(("minor", "told"), [(20, None), (30, None), (31, False), (37, False)])
def test_only_a_kubelet_that_knows_the_field_is_told_to_bear_old_cgroups(
    minor: int, told: bool | None
) -> None:
    network = NodeNetwork(201, "wire")

    configuration = node_config.kubelet(network, Path("/ca.crt"), "/pods", minor)

    assert configuration.get("failCgroupV1") is told


@pytest.mark.parametrize(("wanted", "kind"), [("kind", KindCluster), ("native", NativeCluster)])
def test_the_user_may_choose_the_provider(
    monkeypatch: pytest.MonkeyPatch, wanted: str, kind: type[object]
) -> None:
    monkeypatch.setenv(provider.VARIABLE, wanted)

    assert isinstance(provider.choose(), kind)


def test_an_unknown_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provider.VARIABLE, "minikube")

    with pytest.raises(Unavailable, match="kind or native"):
        provider.choose()


def test_a_machine_with_neither_is_told_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(provider.VARIABLE, raising=False)
    monkeypatch.setattr(provider, "_kind_works", lambda: False)
    monkeypatch.setattr(debian, "is_debian_like", lambda: False)

    with pytest.raises(Unavailable, match=r"Docker.*root on Debian"):
        provider.choose()
