"""Which cluster and which binaries a machine gets, and what it is told where there are none."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from hack import debian
from hack.cluster import (
    binaries,
    cache,
    debian_packages,
    kind,
    node_config,
    provider,
    versions,
)
from hack.cluster.kind import KindCluster
from hack.cluster.kubernetes_build import TARGETS
from hack.cluster.native import NativeCluster
from hack.cluster.node import containerd_version
from hack.cluster.node_network import NodeNetwork
from hack.cluster.official import Releases
from hack.process import ClusterError, Unavailable

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


def programs(folder: Path, version: str, *names: str) -> Path:
    """Programs that tell their version and do nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\necho Kubernetes v{version}\n")
        (folder / name).chmod(0o755)
    return folder


NODE = tuple(name for target in ("etcd", *TARGETS) for name in binaries.PROGRAMS[target])


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A machine with nothing, as far as these tests see; what it would take from Debian."""
    asked: list[str] = []

    def from_debian(targets: tuple[str, ...]) -> dict[str, Path]:
        asked.extend(targets)
        return {name: Path("/debian", name) for each in targets for name in binaries.PROGRAMS[each]}

    for name in (versions.VARIABLE, binaries.ASSETS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(binaries, "RELEASES", Releases("http://127.0.0.1:9", "http://127.0.0.1:9"))
    monkeypatch.setattr(binaries, "find_go", no_go)
    monkeypatch.setattr(binaries, "_SAID", set())
    monkeypatch.setattr(debian_packages, "ensure", from_debian)
    return asked


def no_go() -> Path:
    raise Unavailable("there is no Go")


def folders(found: Mapping[str, Path]) -> set[Path]:
    """Where the programs are from, busybox aside."""
    return {path.parent for name, path in found.items() if name != "busybox"}


def test_assets_without_a_controller_manager_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs(tmp_path / "envtest", "1.37.2", "etcd", "kube-apiserver", "kubectl")
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(tmp_path / "envtest"))

    with pytest.raises(Unavailable, match=r"lacks kube-controller-manager\."):
        binaries.ensure(binaries.CONTROL_PLANE)


@pytest.mark.parametrize("version", ["1.37.2", "1.34.1"])
def test_complete_assets_of_any_version_win_over_the_cache(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    version: str,
) -> None:
    held = programs(cache.folder(versions.NEWEST), versions.NEWEST, *NODE, "kubectl")
    assets = programs(tmp_path / "assets", version, *NODE[:3])
    assert folders(binaries.ensure(binaries.CONTROL_PLANE)) == {held}
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(assets))

    assert folders(binaries.ensure(binaries.CONTROL_PLANE)) == {assets}
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"Kubernetes {versions.NEWEST} from the cache, {held}",
        f"Kubernetes {version} from {binaries.ASSETS_VARIABLE}, {assets}",
    ]


def test_assets_of_a_whole_node_serve_it_with_busybox_from_debian(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: list[str]
) -> None:
    assets = programs(tmp_path / "assets", "1.37.2", *NODE)
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(assets))

    found = binaries.ensure(binaries.NODE)

    assert elsewhere == ["pause"]
    assert found["busybox"] == Path("/debian/busybox")
    assert folders(found) == {assets}
    assert {"kubelet", "kube-proxy", "kube-scheduler", "kube-apiserver"} <= found.keys()


def test_busybox_in_the_assets_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: list[str]
) -> None:
    assets = programs(tmp_path / "assets", "1.37.2", *NODE, "busybox")
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(assets))

    assert binaries.ensure(binaries.NODE)["busybox"] == assets / "busybox"
    assert elsewhere == []


def test_assets_without_a_kubelet_leave_the_whole_node_to_what_comes_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assets = programs(tmp_path / "assets", "1.37.2", *NODE)
    (assets / "kubelet").unlink()
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(assets))
    held = programs(cache.folder(versions.NEWEST), versions.NEWEST, *NODE, "kubectl")

    assert folders(binaries.ensure(binaries.NODE)) == {held}
    assert capsys.readouterr().err == f"Kubernetes {versions.NEWEST} from the cache, {held}\n"


def test_a_folder_of_folders_has_every_version_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newest = programs(tmp_path / "current", versions.NEWEST, *NODE, "kubectl")
    oldest = programs(tmp_path / "old", versions.OLDEST, *NODE, "kubectl")
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(tmp_path))

    assert folders(binaries.ensure(binaries.NODE)) == {newest}
    for text, folder in {
        "newest": newest,
        "oldest": oldest,
        "1.33": oldest,
        f"v{versions.NEWEST}": newest,
        str(oldest): oldest,
    }.items():
        monkeypatch.setenv(versions.VARIABLE, text)
        assert folders(binaries.ensure(binaries.NODE)) == {folder}
        assert binaries.kubectl() == folder / "kubectl"


@pytest.mark.parametrize(
    ("asked", "serves"), [("oldest", True), ("1.33", True), ("1.33.13", False)]
)
def test_a_folder_may_have_a_later_patch_of_the_oldest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, serves: bool
) -> None:
    later = programs(tmp_path / "later", "1.33.14", *NODE)
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(later))
    monkeypatch.setenv(versions.VARIABLE, asked)

    if serves:
        assert folders(binaries.ensure(binaries.CONTROL_PLANE)) == {later}
    else:
        with pytest.raises(Unavailable, match=r"later has 1\.33\.14"):
            binaries.ensure(binaries.CONTROL_PLANE)


def test_a_minor_version_takes_its_newest_patch_of_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for version in ("1.35.9", "1.35.10", "1.36.1"):
        programs(cache.folder(version), version, *NODE, "kubectl")
    (cache.folder("1.35.10") / "kubelet").chmod(0o644)  # as if it weren't there
    monkeypatch.setenv(versions.VARIABLE, "1.35")

    assert folders(binaries.ensure(binaries.CONTROL_PLANE)) == {cache.folder("1.35.9")}
    (cache.folder("1.35.10") / "kubelet").chmod(0o755)
    assert folders(binaries.ensure(binaries.CONTROL_PLANE)) == {cache.folder("1.35.10")}


def test_another_version_than_the_wanted_one_is_never_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: list[str]
) -> None:
    programs(tmp_path / "current", versions.NEWEST, *NODE, "kubectl")
    monkeypatch.setenv(binaries.ASSETS_VARIABLE, str(tmp_path / "current"))
    monkeypatch.setenv(versions.VARIABLE, "1.35")

    with pytest.raises(Unavailable) as refused:
        binaries.ensure(binaries.CONTROL_PLANE)
    words = str(refused.value)
    assert words.startswith("Kubernetes 1.35 isn't to be had here: ")
    for reason in (f"current has {versions.NEWEST}", "127.0.0.1 can't be reached", "is no Go"):
        assert reason in words
    assert elsewhere == []


@pytest.mark.parametrize("text", ["1.32", "1.38", "2", "latest", "1.33.x"])
def test_a_version_that_is_not_supported_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(versions.VARIABLE, text)

    with pytest.raises(Unavailable, match=r"a version from 1\.33 to 1\.37 such as"):
        binaries.ensure(binaries.CONTROL_PLANE)


def test_debians_source_is_the_last_resort_and_one_line_says_why(
    elsewhere: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    binaries.ensure(binaries.NODE)
    binaries.ensure(binaries.NODE)

    assert tuple(elsewhere) == 2 * binaries.NODE
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        "Kubernetes 1.20.2 from Debian's source, which is the last resort: "
        "KUBEBUILDER_ASSETS isn't set; 127.0.0.1 can't be reached ([Errno 111] Connection "
        "refused); there is no Go"
    )


def test_the_last_resort_may_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, elsewhere: list[str]
) -> None:
    programs(cache.folder(versions.NEWEST), versions.NEWEST, *NODE, "kubectl")
    monkeypatch.setenv(versions.VARIABLE, "1.20")

    binaries.ensure(binaries.CONTROL_PLANE)
    assert tuple(elsewhere) == binaries.CONTROL_PLANE


@pytest.mark.parametrize(("minor", "told"), [(20, None), (33, False), (37, False)])
def test_only_a_kubelet_that_knows_the_field_is_told_to_bear_old_cgroups(
    minor: int, told: bool | None
) -> None:
    network = NodeNetwork(201, "wire")

    configuration = node_config.kubelet(network, Path("/ca.crt"), "/pods", minor)

    assert configuration.get("failCgroupV1") is told


@pytest.mark.parametrize(
    ("printed", "major"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", 1),
        ("containerd containerd.io 1.7.27 05044ec0a9a7", 1),
        ("containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4", 2),
    ],
)
def test_containerd_gets_the_configuration_that_its_version_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: str, major: int
) -> None:
    (tmp_path / "containerd").write_text(f"#!/bin/sh\necho '{printed}'\n")
    (tmp_path / "containerd").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert containerd_version() == major

    places = (Path("/root"), Path("/cni"), Path("/registries"))
    written = node_config.Containerd(*places, "native").config(major)

    read = tomllib.loads(written)
    assert read["version"] == {1: 2, 2: 3}[major]
    assert read["grpc"]["address"] == node_config.CONTAINERD_SOCKET
    plugins = read["plugins"]
    if major == 1:
        cri = plugins["io.containerd.grpc.v1.cri"]
        assert cri["sandbox_image"] == node_config.PAUSE_IMAGE
        assert cri["cni"] == {"bin_dir": "/usr/lib/cni", "conf_dir": "/cni"}
        assert cri["containerd"]["snapshotter"] == "native"
        assert cri["registry"] == {"config_path": "/registries"}
    else:
        images = plugins["io.containerd.cri.v1.images"]
        assert images["pinned_images"] == {"sandbox": node_config.PAUSE_IMAGE}
        assert images["snapshotter"] == "native"
        assert images["registry"] == {"config_path": "/registries"}
        cri = plugins["io.containerd.cri.v1.runtime"]
        assert cri["cni"] == {"bin_dirs": ["/usr/lib/cni"], "conf_dir": "/cni"}
    assert cri["restrict_oom_score_adj"]
    assert cri["containerd"]["runtimes"]["runc"]["options"] == {"SystemdCgroup": False}


def test_a_containerd_that_does_not_run_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(Unavailable, match="containerd doesn't run"):
        containerd_version()


@pytest.mark.parametrize(
    ("asked", "image"),
    [
        ("", None),
        ("newest", "kindest/node:v1.37.0@sha256:"),
        ("oldest", "kindest/node:v1.33.12@sha256:"),
        ("1.35", "kindest/node:v1.35.8@sha256:"),
    ],
)
def test_kind_takes_its_image_of_the_minor_version(
    monkeypatch: pytest.MonkeyPatch, asked: str, image: str | None
) -> None:
    monkeypatch.setenv(versions.VARIABLE, asked)

    found = kind.node_image()
    assert found is None if image is None else str(found).startswith(image)


def test_a_running_cluster_of_another_version_is_not_taken_for_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = programs(tmp_path / "some", "1.34.2", *NODE)
    versions.require_running(36)
    for asked, minor in {"1.35": 35, "newest": 37, "oldest": 33, str(folder): 34}.items():
        monkeypatch.setenv(versions.VARIABLE, asked)
        versions.require_running(minor)
        with pytest.raises(ClusterError, match=rf"1\.36 runs, and K8S asks for 1\.{minor}: remove"):
            versions.require_running(36)


def test_kind_has_an_image_of_each_supported_version() -> None:
    assert sorted(kind.NODE_IMAGES) == list(versions.MINORS)


@pytest.mark.parametrize(("wanted", "cluster"), [("kind", KindCluster), ("native", NativeCluster)])
def test_the_user_may_choose_the_provider(
    monkeypatch: pytest.MonkeyPatch, wanted: str, cluster: type[object]
) -> None:
    monkeypatch.setenv(provider.VARIABLE, wanted)

    assert isinstance(provider.choose(), cluster)


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
