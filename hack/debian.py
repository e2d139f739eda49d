"""Takes packages and sources from Debian 12 without touching the machine and without root.

Debian 12 (bookworm) is the release whose `kubernetes` source package still holds the whole of
Kubernetes. A private sources list, with lists and cache in a folder of our own, lets apt fetch
from it on any machine whose own sources name a Debian mirror; the packages are unpacked, never
installed. apt checks the archive's signature and every checksum.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from hack.process import Unavailable, output, run

RELEASE = "bookworm"
KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
MIRROR_VARIABLE = "FINETUNE_DEBIAN_MIRROR"
"""Names a Debian mirror on a machine whose own sources hold none, such as Ubuntu."""


def os_release() -> dict[str, str]:
    """The fields of /etc/os-release, or nothing where there is no such file."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def is_debian_like() -> bool:
    """Whether apt and dpkg rule this machine."""
    release = os_release()
    family = f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()
    return ("debian" in family or "ubuntu" in family) and shutil.which("apt-get") is not None


def architecture() -> str:
    """Debian's name of this machine's architecture, such as amd64."""
    return output(["dpkg", "--print-architecture"]).strip()


def mirror() -> str:
    """The Debian mirror that this machine's own apt sources name."""
    named = os.environ.get(MIRROR_VARIABLE)
    if named:
        return named
    codename = os_release().get("VERSION_CODENAME", "")
    fields = "$(RELEASE)|$(COMPONENT)|$(REPO_URI)"
    listing = output(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"])
    rows = [line.split("|", 2) for line in listing.splitlines() if line.count("|") >= 2]
    uris = [uri for suite, part, uri in rows if (suite, part) == (codename, "main")]
    debian = [uri for uri in uris if urlsplit(uri).path.rstrip("/").endswith("/debian")]
    if not debian:
        raise Unavailable(
            "the machine's apt sources name no Debian mirror; "
            f"set {MIRROR_VARIABLE} to one, or KUBEBUILDER_ASSETS to a folder of binaries"
        )
    return debian[0]


def _keyring() -> Path:
    for path in KEYRINGS:
        if path.exists():
            return path
    raise Unavailable("no Debian archive keyring: apt-get install debian-archive-keyring")


class PrivateApt:
    """An apt of our own below `root`: its lists, cache and downloads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "apt.log"
        self._sources = root / "sources.list"
        for folder in ("lists/partial", "cache/archives/partial", "debs", "source"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    def _options(self) -> list[str]:
        options = {
            "Dir::Etc::sourcelist": self._sources,
            "Dir::Etc::sourceparts": "/nonexistent",
            "Dir::State::lists": self.root / "lists",
            "Dir::Cache": self.root / "cache",
            "APT::Sandbox::User": "root",
            "APT::Get::List-Cleanup": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]

    def update(self) -> None:
        """Write the private sources list and fetch the package lists."""
        signed = f"[signed-by={_keyring()}] {mirror()} {RELEASE} main"
        self._sources.write_text(f"deb {signed}\ndeb-src {signed}\n")
        run(["apt-get", *self._options(), "update"], log=self.log)

    def closure(self, packages: list[str]) -> list[str]:
        """Names of the packages and of all that they depend on, as on a machine without any."""
        nothing = self.root / "status"
        nothing.touch()
        options = [*self._options(), "-o", f"Dir::State::status={nothing}"]
        options += ["-o", "Debug::NoLocking=true"]  # the lock is root's, and nothing is installed
        install = ["install", "--simulate", "--no-install-recommends", *packages]
        lines = output(["apt-get", *options, *install]).splitlines()
        return [line.split()[1] for line in lines if line.startswith("Inst ")]

    def unpack(self, packages: list[str], target: Path) -> None:
        """Download binary packages and unpack them into `target`."""
        folder = self.root / "debs"
        run(["apt-get", *self._options(), "download", *packages], log=self.log, cwd=folder)
        target.mkdir(parents=True, exist_ok=True)
        for archive in sorted(folder.glob("*.deb")):
            run(["dpkg", "-x", str(archive), str(target)], log=self.log)
            archive.unlink()

    def upstream_source(self, package: str) -> Path:
        """Download a source package and return its upstream tarball."""
        folder = self.root / "source"
        command = ["apt-get", *self._options(), "source", "--download-only", package]
        run(command, log=self.log, cwd=folder)
        return next(folder.glob(f"{package}_*.orig.tar.*"))
