"""Builds Kubernetes and etcd from their released Go modules, where a new enough Go is at hand.

All parts of Kubernetes become one program, which is called by name: they share most of their code,
so that is one link and a quarter of the disk. `k8s.io/kubernetes` asks for its staging modules at
v0.0.0, which nobody can download; each is replaced by the v0 release of the same day. About 5
minutes on 2 cores, downloads aside.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hack.cluster import versions
from hack.process import CommandFailed, Unavailable, output, run
from hack.progress import Step

OLDEST_GO = (1, 26)
MODULE = "k8s.io/kubernetes"
ETCD_MODULE = "go.etcd.io/etcd/server/v3"
STAGED = "v0.0.0"
COMMANDS = {
    "kube-apiserver": ("apiserver", "NewAPIServerCommand()"),
    "kube-controller-manager": ("controllermanager", "NewControllerManagerCommand()"),
    "kube-proxy": ("proxy", "NewProxyCommand()"),
    "kube-scheduler": ("scheduler", "NewSchedulerCommand()"),
    "kubelet": ("kubelet", "NewKubeletCommand(context.Background())"),
}
"""By program: the name its package is imported under, and what makes its command."""

MAIN = """\
// All parts of Kubernetes in one program, which does what its name says.
package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	_ "k8s.io/client-go/plugin/pkg/client/auth"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
{imports}
)

func command(name string) *cobra.Command {{
	switch name {{
{cases}
	}}
	return kubectl.NewDefaultKubectlCommand()
}}

func main() {{
	os.Exit(cli.Run(command(filepath.Base(os.Args[0]))))
}}
"""
ETCD_MAIN = f"""\
package main

import (
	"os"

	"{ETCD_MODULE}/etcdmain"
)

func main() {{
	etcdmain.Main(os.Args)
}}
"""


def find_go() -> Path:
    """A Go that is new enough: on PATH, or beside the running Python."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    wanted = ".".join(map(str, OLDEST_GO))
    found = shutil.which("go", path=search)
    if not found:
        raise Unavailable(f"there is no Go (from {wanted} on)")
    told = output([found, "version"])
    version = re.search(r"\bgo(\d+)\.(\d+)", told)
    if not version or (int(version[1]), int(version[2])) < OLDEST_GO:
        raise Unavailable(f"{found} is older than {wanted} ({told.strip()})")
    return Path(found)


def main_go() -> str:
    """The program's source."""
    imports = [f'\t{name} "{MODULE}/cmd/{program}/app"' for program, (name, _) in COMMANDS.items()]
    cases = [
        f'\tcase "{program}":\n\t\treturn {name}.{make}'
        for program, (name, make) in COMMANDS.items()
    ]
    return MAIN.format(imports="\n".join(imports), cases="\n".join(cases))


def go_mod(version: str, kubernetes: Mapping[str, Any]) -> str:
    """The program's go.mod, from that of Kubernetes (as `go mod edit -json` prints it)."""
    required = [(each["Path"], each["Version"]) for each in kubernetes.get("Require") or ()]
    local = [each["Old"]["Path"] for each in kubernetes.get("Replace") or ()]
    staging = sorted({*local, *(path for path, asked in required if asked == STAGED)})
    released = "v0." + version.partition(".")[2]
    settings = [
        f"godebug {each['Key']}={each['Value']}" for each in kubernetes.get("Godebug") or ()
    ]
    lines = [
        "module cluster",
        f"go {kubernetes['Go']}",
        *settings,
        f"require {MODULE} v{version}",
        *(f"replace {path} => {path} {released}" for path in staging),
    ]
    return "\n".join(lines) + "\n"


def linker_flags(version: str) -> str:
    """What makes the program tell its version."""
    minor = version.split(".")[1]
    stamp = {"gitVersion": f"v{version}", "gitMajor": "1", "gitMinor": minor}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    stamps = [f"-X {package}.{key}={value}" for package in packages for key, value in stamp.items()]
    return " ".join(["-s", "-w", *stamps])


class GoModules:
    """One Go, with which any version can be built."""

    def __init__(self, go: Path, log: Path) -> None:
        self.go = go
        self.log = log
        own = {"CGO_ENABLED": "0", "GO111MODULE": "on", "GOFLAGS": "-mod=mod", "GOWORK": "off"}
        self._environment = {**os.environ, **own, "GOTOOLCHAIN": "local"}

    def resolve(self, wanted: str) -> str:
        """The newest released patch of a minor version; raises Unavailable without a network."""
        found = self._json("list", "-m", "-json", f"{MODULE}@v{wanted}")
        return str(found["Version"]).removeprefix("v")

    def build(self, version: str, target: Path, step: Step) -> None:
        """Build the programs of one version and etcd into a folder."""
        work = target.parent / "source"
        step.detail("downloading the modules")
        module = self._json("mod", "download", "-json", f"{MODULE}@v{version}")
        described = self._json("mod", "edit", "-json", str(module["GoMod"]))
        flags = linker_flags(version)
        files = {"go.mod": go_mod(version, described), "main.go": main_go()}
        self._compile(work / "kubernetes", files, target / "kubernetes", flags, step)
        for name in versions.KUBERNETES_PROGRAMS:
            (target / name).symlink_to("kubernetes")
        required = f"require {ETCD_MODULE} v{versions.ETCD}"
        go = ".".join(map(str, OLDEST_GO))
        files = {"go.mod": f"module etcd\ngo {go}\n{required}\n", "main.go": ETCD_MAIN}
        self._compile(work / "etcd", files, target / "etcd", "-s -w", step)

    def _compile(
        self, folder: Path, files: Mapping[str, str], program: Path, flags: str, step: Step
    ) -> None:
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_text(content)
        count = 0

        def compiled(_line: str) -> None:
            nonlocal count
            count += 1
            step.detail(f"{program.name} ({count} packages)")

        build = ["build", "-v", "-trimpath", "-ldflags", flags, "-o", str(program), "."]
        command = ["nice", "-n", "10", str(self.go), *build]
        run(command, log=self.log, cwd=folder, env=self._environment, on_line=compiled)

    def _json(self, *arguments: str) -> dict[str, Any]:
        command = [str(self.go), *arguments]
        try:
            found = json.loads(output(command, env=self._environment))
        except CommandFailed as error:
            reason = error.tail.splitlines()[-1] if error.tail else f"exit code {error.code}"
            raise Unavailable(f"Go can't get {arguments[-1]}: {reason[-200:]}") from error
        return dict(found)
