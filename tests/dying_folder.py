"""A folder whose process dies, and a look at what readers would find at each moment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from finetune_trainer.store import FileInfo, Folder, OnBytes

MANIFEST = "manifest.json"


class KilledError(Exception):
    """Nothing reaches the folder any more."""


def contents(folder: Folder) -> dict[str, bytes]:
    """All files with their bytes."""
    return {info.path: folder.read(info.path) or b"" for info in folder.list()}


class DyingFolder(Folder):
    """Dies after so many changes; after each one all manifests must be true.

    Where manifest.json was there, it must be there at each moment.
    """

    def __init__(self, inner: Folder, lives: int | None = None) -> None:
        self._inner = inner
        self._lives = lives
        self._named = inner.read(MANIFEST) is not None
        self.uri = inner.uri

    def stat(self, path: str) -> FileInfo | None:
        return self._inner.stat(path)

    def list(self, prefix: str = "") -> list[FileInfo]:
        return self._inner.list(prefix)

    def read(self, path: str) -> bytes | None:
        return self._inner.read(path)

    def read_start(self, path: str, count: int) -> bytes:
        return self._inner.read_start(path, count)

    def download(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> None:
        self._inner.download(path, target, on_bytes)

    def write(self, path: str, data: bytes) -> None:
        self._live()
        self._inner.write(path, data)
        self._look()

    def create(self, path: str, data: bytes) -> bool:
        self._live()
        created = self._inner.create(path, data)
        self._look()
        return created

    def upload(
        self,
        source: Path,
        path: str,
        on_bytes: OnBytes | None = None,
        *,
        sha256: str | None = None,
    ) -> None:
        self._live()
        self._inner.upload(source, path, on_bytes, sha256=sha256)
        self._look()

    def delete(self, paths: Iterable[str]) -> None:
        for path in list(paths):
            self._live()
            self._inner.delete([path])
            self._look()

    def abandon(self, prefix: str) -> None:
        self._live()
        self._inner.abandon(prefix)

    def _live(self) -> None:
        if self._lives is None:
            return
        if self._lives <= 0:
            raise KilledError
        self._lives -= 1

    def _look(self) -> None:
        manifests = [info.path for info in self._inner.list("versions/")]
        manifests = [path for path in manifests if path.endswith(f"/{MANIFEST}")]
        for path in manifests:
            self._check(path, path.rpartition("/")[0])
        data = self._inner.read(MANIFEST)
        if data is None:
            assert not self._named, "manifest.json is gone"
            return
        version = json.loads(data).get("version", "")
        self._check(MANIFEST, f"versions/{version}" if version else "")

    def _check(self, path: str, folder: str) -> None:
        data = self._inner.read(path) or b""
        for item in json.loads(data)["files"]:
            file = f"{folder}/{item['path']}" if folder else item["path"]
            found = hashlib.sha256(self._inner.read(file) or b"").hexdigest()
            assert found == item["sha256"], f"{path} is wrong about {file}"
