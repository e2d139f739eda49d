"""The cgroup below which a cluster's pods live, in both of the kernel's cgroup versions."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.cluster.process import wait_until

ROOT = Path("/sys/fs/cgroup")


def _roots() -> list[Path]:
    """The one tree of version 2, or the tree of each controller of version 1."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    found = {path.resolve() for path in ROOT.iterdir() if (path / "cgroup.procs").exists()}
    return sorted(found)


def create(name: str) -> None:
    """Make the cgroup; in version 2 its children get every controller that there is."""
    for root in _roots():
        folder = root / name
        folder.mkdir(exist_ok=True)
        if (root / "cgroup.controllers").exists():
            for parent in (root, folder):
                _enable_controllers(parent)


def _enable_controllers(folder: Path) -> None:
    for controller in (folder / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):
            (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def remove(name: str) -> None:
    """Remove the cgroup with all below it; its processes must have ended."""
    wait_until(lambda: _removed(name), what=f"end of the processes of cgroup {name}", seconds=20)


def _removed(name: str) -> bool:
    for root in _roots():
        top = root / name
        children = [path for path in top.rglob("*") if path.is_dir()] if top.exists() else []
        for folder in [*sorted(children, key=lambda path: -len(path.parts)), top]:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return not any((root / name).exists() for root in _roots())
