"""Builds Kubernetes 1.20.2 from Debian's source package, with Debian's Go, without root.

Two changes to the upstream tree are needed. It lacks one generated file (the OpenAPI definitions
of the built-in types), which its own generator writes here from the same packages as upstream's
Makefile. And its vendored reflect2 predates Go 1.18 and crashes as soon as a custom resource is
created, so it and json-iterator are replaced by Debian's newer ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hack.cluster import versions
from hack.debian import PrivateApt
from hack.process import run
from hack.progress import Step

VERSION = f"v{versions.LAST_RESORT}"
RECIPE = 1
"""Raise it when the same sources would be built in another way."""

TARGETS = {
    "control-plane": ("kube-apiserver", "kube-controller-manager"),
    "node": ("kube-scheduler", "kubelet", "kube-proxy"),
}
GO_PACKAGES = ["golang-1.19-go", "golang-1.19-src"]
LIBRARY_PACKAGES = {
    "golang-github-modern-go-reflect2-dev": "github.com/modern-go/reflect2",
    "golang-github-json-iterator-go-dev": "github.com/json-iterator/go",
}
STAMPED = (
    "k8s.io/kubernetes/vendor/k8s.io/component-base/version",
    "k8s.io/kubernetes/vendor/k8s.io/client-go/pkg/version",
)
"""The packages that hold the version; without modules the linker wants their vendored paths."""
OPENAPI_ROOTS = ("pkg", "cmd", "plugin", "staging/src/k8s.io")
OPENAPI_TAG = b"+k8s:openapi-gen="
OPENAPI_EXCLUDED = ("code-generator", "sample-apiserver", "testdata")


class KubernetesBuild:
    """One build tree in a temporary folder, from which any number of targets are built."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.log = log
        self.tools = folder / "tools"
        self.gopath = folder / "gopath"
        self.source = self.gopath / "src" / "k8s.io" / "kubernetes"

    def prepare(self, apt: PrivateApt, step: Step) -> None:
        """Fetch and unpack sources and compiler, and make the tree complete."""
        step.detail("downloading the Go compiler and the Kubernetes source")
        apt.unpack([*GO_PACKAGES, *LIBRARY_PACKAGES], self.tools)
        archive = apt.upstream_source("kubernetes")
        step.detail("unpacking")
        self.source.mkdir(parents=True)
        unpack = ["tar", "-xf", str(archive), "--strip-components=1", "-C", str(self.source)]
        run(unpack, log=self.log)
        self._replace_libraries()
        step.detail("generating the OpenAPI definitions")
        self._generate_openapi()

    def _replace_libraries(self) -> None:
        for library in LIBRARY_PACKAGES.values():
            vendored = self.source / "vendor" / library
            shutil.rmtree(vendored)
            shutil.copytree(self.tools / "usr/share/gocode/src" / library, vendored)

    def _openapi_packages(self) -> list[str]:
        """The packages that upstream's Makefile hands to its OpenAPI generator."""
        found: set[str] = set()
        for root in OPENAPI_ROOTS:
            for path in (self.source / root).rglob("*.go"):
                relative = path.relative_to(self.source)
                if path.name.startswith("zz_generated") or path.name.endswith("_test.go"):
                    continue
                if any(part in OPENAPI_EXCLUDED for part in relative.parts):
                    continue
                if OPENAPI_TAG in path.read_bytes():
                    found.add(relative.parent.as_posix().replace("staging/src/", "vendor/", 1))
        return [f"k8s.io/kubernetes/{package}" for package in sorted(found)]

    def _generate_openapi(self) -> None:
        generator = self.folder / "openapi-gen"
        self._go("build", "-o", str(generator), "./vendor/k8s.io/kube-openapi/cmd/openapi-gen")
        arguments = {
            "-i": ",".join(self._openapi_packages()),
            "-p": "k8s.io/kubernetes/pkg/generated/openapi",
            "-O": "zz_generated.openapi",
            "-h": "vendor/k8s.io/code-generator/hack/boilerplate.go.txt",
            "-r": str(self.folder / "violations"),
        }
        words = [word for pair in arguments.items() for word in pair]
        run([str(generator), *words], log=self.log, cwd=self.source, env=self._environment())

    def compile(self, target: str, destination: Path, step: Step) -> None:
        """Build the programs of one target into `destination`."""
        stamp = {"gitVersion": VERSION, "gitMajor": "1", "gitMinor": "20"}
        variables = [f"-X {path}.{k}={v}" for path in STAMPED for k, v in stamp.items()]
        flags = " ".join(["-s", "-w", *variables])
        programs = TARGETS[target]
        count = 0

        def compiled(_package: str) -> None:
            nonlocal count
            count += 1
            step.detail(f"{', '.join(programs)} ({count} packages compiled)")

        destination.mkdir(parents=True)
        packages = [f"./cmd/{program}" for program in programs]
        build = ["build", "-v", "-ldflags", flags, "-o", f"{destination}/", *packages]
        self._go(*build, on_line=compiled)

    def _environment(self) -> dict[str, str]:
        goroot = self.tools / "usr/lib/go-1.19"
        settings = {
            "GOROOT": str(goroot),
            "GOPATH": str(self.gopath),
            "GOCACHE": str(self.folder / "gocache"),
            "GOENV": "off",
            "GOFLAGS": "",
            "GO111MODULE": "off",
            "CGO_ENABLED": "0",
            "PATH": f"{goroot / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        }
        return {**os.environ, **settings}

    def _go(self, *arguments: str, on_line: Callable[[str], None] | None = None) -> None:
        command = ["nice", "-n", "10", "go", *arguments]
        run(command, log=self.log, cwd=self.source, env=self._environment(), on_line=on_line)
