"""Downloads the released programs: Kubernetes' server archive and etcd's, each by its checksum.

Both projects publish a SHA-512 or SHA-256 beside the archive. What doesn't match it is never
unpacked, and nothing else is tried then: somebody has to look.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import httpx

from hack.cluster import versions
from hack.process import ClusterError, Unavailable
from hack.progress import Step

CONNECT_SECONDS = 5
READ_SECONDS = 60
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Releases:
    """Where the two projects publish."""

    kubernetes: str = "https://dl.k8s.io"
    etcd: str = "https://github.com/etcd-io/etcd/releases/download"

    def resolve(self, wanted: str) -> str:
        """The newest patch of a minor version, or the whole version that is named.

        Raises Unavailable where the server can't be reached or has no such version.
        """
        if wanted.count(".") == 2:
            _text(f"{self._server_archive(wanted)}.sha512")
            return wanted
        version = _text(f"{self.kubernetes}/release/stable-{wanted}.txt").strip().removeprefix("v")
        if not versions.fits(version, wanted):
            raise ClusterError(f"{self.kubernetes} names {version[:40]!r} as the newest {wanted}")
        return version

    def fetch(self, version: str, target: Path, step: Step) -> None:
        """Put the programs of one version and etcd into a folder.

        Raises Unavailable where a server can't be reached or lacks the version, and ClusterError
        where a checksum doesn't match.
        """
        architecture = versions.architecture()
        url = self._server_archive(version)
        name = url.rpartition("/")[2]
        expected = _digest(_text(f"{url}.sha512"), name, 128)
        archive = _download(url, target / name, expected, step)
        _unpack(archive, "kubernetes/server/bin", versions.KUBERNETES_PROGRAMS, target)
        folder = f"etcd-v{versions.ETCD}-linux-{architecture}"
        release = f"{self.etcd}/v{versions.ETCD}"
        name = f"{folder}.tar.gz"
        expected = _digest(_text(f"{release}/SHA256SUMS"), name, 64)
        archive = _download(f"{release}/{name}", target / name, expected, step)
        _unpack(archive, folder, ("etcd",), target)

    def _server_archive(self, version: str) -> str:
        name = f"kubernetes-server-linux-{versions.architecture()}.tar.gz"
        return f"{self.kubernetes}/v{version}/{name}"


def _client() -> httpx.Client:
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    return httpx.Client(follow_redirects=True, timeout=timeout)


def _unreachable(url: str, error: httpx.HTTPError) -> Unavailable:
    if isinstance(error, httpx.HTTPStatusError):
        return Unavailable(f"{url} answers {error.response.status_code}")
    return Unavailable(f"{httpx.URL(url).host} can't be reached ({error or type(error).__name__})")


def _text(url: str) -> str:
    try:
        with _client() as client:
            return client.get(url).raise_for_status().text
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from error


def _digest(text: str, name: str, length: int) -> str:
    """The checksum of a file: alone in the text, or in a line with the file's name."""
    for line in text.splitlines():
        found = re.fullmatch(rf"([0-9a-f]{{{length}}})(?:\s+\*?(\S+))?", line.strip())
        if found and found[2] in (None, name):
            return found[1]
    raise ClusterError(f"no checksum of {name} in what its release says: {text[:80]!r}")


def _download(url: str, target: Path, expected: str, step: Step) -> Path:
    """Download a file whose SHA-512 or SHA-256 is known."""
    digest = hashlib.sha512() if len(expected) == 128 else hashlib.sha256()
    done = 0
    try:
        with (
            _client() as client,
            client.stream("GET", url) as answer,
            target.open("wb") as sink,
        ):
            answer.raise_for_status()
            total = int(answer.headers.get("content-length", 0)) // MEBIBYTE
            for chunk in answer.iter_raw(MEBIBYTE):
                sink.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                step.detail(f"{target.name}: {done // MEBIBYTE} of {total} MiB")
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from error
    if digest.hexdigest() != expected:
        raise ClusterError(
            f"{url} isn't what its checksum says: {digest.name.upper()} {digest.hexdigest()} "
            f"in place of {expected}. Nothing of it was used"
        )
    return target


def _unpack(archive: Path, folder: str, names: tuple[str, ...], target: Path) -> None:
    """Take these programs out of an archive, and remove it."""
    wanted = {f"{folder}/{name}": name for name in names}
    found = set()
    with tarfile.open(archive) as tar:
        for entry in tar:
            name = wanted.get(entry.name.removeprefix("./"))
            content = tar.extractfile(entry) if name else None
            if name and content:
                (target / name).write_bytes(content.read())
                (target / name).chmod(0o755)
                found.add(name)
    archive.unlink()
    if missing := set(names) - found:
        raise ClusterError(f"{archive.name} lacks {', '.join(sorted(missing))}")
