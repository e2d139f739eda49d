"""The Debian packages that the native node and the image builds need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from tests.cluster.errors import CommandFailed, Unavailable
from tests.cluster.paths import cache_dir
from tests.cluster.process import output, run
from tests.cluster.progress import step

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
PROGRAMS = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "buildah": "buildah",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "mmdebstrap": "mmdebstrap",
}
"""Packages by a program that each of them brings; one already there is used as it is."""


def system_packages_missing() -> list[str]:
    """Names of the packages to install, in a fixed order."""
    missing = [
        package
        for program, package in PROGRAMS.items()
        if shutil.which(program, path=SEARCH_PATH) is None
    ]
    return list(dict.fromkeys(missing))


def install_system_packages() -> None:
    """Install what is missing, with apt and as root."""
    missing = system_packages_missing()
    if not missing:
        return
    if os.geteuid() != 0:
        raise Unavailable(f"run as root: apt-get install {' '.join(missing)}")
    log = cache_dir() / "apt-install.log"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    with step(f"Installing {', '.join(missing)}"):
        run(["apt-get", "update"], log=log, env=environment)
        run(install, log=log, env=environment)


def check_containerd() -> None:
    """Refuse a containerd that no longer speaks the interface of this kubelet."""
    try:
        found = re.search(r"\bv?(\d+)\.\d+", output(["containerd", "--version"]))
    except (CommandFailed, OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"containerd doesn't run: {error}") from error
    if found and int(found[1]) >= 2:
        raise Unavailable(
            "containerd 2 doesn't speak the runtime interface of Kubernetes 1.20; "
            "install Docker and kind instead"
        )
