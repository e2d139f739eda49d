"""Kubernetes from the official archives, as a local server publishes them, and from Go modules."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from hack.cluster import binaries, cache, go_modules, versions
from hack.cluster.go_modules import COMMANDS, ETCD_MODULE, MODULE, GoModules
from hack.cluster.official import Releases
from hack.process import ClusterError, Unavailable, output

VERSION = "1.35.7"
ARCHITECTURE = versions.architecture()
SERVER = f"v{VERSION}/kubernetes-server-linux-{ARCHITECTURE}.tar.gz"
ETCD_FOLDER = f"etcd-v{versions.ETCD}-linux-{ARCHITECTURE}"
ETCD = f"v{versions.ETCD}/{ETCD_FOLDER}.tar.gz"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with neither programs nor Go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(binaries.ASSETS_VARIABLE, raising=False)
    monkeypatch.setenv(versions.VARIABLE, VERSION)
    monkeypatch.setattr(binaries, "find_go", no_go)
    monkeypatch.setattr(binaries, "_SAID", set())


def no_go() -> Path:
    raise Unavailable("there is no Go")


# The official archives


def archive(files: Mapping[str, str]) -> bytes:
    """A tar.gz of programs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o750
            tar.addfile(entry, io.BytesIO(content.encode()))
    return buffer.getvalue()


