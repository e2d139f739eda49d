"""The user's cache of Kubernetes programs: one folder for each version, complete or not there.

Whatever fills it works in a temporary folder beside it, which is renamed into place: a build that
was cut off leaves nothing that looks complete.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hack import cache_dir
from hack.cluster import versions
from hack.process import wait_until
from hack.progress import step

LIMIT_SECONDS = 45 * 60


def root() -> Path:
    """The folder of all versions."""
    return cache_dir() / "kubernetes"


def folder(version: str) -> Path:
    """Where all programs of one version lie."""
    return root() / f"v{version}-{versions.architecture()}"


def find(wanted: str) -> str | None:
    """The newest cached version that is wanted: that patch, or any of the minor version."""
    ending = f"-{versions.architecture()}"
    names = [path.name for path in root().glob(f"v*{ending}")]
    held = [name.removeprefix("v").removesuffix(ending) for name in names]
    fitting = [each for each in held if versions.fits(each, wanted) and _complete(folder(each))]
    return max(fitting, key=lambda each: int(each.rpartition(".")[2]), default=None)


def _complete(path: Path) -> bool:
    programs = ("etcd", *versions.KUBERNETES_PROGRAMS)
    return all(os.access(path / name, os.X_OK) for name in programs)


@contextmanager
def fresh(version: str) -> Iterator[Path]:
    """A folder to put a version's programs into; it becomes the version's when all is well.

    Only for who holds the lock on the cache, since it removes what others have left half done.
    """
    root().mkdir(parents=True, exist_ok=True)
    for cut_off in root().glob(".fresh-*"):
        shutil.rmtree(cut_off, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".fresh-", dir=root()))
    try:
        programs = work / "programs"
        programs.mkdir()
        yield programs
        final = folder(version)
        shutil.rmtree(final, ignore_errors=True)
        programs.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _try_lock(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(place: Path, done: Callable[[], bool]) -> Iterator[None]:
    """Wait for others of this user who fill the same place, so that nothing is made twice."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        if not _try_lock(lock):
            with step("Waiting for another build of Kubernetes to end"):
                wait_until(
                    lambda: _try_lock(lock) or done(),
                    what="the other build's end",
                    seconds=LIMIT_SECONDS,
                    interval=0.5,
                )
        yield
