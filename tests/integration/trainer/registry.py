"""A container registry: Debian's docker-registry, which the tests push to and pull from.

It is no dependency of the project. The program is the one that the variable DOCKER_REGISTRY names,
or the one on PATH, or on a Debian-like machine the package's, fetched once (5 MB) and unpacked, not
installed, into the user's cache folder.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from hack import cache_dir, debian
from hack.object_store import lasting_ports
from hack.process import Unavailable, wait_until
from tests.integration.trainer.tls import Authority

VARIABLE, PACKAGE = "DOCKER_REGISTRY", "docker-registry"
ADDRESS = "127.0.0.1"
USER, PASSWORD = "pusher", "correct-horse-battery"
HTPASSWD = "pusher:$2b$04$abcdefghijklmnopqrstuupOWRSKKNe562z1DsLEArFuJDHVyRIMa"
"""A line of `htpasswd -nbB -C 4` for these two."""

ACCEPT = ", ".join(f"application/vnd.oci.image.{kind}.v1+json" for kind in ("index", "manifest"))


def program() -> str:
    """The program; raises Unavailable where there is none."""
    found = shutil.which(os.environ.get(VARIABLE) or PACKAGE)
    if found:
        return found
    if not debian.is_debian_like():
        raise Unavailable(f"there is no {PACKAGE}: put it on PATH, or name it with {VARIABLE}")
    folder = cache_dir() / PACKAGE
    root = folder / f"{debian.RELEASE}-{debian.architecture()}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two checkouts' tests fetch it once
        if not root.exists():
            with tempfile.TemporaryDirectory(prefix="tree-", dir=folder) as name:
                apt = debian.PrivateApt(Path(name, "apt"))
                apt.log = folder / "fetch.log"
                apt.update()
                apt.unpack([PACKAGE], Path(name, "root"))
                Path(name, "root").rename(root)
    return str(root / "usr/bin" / PACKAGE)


@dataclass(frozen=True)
class RunningRegistry:
    host: str
    authority: Authority | None
    log: Path

    def get(self, repository: str, path: str) -> requests.Response:
        """Read something below a repository, with the login where there is one."""
        scheme = "https" if self.authority else "http"
        answer = requests.get(
            f"{scheme}://{self.host}/v2/{repository}/{path}",
            headers={"Accept": ACCEPT},
            auth=(USER, PASSWORD),
            verify=str(self.authority.bundle) if self.authority else True,
            timeout=60,
        )
        answer.raise_for_status()
        return answer

    def json(self, repository: str, path: str) -> dict[str, Any]:
        return dict(self.get(repository, path).json())

    def requests(self, method: str) -> int:
        """How many requests it has answered with this method."""
        return self.log.read_text().count(f'"{method} /v2/')


@contextmanager
def running_registry(
    folder: Path, authority: Authority | None = None, address: str = ADDRESS
) -> Iterator[RunningRegistry]:
    """Run one with its data in an empty folder; with an `authority` it has TLS and a login."""
    (port,) = lasting_ports(address, 1)
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"{address}:{port}", "secret": "tests"},
    }
    if authority:
        (folder / "htpasswd").write_text(f"{HTPASSWD}\n")
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
        chain = str(authority.chain)
        config["http"]["tls"] = {"certificate": chain, "key": chain}
    (folder / "config.json").write_text(json.dumps(config))  # which is YAML as well
    log = folder / "access.log"
    running = RunningRegistry(f"{address}:{port}", authority, log)
    command = [program(), "serve", str(folder / "config.json")]
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=sys.stderr) as it:
        try:
            wait_until(lambda: _answers(running), what=PACKAGE, seconds=60)
            yield running
        finally:
            it.terminate()


def _answers(registry: RunningRegistry) -> bool:
    try:
        registry.get("none", "tags/list")
    except requests.HTTPError:  # it has no such repository
        return True
    except requests.ConnectionError:
        return False
    return True


def docker_config(host: str, password: str = PASSWORD) -> str:
    """What a Secret of type kubernetes.io/dockerconfigjson holds."""
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    return json.dumps({"auths": {host: {"auth": auth}}})