def publish(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of a server that publishes one version, as both projects do."""
    folder = tmp_path / "site"
    script = f"#!/bin/sh\necho Kubernetes v{VERSION}\n"
    names = (*versions.KUBERNETES_PROGRAMS, "kubeadm")
    server = archive({f"kubernetes/server/bin/{name}": script for name in names})
    publish(folder, SERVER, server)
    publish(folder, f"{SERVER}.sha512", hashlib.sha512(server).hexdigest().encode())
    publish(folder, "release/stable-1.35.txt", f"v{VERSION}".encode())
    etcd = archive({f"{ETCD_FOLDER}/etcd": script, f"{ETCD_FOLDER}/etcdctl": script})
    publish(folder, ETCD, etcd)
    others = f"{'0' * 64}  etcd-v{versions.ETCD}-darwin-amd64.zip\n"
    line = f"{hashlib.sha256(etcd).hexdigest()}  {ETCD_FOLDER}.tar.gz\n"
    publish(folder, f"v{versions.ETCD}/SHA256SUMS", (others + line).encode())
    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(binaries, "RELEASES", Releases(url, url))
        yield folder
        running.shutdown()


@pytest.mark.parametrize("asked", [VERSION, "1.35"])
def test_the_archives_are_downloaded_checked_and_kept(
    monkeypatch: pytest.MonkeyPatch, site: Path, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    monkeypatch.setenv(versions.VARIABLE, asked)
    url = binaries.RELEASES.kubernetes

    found = binaries.ensure(binaries.CONTROL_PLANE)

    folder = cache.folder(VERSION)
    assert {path.parent for path in found.values()} == {folder}
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["etcd", *versions.KUBERNETES_PROGRAMS]
    )
    assert versions.version_of(found["kube-apiserver"]) == VERSION
    assert f"Kubernetes {VERSION} from its official archive, {url}" in capsys.readouterr().err
    shutil.rmtree(site)  # the cache serves from now on
    assert binaries.ensure(binaries.CONTROL_PLANE) == found
    assert f"Kubernetes {VERSION} from the cache, {folder}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "algorithm"), [(SERVER, "SHA512"), (ETCD, "SHA256")], ids=["kubernetes", "etcd"]
)
def test_an_archive_with_another_checksum_is_refused_and_nothing_else_is_tried(
    monkeypatch: pytest.MonkeyPatch, site: Path, name: str, algorithm: str
) -> None:
    with (site / name).open("ab") as file:
        file.write(b"one byte more")
    tried: list[object] = []
    monkeypatch.setattr(binaries, "find_go", lambda: tried.append("Go"))

    with pytest.raises(ClusterError, match=f"isn't what its checksum says: {algorithm}") as refused:
        binaries.ensure(binaries.CONTROL_PLANE)
    assert not isinstance(refused.value, Unavailable)
    assert tried == []
    assert cache.find(VERSION) is None
    assert [path.name for path in cache.root().iterdir()] == ["lock"]


def test_a_release_without_a_checksum_is_refused(site: Path) -> None:
    publish(site, f"v{versions.ETCD}/SHA256SUMS", b"<html>not found</html>")

    with pytest.raises(ClusterError, match=f"no checksum of {ETCD_FOLDER}.tar.gz"):
        binaries.ensure(binaries.CONTROL_PLANE)


def test_an_archive_that_lacks_a_program_is_refused(site: Path) -> None:
    server = archive({"kubernetes/server/bin/kubelet": "x"})
    publish(site, SERVER, server)
    publish(site, f"{SERVER}.sha512", hashlib.sha512(server).hexdigest().encode())

    with pytest.raises(ClusterError, match=r"lacks kube-apiserver, kube-controller-manager"):
        binaries.ensure(binaries.CONTROL_PLANE)


@pytest.mark.usefixtures("site")
def test_a_version_that_was_never_released_is_not_to_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(versions.VARIABLE, "1.35.99")

    with pytest.raises(Unavailable, match=r"1\.35\.99 isn't to be had here: .* answers 404; .* Go"):
        binaries.ensure(binaries.CONTROL_PLANE)


# Go modules


STAGING = ("api", "client-go", "component-base", "kubectl")
KUBERNETES_MOD = {
    "Go": "1.26",
    "Godebug": [{"Key": "default", "Value": "go1.26"}],
    "Require": [
        {"Path": "github.com/spf13/cobra", "Version": "v1.10.0"},
        {"Path": "k8s.io/kubectl", "Version": "v0.0.0"},
        {"Path": "k8s.io/klog/v2", "Version": "v2.140.0"},
        {"Path": "k8s.io/api", "Version": "v0.0.0"},
    ],
    "Replace": [{"Old": {"Path": "k8s.io/client-go"}, "New": {"Path": "./staging/client-go"}}],
}


def test_each_staging_module_is_replaced_by_its_release() -> None:
    assert go_modules.go_mod("1.37.2", KUBERNETES_MOD).splitlines() == [
        "module cluster",
        "go 1.26",
        "godebug default=go1.26",
        "require k8s.io/kubernetes v1.37.2",
        "replace k8s.io/api => k8s.io/api v0.37.2",
        "replace k8s.io/client-go => k8s.io/client-go v0.37.2",
        "replace k8s.io/kubectl => k8s.io/kubectl v0.37.2",
    ]


def test_one_program_has_all_parts_by_name() -> None:
    source = go_modules.main_go()
    for name in set(versions.KUBERNETES_PROGRAMS) - {"kubectl"}:
        assert f'case "{name}":' in source
        assert f'"k8s.io/kubernetes/cmd/{name}/app"' in source
    assert "return kubectl.NewDefaultKubectlCommand()" in source


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("go version go1.26.0 linux/amd64", None),
        ("go version go1.30 linux/amd64", None),
        ("go version go1.19.8 linux/amd64", r"is older than 1\.26 \(go version go1\.19\.8"),
    ],
)
def test_only_a_new_enough_go_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: str, reason: str | None
) -> None:
    (tmp_path / "go").write_text(f"#!/bin/sh\necho {printed}\n")
    (tmp_path / "go").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    if reason is None:
        assert go_modules.find_go() == tmp_path / "go"
    else:
        with pytest.raises(Unavailable, match=reason):
            go_modules.find_go()


@pytest.fixture
def go() -> Path:
    """The machine's Go, to build stand-ins of the modules with: small ones of the same layout."""
    try:
        return go_modules.find_go()
    except Unavailable as error:
        pytest.skip(f"{error}; what it would build is checked above")


def module(proxy: Path, path: str, version: str, requires: str, files: Mapping[str, str]) -> None:
    """Put a module into a folder that Go takes for a module proxy."""
    folder = proxy / path / "@v"
    folder.mkdir(parents=True, exist_ok=True)
    text = f"module {path}\ngo 1.26\n{requires}"
    with (folder / "list").open("a") as versions_held:
        versions_held.write(f"{version}\n")
    (folder / f"{version}.info").write_text(json.dumps({"Version": version}))
    (folder / f"{version}.mod").write_text(text)
    with zipfile.ZipFile(folder / f"{version}.zip", "w") as packed:
        for name, content in {"go.mod": text, **files}.items():
            packed.writestr(f"{path}@{version}/{name}", content)


COBRA = "package cobra\ntype Command struct { Use string }\n"
CLI = """\
package cli
import ("fmt"; "github.com/spf13/cobra"; "k8s.io/component-base/version")
func Run(command *cobra.Command) int {
	fmt.Println(command.Use, "Kubernetes", version.Get())
	return 0
}
"""
STAMPED = "package version\nvar gitVersion string\nfunc Get() string { return gitVersion }\n"


def component(program: str, function: str) -> str:
    """The package app of one component."""
    uses = '"context"; ' if "context" in function else ""
    signature = function.replace("context.Background()", "context.Context")
    return (
        f'package app\nimport ({uses}"github.com/spf13/cobra")\n'
        f'func {signature} *cobra.Command {{ return &cobra.Command{{Use: "{program}"}} }}\n'
    )


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A module proxy with stand-ins of Kubernetes, its staging modules and etcd."""
    folder = tmp_path / "proxy"
    staged, cobra = f"v0.{VERSION.partition('.')[2]}", "require github.com/spf13/cobra v1.0.0\n"
    module(folder, "github.com/spf13/cobra", "v1.0.0", "", {"cobra.go": COBRA})
    empty = "package empty\n"
    base = {"cli/cli.go": CLI, "version/version.go": STAMPED, "logs/json/register/a.go": empty}
    base |= {f"metrics/prometheus/{each}/a.go": empty for each in ("clientgo", "version")}
    module(folder, "k8s.io/component-base", staged, cobra, base)
    module(folder, "k8s.io/client-go", staged, "", {"plugin/pkg/client/auth/a.go": empty})
    command = component("kubectl", "NewDefaultKubectlCommand()").replace("app", "cmd", 1)
    module(folder, "k8s.io/kubectl", staged, cobra, {"pkg/cmd/cmd.go": command})
    requires = cobra + "".join(
        f"require k8s.io/{each} v0.0.0\n" for each in ("component-base", "client-go", "kubectl")
    )
    apps = {f"cmd/{name}/app/app.go": component(name, make) for name, (_, make) in COMMANDS.items()}
    for version in ("v1.35.6", f"v{VERSION}"):
        module(folder, MODULE, version, requires, apps)
    etcd = 'package etcdmain\nimport "fmt"\nfunc Main(a []string) { fmt.Println("etcd", len(a)) }\n'
    module(folder, ETCD_MODULE, f"v{versions.ETCD}", "", {"etcdmain/main.go": etcd})
    for name, value in {
        "GOPROXY": folder.as_uri(),
        "GONOSUMDB": "*",
        "GONOPROXY": "none",
        "GOSUMDB": "off",
        "GOPATH": str(tmp_path / "gopath"),
        "GOCACHE": str(tmp_path / "gocache"),
    }.items():
        monkeypatch.setenv(name, value)
    yield folder
    for path in (tmp_path / "gopath").rglob("*"):  # Go writes its modules for reading alone
        path.chmod(0o755)


@pytest.mark.usefixtures("proxy")
def test_go_builds_one_program_that_does_what_its_name_says(
    monkeypatch: pytest.MonkeyPatch, go: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(binaries, "RELEASES", Releases("http://127.0.0.1:9", "http://127.0.0.1:9"))
    monkeypatch.setattr(binaries, "find_go", lambda: go)
    monkeypatch.setenv(versions.VARIABLE, "1.35")

    binaries.ensure(binaries.CONTROL_PLANE)

    assert f"Kubernetes {VERSION} from its Go modules, built by {go}" in capfd.readouterr().err
    for name in versions.KUBERNETES_PROGRAMS:
        assert output([str(cache.folder(VERSION) / name)]) == f"{name} Kubernetes v{VERSION}\n"
    assert output([str(cache.folder(VERSION) / "etcd"), "x"]) == "etcd 2\n"


def test_a_go_without_a_proxy_says_what_it_cannot_get(
    monkeypatch: pytest.MonkeyPatch, go: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOPROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("GOPATH", str(tmp_path / "gopath"))

    with pytest.raises(Unavailable, match=f"Go can't get {MODULE}@v{VERSION}: .*refused"):
        GoModules(go, tmp_path / "log").resolve(VERSION)


def test_a_build_that_is_cut_off_leaves_nothing_that_looks_complete() -> None:
    with suppress(KeyboardInterrupt), cache.fresh(VERSION) as target:
        programs = (*versions.KUBERNETES_PROGRAMS, "etcd")
        for name in programs:
            (target / name).touch(mode=0o755)
        raise KeyboardInterrupt
    assert cache.find(VERSION) is None
    assert list(cache.root().iterdir()) == []
