"""What GitOps tools make of an object: kstatus (Flux), its applier, and Argo CD's health check.

The programs are no dependency of the project. They lie in the folder that the variable GITOPS_TOOLS
names, or on PATH: `kstatus` reads an object's JSON and prints its verdict, `kapply` is the applier
of sigs.k8s.io/cli-utils, and `glua` is gopher-lua.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from hack.cluster import binaries
from hack.process import Unavailable, output

VARIABLE = "GITOPS_TOOLS"
EXAMPLES = Path(__file__).parents[1] / "examples" / "gitops"
HEALTH = EXAMPLES / "argocd" / "health.lua"
NAMES = ("kstatus", "kapply", "glua")


def programs() -> dict[str, str]:
    """The programs by name; raises Unavailable where one is missing."""
    folder = os.environ.get(VARIABLE)
    found = {name: shutil.which(name, path=folder) for name in NAMES}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        where = folder or "PATH"
        raise Unavailable(
            f"there is no {', '.join(missing)} on {where}: name a folder with {VARIABLE}"
        )
    return {name: path for name, path in found.items() if path}


def find_programs() -> None:
    """Raise Unavailable where one is missing."""
    programs()


def kstatus(raw: dict[str, Any]) -> str:
    """What Flux waits by: InProgress, Current, Failed or Terminating."""
    return output([programs()["kstatus"]], input=json.dumps(raw)).partition("\t")[0].strip()


class Repository:
    """A Git repository of the teams' layout, and the working copy that an engine keeps of it."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self.origin, self.copy = folder / "origin", folder / "copy"
        shutil.copytree(EXAMPLES / "teams", self.origin / "teams")
        for file in self.origin.rglob("overlays/*/kustomization.yaml"):
            text = re.sub(
                r"^namespace: .*$", f"namespace: {namespace}", file.read_text(), flags=re.M
            )
            file.write_text(text)
        _git(self.origin, "init", "--quiet", "--initial-branch=main")
        self.commit("Begin")
        _git(folder, "clone", "--quiet", str(self.origin), str(self.copy))

    def commit(self, subject: str) -> None:
        _git(self.origin, "add", "--all")
        author = ("-c", "user.name=team", "-c", "user.email=team@example.com")
        _git(self.origin, *author, "commit", "--quiet", "--message", subject)

    def render(self, overlay: str) -> str:
        """Pull, and render an overlay with the kustomize that kubectl has."""
        _git(self.copy, "pull", "--quiet")
        return render(self.copy / "teams", overlay)


def render(teams: Path, overlay: str) -> str:
    """The manifests of an overlay."""
    return output([str(binaries.kubectl()), "kustomize", str(teams / "overlays" / overlay)])


def _git(folder: Path, *arguments: str) -> str:
    return output(["git", "-C", str(folder), *arguments])


def argo_health(raw: dict[str, Any], folder: Path) -> tuple[str, str]:
    """What the health check makes of an object: status and message."""
    script = folder / "check.lua"
    script.write_text(
        f"obj = {_lua(raw)}\n"
        f"local health = (function()\n{HEALTH.read_text()}\nend)()\n"
        "print(health.status)\nprint(health.message)\n"
    )
    status, message = output([programs()["glua"], str(script)]).splitlines()
    return status, message


def _lua(value: Any) -> str:
    """A value as Argo CD hands it to the script: tables, and no null."""
    if isinstance(value, dict):
        known = {key: each for key, each in value.items() if each is not None}
        return "{" + ", ".join(f"[{_lua(key)}] = {_lua(each)}" for key, each in known.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(map(_lua, value)) + "}"
    if isinstance(value, str):
        bytes_of = value.encode()
        return '"' + "".join(f"\\{byte:03d}" for byte in bytes_of) + '"'
    return json.dumps(value)
