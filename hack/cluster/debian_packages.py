"""What Debian has: busybox for the pause image, and Kubernetes 1.20, the last resort.

Only a machine that can get nothing newer (no folder, no download, no Go) builds the latter from
Debian's source, with etcd from Debian's package. A target is built in a temporary folder and
renamed into place.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hack import debian
from hack.cluster import cache
from hack.cluster.kubernetes_build import RECIPE, TARGETS, VERSION, KubernetesBuild
from hack.process import ClusterError, Unavailable
from hack.progress import Step, step

PROGRAMS = {"etcd": ("etcd",), "pause": ("busybox",), **TARGETS}
PACKAGED = {"etcd": ("etcd-server", "usr/bin/etcd"), "pause": ("busybox-static", "bin/busybox")}


def _folder() -> Path:
    return cache.root() / f"{VERSION}-r{RECIPE}-{debian.architecture()}"


def _cached(targets: Iterable[str]) -> dict[str, Path] | None:
    folder = _folder()
    found = {name: folder / target / name for target in targets for name in PROGRAMS[target]}
    return found if all(path.exists() for path in found.values()) else None


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


def ensure(targets: tuple[str, ...]) -> dict[str, Path]:
    """Paths of the programs of these targets, by name; fetches or builds what is missing."""
    if not debian.is_debian_like():
        raise Unavailable("this is neither Debian nor Ubuntu")
    found = _cached(targets)
    if found:
        return found
    with cache.locked(_folder(), lambda: _cached(targets) is not None):
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
