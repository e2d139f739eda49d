"""What a whole cluster offers, whoever provides it, and the choice of a provider."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Protocol

from hack import debian
from hack.cluster.kind import KindCluster
from hack.cluster.native import NativeCluster
from hack.process import Unavailable

VARIABLE = "FINETUNE_CLUSTER"
DEFAULT_NAME = "demo"


class Cluster(Protocol):
    """A Kubernetes cluster with one node, on this machine."""

    @property
    def name(self) -> str:
        """The provider: kind or native."""
        ...

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        ...

    @property
    def node_address(self) -> str:
        """An address of this machine that pods reach: a server on it serves both."""
        ...

    def announce(self) -> list[str]:
        """What `up` will do outside of the project's and the user's cache folder."""
        ...

    def up(self) -> None:
        """Bring it up, or what of it is not running; returns when its node is ready."""
        ...

    def down(self) -> None:
        """Remove it with everything in it."""
        ...

    def healthy(self) -> bool:
        """Whether the API server and the node are ready."""
        ...

    def load_image(self, archive: Path, ref: str) -> None:
        """Give the node an image out of a docker-archive; pods name it `ref`, pull it never."""
        ...

    def kubectl(self, *args: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess
        """Run kubectl as the administrator and return what it printed."""
        ...


def _kind_works() -> bool:
    if not (shutil.which("kind") and shutil.which("docker")):
        return False
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def choose(name: str = DEFAULT_NAME) -> Cluster:
    """kind where Docker runs, else the native node on Debian or Ubuntu as root."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "kind", "native"):
        raise Unavailable(f"{VARIABLE}={wanted}: set it to kind or native")
    if wanted == "kind" or (not wanted and _kind_works()):
        return KindCluster(name)
    native_works = debian.is_debian_like() and os.geteuid() == 0
    if wanted == "native" or native_works:
        return NativeCluster(name)
    raise Unavailable(
        "no way to run a Kubernetes node here: either start Docker and put `kind` on the PATH, "
        "or run this as root on Debian or Ubuntu"
    )
