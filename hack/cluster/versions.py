"""Which versions of Kubernetes are supported, and which one this run is to have.

`K8S` names it: `newest`, `oldest`, a minor version such as 1.35 (its newest patch), a version such
as 1.33.13, or a folder of programs. Without it a folder that KUBEBUILDER_ASSETS names may have any
version, and everything else is the newest.
"""

from __future__ import annotations

import functools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hack.process import ClusterError, Unavailable, output

VARIABLE = "K8S"
MINORS = range(33, 38)
NEWEST = "1.37.2"
OLDEST = "1.33.13"
PINS = {"newest": NEWEST, "oldest": OLDEST}
LAST_RESORT = "1.20.2"
"""What Debian's source holds; nothing is tested or promised for it."""

ETCD = "3.7.3"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

KUBERNETES_PROGRAMS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
)


@dataclass(frozen=True)
class Wanted:
    """What a run asks for."""

    version: str = NEWEST
    """`1.33.13`, or `1.33` for any patch of it."""

    folder: Path | None = None
    """A folder that has to serve, whatever its version."""

    named: bool = False
    """Whether K8S says so; else any folder and, at last, any version will do."""

    any_patch: bool = True
    """Whether a folder may have another patch of it: `newest` and `oldest` pin downloads alone."""

    @classmethod
    def here(cls) -> Self:
        """What the environment asks for."""
        text = os.environ.get(VARIABLE, "").strip()
        if not text:
            return cls()
        if os.sep in text:
            return cls(folder=Path(text).expanduser(), named=True)
        if text in PINS:
            return cls(PINS[text], named=True)
        text = text.removeprefix("v")
        found = re.fullmatch(r"1\.(\d+)(\.\d+)?", text)
        if not found or not (int(found[1]) in MINORS or fits(LAST_RESORT, text)):
            raise Unavailable(
                f"{VARIABLE}={text}: name newest, oldest, a version from 1.{MINORS[0]} to "
                f"1.{MINORS[-1]} such as {OLDEST}, or a folder of programs"
            )
        return cls(text, named=True, any_patch=False)

    def served_by(self, version: str) -> bool:
        """Whether a folder with that version will do."""
        asked = self.version.rpartition(".")[0] if self.any_patch else self.version
        return fits(version, asked)

    @property
    def last_resort(self) -> bool:
        """Whether it is the version that only Debian's source has."""
        return fits(LAST_RESORT, self.version)


def fits(version: str, wanted: str) -> bool:
    """Whether a whole version is the wanted one, or a patch of the wanted minor version."""
    return version == wanted or version.startswith(f"{wanted}.")


def asked_minor() -> int | None:
    """The 35 of what K8S asks for; None where it asks for nothing."""
    wanted = Wanted.here()
    if not wanted.named:
        return None
    folder = wanted.folder
    version = version_of(folder / "kube-apiserver") if folder else wanted.version
    return int(version.split(".")[1])


def require_running(minor: int) -> None:
    """Refuse a running cluster of another minor version than K8S asks for."""
    asked = asked_minor()
    if asked not in (None, minor):
        raise ClusterError(
            f"Kubernetes 1.{minor} runs, and {VARIABLE} asks for 1.{asked}: remove it first "
            "(`make demo-down`, or `python -m hack.cluster down`)"
        )


@functools.cache
def version_of(program: Path) -> str:
    """The 1.37.2 of a program that calls itself `Kubernetes v1.37.2`."""
    try:
        found = re.search(r"\bv(\d+\.\d+\.\d+)", output([str(program), "--version"]))
    except OSError as error:
        raise ClusterError(f"{program} doesn't run: {error}") from error
    if not found:
        raise ClusterError(f"{program} doesn't tell its version")
    return found[1]


def architecture() -> str:
    """This machine's architecture as Kubernetes' releases call it, such as amd64."""
    machine = platform.machine()
    return ARCHITECTURES.get(machine, machine)
